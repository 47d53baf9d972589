"""Read the table of contents of a safetensors file: what it holds, and which tensor a damaged file lost.

Layout: 8 bytes little-endian header size, JSON header {name: {dtype, shape, data_offsets}}, data.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from matgptq_vllm.core.errors import FormatError


@dataclass(frozen=True)
class Entry:
    """One tensor of a file."""

    shape: tuple[int, ...]

    start: int
    """First byte, counted from the end of the header."""

    end: int
    """Byte after the last."""

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def read_header(directory: Path, name: str) -> dict[str, Entry]:
    """The tensors of a safetensors file of which only the header is read.

    Args:
        directory: the parent.
        name: path of the file within the parent.

    Raises:
        FormatError: naming the file, and the first tensor cut off if the file is not whole.
    """
    path = directory / name
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header_size = int.from_bytes(file.read(8), "little")
            header = file.read(header_size) if 8 + header_size <= size else b""
    except OSError as error:
        raise FormatError(f"{name}: cannot be read ({error.strerror}); the parent at {directory} is incomplete") from error
    if not header:
        raise FormatError(f"{name}: the file is cut off inside its header; copy it again")
    try:
        entries = {
            key: Entry(tuple(map(int, entry["shape"])), *map(int, entry["data_offsets"]))
            for key, entry in json.loads(header).items()
            if key != "__metadata__"
        }
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise FormatError(f"{name}: not a safetensors file; copy it again") from error
    start = 8 + header_size
    for tensor, entry in sorted(entries.items(), key=lambda item: item[1].end):
        if start + entry.end > size:
            end = start + entry.end
            raise FormatError(
                f"{name}: the file is cut off, tensor {tensor!r} ends at byte {end} of {size}; copy the file again"
            )
    return entries
