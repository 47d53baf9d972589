"""kernels.cache_keys: every kernel's key is derived when the product is imported, before any of them is launched."""

import json
import os
import subprocess
import sys

KEYS = """
import json
from matgptq_vllm.kernels import arrange, dense, dispatch, gemm
small, wide = dispatch._for_hopper()
kernels = [dense._expand_kernel, arrange._arrange_kernel, gemm._gemm_kernel, small._small_kernel, wide._wide_kernel]
print(json.dumps([kernel.hash for kernel in kernels]))
"""


def keys(before: str = "") -> list[str | None]:
    """Keys of all kernels in a process of its own, as far as they are derived."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", before + KEYS], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    found: list[str | None] = json.loads(done.stdout)
    return found


def test_keys_are_derived_at_import_and_do_not_depend_on_what_was_imported_before() -> None:
    first = keys()
    assert None not in first
    assert len(set(first)) == len(first)
    assert keys("import matgptq_vllm.kernels.wide, matgptq_vllm.kernels.small\n") == first
