"""kernels.wide: compiled for Hopper by the installed Triton wherever it is; run and compared with float64 on such a GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from matgptq_vllm.kernels.wide_config import CAPABILITY_MAJOR

COMPILE = """
import json, subprocess, sys, triton
from triton.backends.nvidia.compiler import get_ptxas
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from matgptq_vllm.kernels import wide
from matgptq_vllm.kernels.wide_config import REGISTERS, WAYS
from matgptq_vllm.kernels.wide_ptx import WideCode

POINTERS = {"token_profiles": "*i32", "profile_widths": "*i32", **{f"plane{index}": "*i32" for index in range(5)}}

def compiled(widths, group, block_m, tiles, split, dtype, scales, rule="curved", bias=True, stream=False):
    y, block = "*" + dtype, [block_m, 64]
    config = next(way.config for way in WAYS[block_m] if way.config.tiles == tiles)
    layout = gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16 if dtype == "bf16" else gl.float16)
    signature = dict(
        x_desc=f"tensordesc<{dtype}{block},{layout!r}>", **POINTERS, scales="*" + scales, bias=y, y_ptr=y, workspace="*fp32",
        locks="*i32", places="*i32", m="i32", n="i32", units_n="i32", units_k="i32", rows="i32",
    )
    constants = dict(
        WIDTHS=widths, RULE=rule, GROUP=group, HAS_BIAS=bias, SPLIT=split, STREAM=stream, ROWS=256, BLOCK_M=block_m,
        TILES=tiles, STAGES=config.stages, HALVES=config.halves, REGISTERS=REGISTERS, PDL=True,
        CODE=WideCode("bf16" if dtype == "bf16" else "f16"),
    )
    unknown = ("x_desc", "m", "units_n", "units_k", "rows")
    aligned = {(place,): [["tt.divisibility", 16]] for place, name in enumerate(signature) if name not in unknown}
    source = GluonASTSource(wide._wide_kernel, {**signature, **{name: "constexpr" for name in constants}}, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})

found = {}
for case in (
    ((2, 3, 4, 6, 8), 128, 128, 2, 2, "bf16", "bf16"),
    ((8,), -1, 256, 1, 1, "bf16", "fp32", "round", False),
    ((2, 4), 32, 32, 1, 1, "fp16", "fp32"),
    ((3,), 64, 64, 2, 1, "bf16", "bf16", "nested"),
    ((4,), 128, 128, 2, 1, "bf16", "bf16", "curved", False, True),
):
    kernel = compiled(*case)
    ptx = kernel.asm["ptx"]
    with open(sys.argv[1] + ".ptx", "w") as file:
        file.write(ptx)
    command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", sys.argv[1] + ".ptx", "-o", sys.argv[1] + ".cubin"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    found[str(case)] = [ptx.count("wgmma.mma_async"), kernel.metadata.shared, "serialized" in said]
json.dump(found, open(sys.argv[1], "w"))
"""

RUN = """
import json, sys, torch
from dataclasses import replace
from matgptq_vllm.core.planes import PlaneLayout
from matgptq_vllm.core.slicing import dequantize, num_groups
from matgptq_vllm.kernels.arrange import arrange, as_it_is
from matgptq_vllm.kernels.resident import to_resident
from matgptq_vllm.kernels.wide import wide_gemm
from matgptq_vllm.kernels.wide_config import wide_config

LAYOUT, WIDTHS, found = PlaneLayout(), (2, 3, 4, 6, 8), {}
table = torch.tensor(WIDTHS, dtype=torch.int32, device="cuda")
rule, n, k, group, dtype, rows, split = json.loads(sys.argv[1])
dtype, config = getattr(torch, dtype), replace(wide_config(rows, n, k, 132, False), split_k=split)
generator = torch.Generator().manual_seed(n)
codes = torch.randint(0, 256, (n, k), dtype=torch.uint8, generator=generator).cuda()
scales = (torch.rand(n, num_groups(k, group), generator=generator) * 0.02 + 0.001).bfloat16().cuda()
layer = to_resident(LAYOUT.split(codes), scales, LAYOUT, k, group)
for m in (1, 33, 100, 257, 700):
    x = torch.randn(m, k, generator=generator).to("cuda", dtype)
    bias = torch.randn(n, generator=generator).to("cuda", dtype)
    mixed = torch.arange(m, device="cuda", dtype=torch.int32) % 5
    for name, profiles in (("mixed", mixed), ("4", torch.full_like(mixed, 2))):
        y = torch.full((m, n), float("nan"), dtype=dtype, device="cuda")
        arranged = arrange(x, profiles, table, WIDTHS, config.block_m, config.pdl)
        wide_gemm(
            arranged, y, layer.planes, layer.scales, profiles, table, WIDTHS, group, rule, config, layer.locks, bias
        )
        expected = torch.stack([
            x[row].double() @ dequantize(codes, scales, WIDTHS[profile], rule, group, torch.float64).T + bias.double()
            for row, profile in enumerate(profiles.tolist())
        ])
        assert not layer.locks.any()
        found[f"{m} {name}"] = ((y.double() - expected).norm(dim=1) / expected.norm(dim=1)).max().item()
    # In a replica of one width, the last one asked for; its rows are read where they are.
    alone, own = torch.zeros_like(mixed), torch.full_like(y, float("nan"))
    where = as_it_is(x, config.block_m)
    for programs in (0, 1, 5, 132):
        given = (alone, table[2:], (4,), group, rule, replace(config, programs=programs), layer.locks, bias)
        wide_gemm(where, own.fill_(float("nan")), layer.planes, layer.scales, *given)
        assert not layer.locks.any()
        found[f"{m} alone {programs}"] = ((own.double() - expected).norm(dim=1) / expected.norm(dim=1)).max().item()
print(json.dumps(found))
"""

ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == CAPABILITY_MAJOR


def test_it_compiles_to_asynchronous_products_and_fits_into_shared_memory(tmp_path: Path) -> None:
    path = f"{tmp_path}/found.json"
    subprocess.run([sys.executable, "-c", COMPILE, path], check=True, timeout=300)
    with open(path) as file:
        found = json.load(file)
    assert len(found) == 5
    for products, shared, serialized in found.values():
        assert products >= 8
        assert shared <= 227 << 10
        # Where registers are short, every product waits for the one before it.
        assert not serialized


@pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU: wgmma runs nowhere else")
@pytest.mark.parametrize(
    ("rule", "n", "k", "group", "dtype", "rows", "split"),
    [
        ("curved", 192, 1024, 128, "bfloat16", 64, 2),
        ("nested", 130, 648, 32, "float16", 32, 3),
        ("round", 72, 2048, -1, "bfloat16", 256, 1),
        ("curved", 4096, 1024, 64, "bfloat16", 256, 4),
        ("curved", 256, 896, 64, "bfloat16", 128, 1),
        ("curved", 4096, 1024, 128, "float16", 128, 8),
    ],
)
def test_every_row_is_within_a_hundredth_of_float64(
    rule: str, n: int, k: int, group: int, dtype: str, rows: int, split: int
) -> None:
    command = [sys.executable, "-c", RUN, json.dumps([rule, n, k, group, dtype, rows, split])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 30
    assert {case: error for case, error in found.items() if not error < 1e-2} == {}
