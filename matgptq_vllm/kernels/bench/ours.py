"""Our competitors: one parent's copies in the kernel layout, read at every width and by mixed batches."""

from collections.abc import Callable, Sequence
from functools import cache, partial

import torch

from matgptq_vllm.core.planes import PlaneLayout
from matgptq_vllm.core.precision import PARENT_WIDTH, WIDTHS
from matgptq_vllm.core.slicing import SliceRule, bits_read, dequantize
from matgptq_vllm.kernels.bench.competitors import (
    Competitor,
    Problem,
    Workload,
    bytes_of_codes_and_scales,
    random_scales,
    reference_product,
)
from matgptq_vllm.kernels.bench.timing import num_copies
from matgptq_vllm.kernels.dispatch import sliced_linear
from matgptq_vllm.kernels.resident import Resident, to_resident


class ParentCopies:
    """Copies of one layer of a random parent. All widths share them, as they do in a replica."""

    def __init__(self, problem: Problem, competitors: Sequence[Competitor]) -> None:
        """Make as many copies as the narrowest of ``competitors`` needs."""
        self._problem = problem
        self._layout = PlaneLayout()
        self._references: dict[int, torch.Tensor] = {}
        copies = max(num_copies(self._bytes_read(competitor)) for competitor in competitors)
        self._first_planes, self._first_scales = self._random_planes(), self._random_scales()
        first = to_resident(self._first_planes, self._first_scales, self._layout, problem.shape.k, problem.group_size)
        self._copies = [first, *(_another(first) for _ in range(copies - 1))]

    def workload(self, competitor: Competitor) -> Workload:
        """The calls of ``competitor``; of the copies, it uses as many as it needs."""
        problem, bytes_read = self._problem, self._bytes_read(competitor)
        profile_widths, token_profiles = _profiles(competitor, problem.x.shape[0])
        call = partial(
            _call,
            n=problem.shape.n,
            steps=_Steps(token_profiles, profile_widths, problem.x.device),
            widths=profile_widths,
            group_size=problem.group_size,
            rule=problem.rule,
        )
        copies = self._copies[: num_copies(bytes_read)]
        calls: list[Callable[[torch.Tensor], torch.Tensor]] = [partial(call, layer=layer) for layer in copies]
        reference = self._reference(competitor.widths[0])
        if len(competitor.widths) > 1:
            reference = reference.clone()
            for offset, width in enumerate(competitor.widths):
                reference[offset :: len(competitor.widths)] = self._reference(width)[offset :: len(competitor.widths)]
        return Workload(calls, bytes_read, reference)

    def _bytes_read(self, competitor: Competitor) -> int:
        bits = bits_read(max(competitor.widths), self._problem.rule)
        return bytes_of_codes_and_scales(self._problem.shape, bits, self._problem.group_size)

    def _random_planes(self) -> list[torch.Tensor]:
        """Planes in the checkpoint layout: random bytes are random codes."""
        shape = self._problem.shape
        columns = [self._layout.packed_columns(plane, shape.k) for plane in range(len(self._layout.plane_widths))]
        device = self._problem.x.device
        return [torch.randint(256, (shape.n, count), dtype=torch.uint8, device=device) for count in columns]

    def _random_scales(self) -> torch.Tensor:
        problem = self._problem
        return random_scales(problem.shape, problem.group_size, PARENT_WIDTH, problem.x.device)

    def _reference(self, width: int) -> torch.Tensor:
        """float32 [largest M, n] of the first copy read at ``width``."""
        if width not in self._references:
            problem = self._problem

            def weights(rows: slice) -> torch.Tensor:
                codes = self._layout.join([plane[rows] for plane in self._first_planes], problem.shape.k)
                return dequantize(codes, self._first_scales[rows], width, problem.rule, problem.group_size)

            self._references[width] = reference_product(problem.x, problem.shape.n, weights)
        return self._references[width]


def _profiles(competitor: Competitor, num_tokens: int) -> tuple[list[int], list[int]]:
    """Widths of the replica's profiles, and the profile of every token; a mixture alternates."""
    profile_widths = list(competitor.widths) if competitor.family == "alone" else list(WIDTHS)
    turns = competitor.widths
    return profile_widths, [profile_widths.index(turns[token % len(turns)]) for token in range(num_tokens)]


class _Steps:
    """What the layers read of steps in which the first rows have the first of ``token_profiles``."""

    def __init__(self, token_profiles: list[int], profile_widths: list[int], device: torch.device) -> None:
        self.token_profiles = torch.tensor(token_profiles, dtype=torch.int32, device=device)
        self.host_profile_widths = torch.tensor(profile_widths, dtype=torch.int32)
        self.profile_widths = self.host_profile_widths.to(device)
        # Made by the warm-up of a graph: a capture allows no copies from the host.
        self.rows = cache(self._rows)

    def _rows(self, m: int) -> tuple[torch.Tensor, torch.Tensor]:
        """row_order and step_profiles (kernels.segments) of a step of ``m`` rows."""
        profiles = self.token_profiles[:m]
        counts = profiles.bincount(minlength=len(self.profile_widths))
        return profiles.argsort(stable=True).int(), counts.int().cpu()


def _another(layer: Resident) -> Resident:
    """A layer like ``layer``, of random bits: in the kernel layout too, any bits are codes."""
    planes = [
        torch.randint(256, (plane.nbytes,), dtype=torch.uint8, device=plane.device).view(plane.dtype).view(plane.shape)
        for plane in layer.planes
    ]
    return Resident(planes, layer.scales.clone(), layer.locks.clone())


def _call(
    x: torch.Tensor, n: int, layer: Resident, steps: _Steps, widths: list[int], group_size: int, rule: SliceRule
) -> torch.Tensor:
    row_order, step_profiles = steps.rows(x.shape[0])
    # The graphs of a measurement are replayed with the rows that they were captured with, so the host may decide: in an
    # engine, products of as many rows run outside of graphs.
    return sliced_linear(
        x, layer.planes, layer.scales, n, steps.token_profiles, steps.profile_widths, row_order, step_profiles,
        steps.host_profile_widths, layer.locks, widths, group_size, rule, bias=None, host_decides=True,
    )  # fmt: skip
