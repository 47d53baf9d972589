"""Read the table of contents of a safetensors file, to say which tensor a damaged file lost.

Layout: 8 bytes little-endian header size, JSON header {name: {dtype, shape, data_offsets}}, data.
"""

import json
from pathlib import Path

from matgptq_vllm.core.errors import FormatError


def check_complete(path: Path) -> None:
    """Raise FormatError, naming the file and the first tensor cut off, unless ``path`` is a whole safetensors file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header_size = int.from_bytes(file.read(8), "little")
            header = file.read(header_size) if 8 + header_size <= size else b""
    except OSError as error:
        raise FormatError(
            f"{path.name}: cannot be read ({error.strerror}); the parent at {path.parent} is incomplete"
        ) from error
    if not header:
        raise FormatError(f"{path.name}: the file is cut off inside its header; copy it again")
    try:
        entries = {name: int(entry["data_offsets"][1]) for name, entry in json.loads(header).items() if name != "__metadata__"}
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise FormatError(f"{path.name}: not a safetensors file; copy it again") from error
    start = 8 + header_size
    for name, end in sorted(entries.items(), key=lambda item: item[1]):
        if start + end > size:
            raise FormatError(
                f"{path.name}: the file is cut off, tensor {name!r} ends at byte {start + end} of {size}; copy the file again"
            )
