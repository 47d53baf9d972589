"""What kernels in Gluon share: names that releases of Triton change, and launches that overlap."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import tma

# Triton 3.6 has other names than later releases.
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
copy_async = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared
load_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


@gluon.jit
def wait_for_others():
    """Wait for the end of the kernel before this one: of what it may write, nothing is read before, nor written."""
    gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", (), gl.int32, False, 1)


@gluon.jit
def wait_and_let_next_start():
    """As ``wait_for_others``; then let the next kernel start before this one ends (programmatic dependent launch).

    Not before the wait: so no more than two kernels run at once, and whatever the next one reads before it waits itself, the
    step's data and what earlier kernels have left, is there. Kernels of torch.compile rely on that.
    """
    wait_for_others()
    gl.inline_asm_elementwise("griddepcontrol.launch_dependents; // $0", "=r", (), gl.int32, False, 1)
