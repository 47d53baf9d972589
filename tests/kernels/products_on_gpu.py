"""Products through ``dispatch.sliced_linear`` on a GPU against float64.

    python tests/kernels/products_on_gpu.py RULE GROUP DTYPE WIDTHS ROWS SHAPES

WIDTHS are those that the replica holds, such as 2,4,8; ROWS such as 1,16,257; SHAPES such as 4096x896,130x4864. For every
shape and number of rows: all rows at each width, and mixed ones. Memory that results may be placed in is filled with NaN first.
Then planes that no row reads are at addresses without memory, as those that a replica has dropped: results must keep every bit,
and a read there would end the process. Prints, as JSON, the largest relative error of a row for every case.
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
        held = num_planes(bits_needed(widths[-1], rule))
        self.resident = Resident(whole.planes[:held], whole.scales, whole.locks)
        self.weights = [dequantize(codes, scales, width, rule, group, torch.float64) for width in widths]
        self.n, self.k, self.rule, self.group, self.widths = n, k, rule, group, widths
        self.table = torch.tensor(widths, dtype=torch.int32)
        self.x = torch.randn(1024, k, generator=generator).to("cuda", dtype)
        self.bias = torch.randn(n, generator=generator).to("cuda", dtype)

    def product(self, profiles: torch.Tensor, planes: list[torch.Tensor]) -> torch.Tensor:
        m = len(profiles)
        counts = torch.bincount(profiles.cpu(), minlength=len(self.widths)).int()
        order = torch.argsort(profiles, stable=True).int()
        poison = torch.full((8 * m * self.n + 1024,), float("nan"), dtype=self.x.dtype, device="cuda")
        del poison
        return sliced_linear(
            self.x[:m], planes, self.resident.scales, self.n, profiles, self.table.cuda(), order, counts, self.table,
            self.resident.locks, self.widths, self.group, self.rule, self.bias, True,
        )  # fmt: skip

    def expected(self, profiles: torch.Tensor) -> torch.Tensor:
        x = self.x[: len(profiles)].double()
        result = torch.empty(len(profiles), self.n, dtype=torch.float64, device="cuda")
        for index, weight in enumerate(self.weights):
            rows = (profiles == index).nonzero()[:, 0]
            result[rows] = x[rows] @ weight.T + self.bias.double()
        return result


def without_memory(plane: torch.Tensor) -> torch.Tensor:
    """A tensor like ``plane`` at an address that has no memory."""
    memory = CudaMemory(plane.device, plane.nbytes)
    tensor = memory.allocate(plane.nbytes).view(plane.dtype).view(plane.shape)
    memory.drop()
    return tensor


def main(rule: str, group: str, dtype: str, widths: str, rows: str, shapes: str) -> dict[str, float]:
    held = tuple(map(int, widths.split(",")))
    found = {}
    for shape in shapes.split(","):
        n, k = map(int, shape.split("x"))
        layer = Layer(n, k, rule, int(group), getattr(torch, dtype), held)  # type: ignore[arg-type]
        planes = list(layer.resident.planes)
        missing = [without_memory(plane) for plane in planes]
        for m in map(int, rows.split(",")):
            mixed = torch.arange(m, dtype=torch.int32, device="cuda") % len(held)
            kinds = {str(width): torch.full_like(mixed, index) for index, width in enumerate(held)}
            if len(held) > 1 and m > 1:
                kinds["mixed"] = mixed
            for name, profiles in kinds.items():
                y = layer.product(profiles, planes)
                expected = layer.expected(profiles)
                errors = (y.double() - expected).norm(dim=1) / expected.norm(dim=1)
                found[f"{n}x{k} M {m} {name}"] = errors.nan_to_num(torch.inf).max().item()
                read = num_planes(bits_needed(held[int(profiles.max())], rule))
                again = layer.product(profiles, [*planes[:read], *missing[read:]])
                assert torch.equal(again, y), (shape, m, name, "other planes")
                assert not layer.resident.locks.any(), (shape, m, name, "locks")
    return found


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
