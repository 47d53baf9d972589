import pytest
import torch
from torch import nn

from calibrate.input_groups import AllSeen, steps_of, trace_groups, watched
from calibrate.model import Block


class Experts(nn.Module):
    """Two of three experts are called."""

    def __init__(self):
        super().__init__()
        self.first = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.gate = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.second = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.last = nn.Linear(4, 4)

    def forward(self, hidden):
        total = torch.zeros_like(hidden)
        for index in (2, 0):
            routed = hidden + index
            total = total + self.second[index](self.first[index](routed) * self.gate[index](routed))
        return self.last(total)


@pytest.fixture
def experts() -> Block:
    module = Experts()
    linears = {name: child for name, child in module.named_modules() if isinstance(child, nn.Linear)}
    parallel = tuple(
        frozenset(name for name in linears if name.startswith(kinds)) for kinds in (("first", "gate"), ("second",))
    )
    return Block("block", module, linears, parallel)


def test_layers_called_with_one_tensor_are_a_group_and_those_never_called_come_last(experts):
    groups = trace_groups(experts, lambda: experts.module(torch.ones(2, 4)))
    assert groups == [
        ("first.2", "gate.2"),
        ("second.2",),
        ("first.0", "gate.0"),
        ("second.0",),
        ("last",),
        ("first.1",),
        ("gate.1",),
        ("second.1",),
    ]


def test_groups_of_a_parallel_set_make_one_step_and_others_one_each(experts):
    groups = trace_groups(experts, lambda: experts.module(torch.ones(2, 4)))
    first, second, last = steps_of(experts, groups)
    assert first == [("first.2", "gate.2"), ("first.0", "gate.0"), ("first.1",), ("gate.1",)]
    assert second == [("second.2",), ("second.0",), ("second.1",)]
    assert last == [("last",)]


def test_watching_takes_every_groups_inputs_and_stops_when_all_were_seen(experts):
    taken = {}
    groups = [("first.2", "gate.2"), ("first.0", "gate.0")]
    hidden = torch.randn(2, 4)
    with watched(experts, groups, taken.__setitem__, stop=True) as begin:
        for _ in range(2):
            taken.clear()
            begin()
            with pytest.raises(AllSeen):
                experts.module(hidden)
            assert torch.equal(taken[groups[0]], hidden + 2)
            assert torch.equal(taken[groups[1]], hidden)
    experts.module(hidden + 1)
    assert torch.equal(taken[groups[1]], hidden)


def test_a_pass_in_which_a_group_is_not_called_runs_to_its_end(experts):
    taken = {}
    with watched(experts, [("first.2",), ("first.1",)], taken.__setitem__, stop=True) as begin:
        begin()
        experts.module(torch.randn(2, 4))
    assert list(taken) == [("first.2",)]
