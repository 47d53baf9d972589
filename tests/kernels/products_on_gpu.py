"""Products through ``dispatch.sliced_linear`` on a GPU against float64.

    python tests/kernels/products_on_gpu.py RULE GROUP DTYPE WIDTHS ROWS SHAPES

WIDTHS are those that the replica holds, such as 2,4,8; ROWS such as 1,16,257; SHAPES such as 4096x896,130x4864. For every
shape and number of rows: all rows at each width, and mixed ones. Memory that results may be placed in is filled with NaN first.
Then the memory of planes that no row reads goes, as when a replica drops them: results must keep every bit, also in a graph
that was captured before, and a read there would end the process. Prints, as JSON, the largest relative error of a row for every
case.
"""

import json
import sys

import torch

from matgptq_vllm.core.planes import PlaneLayout
from matgptq_vllm.core.slicing import SliceRule, dequantize, num_groups
from matgptq_vllm.engine.cuda_memory import CudaMemory
from matgptq_vllm.kernels.dispatch import sliced_linear
from matgptq_vllm.kernels.lanes import bits_needed
from matgptq_vllm.kernels.layout import num_planes
from matgptq_vllm.kernels.resident import Resident, to_resident

LAYOUT = PlaneLayout()


class Layer:
    """A layer of random codes, and its weights at every width in float64."""

    def __init__(self, n: int, k: int, rule: SliceRule, group: int, dtype: torch.dtype, widths: tuple[int, ...]):
        generator = torch.Generator().manual_seed(n + k)
        codes = torch.randint(0, 256, (n, k), dtype=torch.uint8, generator=generator).cuda()
        scales = (torch.rand(n, num_groups(k, group), generator=generator) * 0.02 + 0.001).bfloat16().cuda()
        whole = to_resident(LAYOUT.split(codes), scales, LAYOUT, k, group)
        self.resident = Resident(whole.planes[: num_planes(bits_needed(widths[-1], rule))], whole.scales, whole.locks)
        # The first plane is read at every width.
        self.memories = [CudaMemory(plane.device, plane.nbytes) for plane in self.resident.planes[1:]]
        dropped = [
            memory.allocate(plane.nbytes).view(plane.dtype).view(plane.shape).copy_(plane)
            for memory, plane in zip(self.memories, self.resident.planes[1:], strict=True)
        ]
        self.planes = [self.resident.planes[0], *dropped]
        self.weights = [dequantize(codes, scales, width, rule, group, torch.float64) for width in widths]
        self.n, self.k, self.rule, self.group, self.widths = n, k, rule, group, widths
        self.table = torch.tensor(widths, dtype=torch.int32)
        self.x = torch.randn(1024, k, generator=generator).to("cuda", dtype)
        self.bias = torch.randn(n, generator=generator).to("cuda", dtype)

    def product(self, profiles: torch.Tensor, max_width: int = 8) -> torch.Tensor:
        """Of all rows, the replica's widths being limited as when it has dropped planes."""
        table = self.table.clamp(max=max_width)
        poison = torch.full((8 * len(profiles) * self.n + 1024,), float("nan"), dtype=self.x.dtype, device="cuda")
        del poison
        return self._call(profiles, table, table.cuda(), *self._sorted(profiles), host_decides=True)

    def graph(self, profiles: torch.Tensor) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        """A graph of the product, for rows of any profiles, and where its result will be."""
        arguments = (profiles, self.table, self.table.cuda(), *self._sorted(profiles))
        self._call(*arguments, host_decides=False)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = self._call(*arguments, host_decides=False)
        self._kept = arguments  # a replay reads them
        return graph, result

    def drop(self, planes: int) -> None:
        """Let the memory of all but the first ``planes`` go."""
        for memory in self.memories[planes - 1 :]:
            memory.drop()

    def restore(self, planes: int) -> None:
        """Bring it back, with what was in it."""
        for index in range(planes, len(self.planes)):
            self.memories[index - 1].restore()
            self.planes[index].copy_(self.resident.planes[index])

    def _sorted(self, profiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.argsort(profiles, stable=True).int(), torch.bincount(profiles.cpu(), minlength=len(self.widths)).int()

    def _call(
        self, profiles: torch.Tensor, host_table: torch.Tensor, table: torch.Tensor, order: torch.Tensor, counts: torch.Tensor,
        host_decides: bool,
    ) -> torch.Tensor:  # fmt: skip
        return sliced_linear(
            self.x[: len(profiles)], self.planes, self.resident.scales, self.n, profiles, table, order, counts, host_table,
            self.resident.locks, self.widths, self.group, self.rule, self.bias, host_decides,
        )  # fmt: skip

    def expected(self, profiles: torch.Tensor) -> torch.Tensor:
        x = self.x[: len(profiles)].double()
        result = torch.empty(len(profiles), self.n, dtype=torch.float64, device="cuda")
        for index, weight in enumerate(self.weights):
            rows = (profiles == index).nonzero()[:, 0]
            result[rows] = x[rows] @ weight.T + self.bias.double()
        return result


def main(rule: str, group: str, dtype: str, widths: str, rows: str, shapes: str) -> dict[str, float]:
    held = tuple(map(int, widths.split(",")))
    found = {}
    for shape in shapes.split(","):
        n, k = map(int, shape.split("x"))
        layer = Layer(n, k, rule, int(group), getattr(torch, dtype), held)  # type: ignore[arg-type]
        for m in map(int, rows.split(",")):
            mixed = torch.arange(m, dtype=torch.int32, device="cuda") % len(held)
            kinds = {str(width): torch.full_like(mixed, index) for index, width in enumerate(held)}
            if len(held) > 1 and m > 1:
                kinds["mixed"] = mixed
            for name, profiles in kinds.items():
                y = layer.product(profiles)
                expected = layer.expected(profiles)
                errors = (y.double() - expected).norm(dim=1) / expected.norm(dim=1)
                found[f"{n}x{k} M {m} {name}"] = errors.nan_to_num(torch.inf).max().item()
                graph, result = layer.graph(profiles)
                graph.replay()
                captured = result.clone()
                widest = held[int(profiles.max())]
                read = num_planes(bits_needed(widest, rule))
                layer.drop(read)
                assert torch.equal(layer.product(profiles, widest), y), (shape, m, name, "planes dropped")
                graph.replay()
                assert torch.equal(result, captured), (shape, m, name, "planes dropped, in a graph")
                layer.restore(read)
                assert not layer.resident.locks.any(), (shape, m, name, "locks")
    return found


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
