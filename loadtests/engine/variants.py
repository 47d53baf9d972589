"""What is compared: this project's engine, and stock vLLM with its kernels for packed integers."""

import re
from dataclasses import dataclass

OURS = "ours"
OURS_COMMON = "ours-common-graphs"
"""The same without graphs of their own for batches of one width (``matgptq serve --graph-widths none``)."""


@dataclass(frozen=True)
class Peer:
    """A model of stock vLLM."""

    bits: int
    """Bits per weight of the linear layers."""

    kernel: str | None = None
    """Class of vLLM's kernel for packed integers that must run."""

    disabled: tuple[str, ...] = ()
    """Kernels that vLLM would choose instead."""


PEERS = {
    "bf16": Peer(16),
    "w4-machete": Peer(4, "MacheteLinearKernel"),
    "w4-marlin": Peer(4, "MarlinLinearKernel", ("MacheteLinearKernel", "AllSparkLinearKernel")),
    "w8-machete": Peer(8, "MacheteLinearKernel"),
    "w8-marlin": Peer(8, "MarlinLinearKernel", ("MacheteLinearKernel", "AllSparkLinearKernel")),
}

VARIANTS = (OURS, OURS_COMMON, *PEERS)


def precisions(name: str) -> list[str]:
    """Precisions that requests of a batch have in turn: ["4"] for ``4``, ["4", "8"] for ``mix48``."""
    mixed = re.fullmatch(r"mix([23468])([23468])", name)
    return [mixed[1], mixed[2]] if mixed else [name]
