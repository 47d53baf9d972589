"""engine.bench: the bookkeeping of a step is timed, and is small beside a decode step."""

import torch

from matgptq_vllm.engine.bench import main, step_times_us


def test_an_unchanged_step_costs_less_than_a_changed_one() -> None:
    times = step_times_us(256, torch.device("cpu"), 200)
    assert set(times) == {"same", "changed", "one profile", "graph"}
    assert times["same"] < times["one profile"] < times["changed"]
    # 1% of a decode step of 3 ms. Measured: 3 us.
    assert times["same"] < 30


def test_the_command_prints_a_line_per_kind(capsys) -> None:
    assert main(["--requests", "4", "--repeats", "5"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4
