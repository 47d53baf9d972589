"""Read the table of contents of a safetensors file, to say which tensor a damaged file lost.

Layout: 8 bytes little-endian header size, JSON header {name: {dtype, shape, data_offsets}}, data.
"""

import json
from pathlib import Path

from matgptq_vllm.core.errors import FormatError


def check_complete(directory: Path, name: str) -> None:
    """Raise FormatError, naming the file and the first tensor cut off, unless the file is whole.

    Args:
        directory: the parent.
        name: path of a safetensors file within the parent.
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
        entries = {key: int(entry["data_offsets"][1]) for key, entry in json.loads(header).items() if key != "__metadata__"}
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise FormatError(f"{name}: not a safetensors file; copy it again") from error
    start = 8 + header_size
    for tensor, end in sorted(entries.items(), key=lambda item: item[1]):
        if start + end > size:
            raise FormatError(
                f"{name}: the file is cut off, tensor {tensor!r} ends at byte {start + end} of {size}; copy the file again"
            )
