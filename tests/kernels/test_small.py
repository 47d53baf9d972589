"""kernels.small: compiled for Hopper by the installed Triton wherever it is; run and compared with float64 on such a GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from matgptq_vllm.kernels.small_config import ROW_ROOMS
from matgptq_vllm.kernels.wide_config import CAPABILITY_MAJOR

COMPILE = """
import json, sys, triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from matgptq_vllm.kernels import small
from matgptq_vllm.kernels.digits_ptx import SmallCode

POINTERS = {**{f"plane{index}": "*i32" for index in range(5)}}

def compiled(widths, group, rows, tiles, shares, share, split, dtype, scales, rule="curved", even=True, bias=True):
    x = "*" + dtype
    signature = dict(
        x_ptr=x, **POINTERS, scales="*" + scales, bias=x, y_ptr=x, workspace="*fp32", locks="*i32", token_profiles="*i32",
        profile_widths="*i32", m="i32", n="i32", n_padded="i32", k="i32", units_k="i32", stride_x="i32",
    )
    constants = dict(
        WIDTHS=widths, RULE=rule, GROUP=group, HAS_BIAS=bias, SPLIT=split, ROWS=rows, TILES=tiles, SHARES=shares, SHARE=share,
        EVEN=even, DEPTHS=tuple(2 if width < 6 else 1 for width in widths), TURNS=3, PDL=True,
        CODE=SmallCode("bf16" if dtype == "bf16" else "f16"),
    )
    aligned = {(place,): [["tt.divisibility", 16]] for place, name in enumerate(signature) if name not in ("m", "units_k")}
    source = GluonASTSource(small._small_kernel, {**signature, **{name: "constexpr" for name in constants}}, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": tiles * shares})

found = {}
for case in (
    ((2, 8), 128, 1, 2, 4, 32, 1, "bf16", "bf16"),
    ((4,), 64, 1, 1, 8, 32, 1, "bf16", "bf16"),
    ((3,), 64, 4, 8, 1, 16, 2, "bf16", "bf16"),
    ((8,), 128, 8, 8, 1, 8, 4, "bf16", "bf16"),
    ((2, 3, 4), 128, 16, 8, 1, 8, 4, "bf16", "bf16"),
    ((2, 3, 8), 32, 4, 2, 4, 7, 1, "fp16", "fp32", "nested", False),
    ((2, 4), -1, 8, 4, 2, 8, 2, "bf16", "fp32", "round", True, False),
    ((6,), 128, 32, 8, 1, 4, 8, "bf16", "bf16"),
):
    kernel = compiled(*case)
    ptx = kernel.asm["ptx"]
    found[str(case)] = [ptx.count(".s32.s8.s8.s32"), ptx.count("mma.sync.aligned.m16n8k16"), kernel.metadata.shared]
json.dump(found, open(sys.argv[1], "w"))
"""

RUN = """
import json, sys, torch
from matgptq_vllm.core.planes import PlaneLayout
from matgptq_vllm.core.slicing import dequantize, num_groups
from matgptq_vllm.kernels.resident import to_resident
from matgptq_vllm.kernels.small import small_gemm
from matgptq_vllm.kernels.small_config import SmallConfig, small_config

LAYOUT, WIDTHS, found = PlaneLayout(), (2, 3, 4, 6, 8), {}
table = torch.tensor(WIDTHS, dtype=torch.int32, device="cuda")
cases = [
    ("curved", (192, 1024, 128, torch.bfloat16, SmallConfig(1, 2, 4, 2, 5, 96))),
    ("curved", (192, 1024, 128, torch.bfloat16, SmallConfig(16, 4, 2, 2, 2, 128))),
    ("nested", (130, 648, 32, torch.float16, SmallConfig(8, 2, 4, 3, 6))),
    ("round", (72, 2048, -1, torch.bfloat16, SmallConfig(4, 2, 2, 2, 4))),
    ("curved", (1536, 1024, 128, torch.float16, SmallConfig(16, 8, 1, 8, 3))),
    ("nested", (1536, 1024, 128, torch.bfloat16, SmallConfig(8, 4, 2, 4, 5))),
]
rows = int(sys.argv[2])
cases = [case for case in cases if case[1][4].rows == rows]
for n, k in ((256, 896), (130, 4864), (4096, 4096), (192, 13696)):
    cases.append(("curved" if rows < 8 else "nested", (n, k, 64, torch.bfloat16, small_config(rows, n, k, 132))))


def check(y, x, weight, bias, case):
    expected = x.double() @ weight.T + bias.double()
    found[case] = ((y.double() - expected).norm(dim=1) / expected.norm(dim=1)).max().item()


for rule, (n, k, group, dtype, config) in cases:
    generator = torch.Generator().manual_seed(n)
    codes = torch.randint(0, 256, (n, k), dtype=torch.uint8, generator=generator).cuda()
    scales = (torch.rand(n, num_groups(k, group), generator=generator) * 0.02 + 0.001).bfloat16().cuda()
    layer = to_resident(LAYOUT.split(codes), scales, LAYOUT, k, group)
    weights = [dequantize(codes, scales, width, rule, group, torch.float64) for width in WIDTHS]
    for m in sorted({1, max(config.rows - 1, 1), config.rows}):
        x = torch.randn(m, k, generator=generator).to("cuda", dtype)
        bias = torch.randn(n, generator=generator).to("cuda", dtype)
        alone = {}
        for name in (*range(5), "mixed"):
            profiles = torch.arange(m, device="cuda", dtype=torch.int32) % 5
            if name != "mixed":
                profiles = torch.full_like(profiles, name)
            y = small_gemm(x, layer.planes, layer.scales, n, profiles, table, WIDTHS, group, rule, config, layer.locks, bias)
            if name != "mixed":
                check(y, x, weights[name], bias, f"{rule} {n} {k} {config} {m} {name}")
            assert not layer.locks.any()
            alone[name] = y
        for row in range(m):
            assert torch.equal(alone["mixed"][row], alone[row % 5][row]), (rule, n, k, config, m, row)
        # One more kernel to compile for each layer: in a replica of one width.
        own = (n + config.rows) % 5
        profiles = torch.zeros(m, device="cuda", dtype=torch.int32)
        given = (profiles, table[own:], WIDTHS[own : own + 1], group, rule, config, layer.locks, bias)
        y = small_gemm(x, layer.planes, layer.scales, n, *given)
        check(y, x, weights[own], bias, f"{rule} {n} {k} {config} {m} {WIDTHS[own]} alone")
json.dump(found, open(sys.argv[1], "w"))
"""

ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == CAPABILITY_MAJOR


def test_it_compiles_to_products_of_bytes_and_of_numbers_and_fits_into_shared_memory(tmp_path: Path) -> None:
    path = f"{tmp_path}/found.json"
    subprocess.run([sys.executable, "-c", COMPILE, path], check=True, timeout=300)
    with open(path) as file:
        found = json.load(file)
    assert len(found) == 8
    for case, (of_bytes, of_numbers, shared) in found.items():
        assert of_bytes >= (0 if case.startswith(("((6,)", "((8,)")) else 8)
        assert of_numbers >= (0 if case.startswith(("((3,)", "((4,)")) else 8)
        assert shared <= 114 << 10


@pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU: that is what it is tuned for")
@pytest.mark.parametrize("rows", ROW_ROOMS)
def test_every_row_is_within_a_hundredth_of_float64_and_does_not_depend_on_the_others(rows: int, tmp_path: Path) -> None:
    path = f"{tmp_path}/found.json"
    subprocess.run([sys.executable, "-c", RUN, path, str(rows)], check=True, timeout=900)
    with open(path) as file:
        found = json.load(file)
    assert {case: error for case, error in found.items() if not error < 1e-2} == {}
