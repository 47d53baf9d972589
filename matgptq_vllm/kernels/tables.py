"""Tables of configurations: which kernels.config.Config a GPU runs fastest, as JSON files, one per GPU.

    {"format": 2, "gpu": "NVIDIA H200",
     "configs": {"4096x14336": {"128": {"several": {"16": {"block_m": 16, "block_n": 32, ...}}}}},
     "dense_from": {"4096x14336": 384}}

The keys of ``configs`` are NxK, group size, class of widths (``widths_class``) and range of M (``bucket``). Fields of a
configuration that have a default may be left out. ``dense_from`` is the M from which kernels.dense is faster.

Imports no torch: the command line needs this file's names.
"""

import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from matgptq_vllm.core.errors import FormatError
from matgptq_vllm.core.parent import GROUP_SIZES
from matgptq_vllm.core.precision import WIDTHS
from matgptq_vllm.kernels.config import Config

FORMAT = 2
"""Raised whenever configurations get other fields: those of one kernel say nothing about the next."""

SMALLEST_BUCKET = 8
SEVERAL = "several"
WIDTHS_CLASSES = (SEVERAL, *map(str, WIDTHS))

SHIPPED = Path(__file__).parent / "tables"
DIRECTORY_VARIABLE = "MATGPTQ_TUNING_DIR"

_ALLOWED: dict[str, tuple[Any, ...]] = {
    "block_m": (8, 16, 32),
    "block_n": (16, 32, 64),
    "num_warps": (1, 2, 4, 8, 16),
    "depth": (1, 2, 3, 4),
    "split_k": tuple(range(1, 65)),
    "max_registers": (None, *range(32, 256, 8)),
    "pdl": (False, True),
}


class Key(NamedTuple):
    """What a configuration was measured for."""

    n: int
    k: int
    group_size: int
    widths: str
    """A class of widths."""
    bucket: int


@dataclass(frozen=True)
class Table:
    """What is known of a GPU."""

    configs: dict[Key, Config] = field(default_factory=dict)
    dense_from: dict[tuple[int, int], int] = field(default_factory=dict)
    """(N, K) -> M."""

    def updated(self, other: "Table") -> "Table":
        """Both tables; where both know something, ``other`` wins."""
        return Table({**self.configs, **other.configs}, {**self.dense_from, **other.dense_from})


def bucket(m: int) -> int:
    """The range that M lies in, named by its largest: 1..8, 9..16, 17..32, doubling without end."""
    return max(SMALLEST_BUCKET, 1 << (m - 1).bit_length())


def widths_class(widths: Sequence[int]) -> str:
    """The width if it is the only one that rows may have; "several" otherwise, where it is looked up on the device."""
    return str(widths[0]) if len(widths) == 1 else SEVERAL


def file_name(gpu: str) -> str:
    """Name of the table of the GPU that the driver calls ``gpu``."""
    return re.sub(r"[^a-z0-9]+", "_", gpu.lower()).strip("_") + ".json"


def user_directory(environment: Mapping[str, str] = os.environ) -> Path:
    """Where tables of this machine's user lie; they win over shipped ones."""
    if given := environment.get(DIRECTORY_VARIABLE):
        return Path(given)
    cache = environment.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "matgptq" / "tuning"


def load(gpu: str, directories: Sequence[Path]) -> Table:
    """What the tables of a GPU in ``directories`` say together; of two that know the same, the later wins.

    Raises:
        FormatError: a table is damaged.
    """
    table = Table()
    for directory in directories:
        path = directory / file_name(gpu)
        if path.is_file():
            table = table.updated(read(path))
    return table


def read(path: Path) -> Table:
    """The table in a file; FormatError names the file, and the entry if it is one."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(path, f"cannot be read as JSON ({error})") from error
    given = document.get("format") if isinstance(document, dict) else None
    if given != FORMAT:
        raise _damaged(path, f"has format {given!r}; this release reads {FORMAT}")
    table = Table()
    for shape, groups in _items(path, document.get("configs", {}), "configs"):
        n, k = _shape(path, shape, f"configs / {shape}")
        for group, classes in _items(path, groups, shape):
            for widths, buckets in _items(path, classes, f"{shape} / {group}"):
                for name, values in _items(path, buckets, f"{shape} / {group} / {widths}"):
                    where = f"{shape} / {group} / {widths} / {name}"
                    group_size, at_most = _whole(path, group, where), _whole(path, name, where)
                    if group_size not in GROUP_SIZES:
                        raise _damaged(path, f"{where}: group size {group} is not one of {GROUP_SIZES}")
                    if widths not in WIDTHS_CLASSES:
                        raise _damaged(path, f"{where}: widths {widths!r} are not one of {', '.join(WIDTHS_CLASSES)}")
                    if at_most < 1 or bucket(at_most) != at_most:
                        raise _damaged(path, f"{where}: {name} names no range of M; those are 8, 16, 32 and so on, doubling")
                    table.configs[Key(n, k, group_size, widths, at_most)] = _config(path, values, where)
    for shape, m in _items(path, document.get("dense_from", {}), "dense_from"):
        where = f"dense_from / {shape}"
        if type(m) is not int or m < 1:
            raise _damaged(path, f"{where}: {m!r} is not a number of rows, 1 or more")
        table.dense_from[_shape(path, shape, where)] = m
    return table


def write(path: Path, table: Table, gpu: str) -> None:
    """Write a table so that other processes see the old one or the new one, never a part."""
    configs: dict[str, Any] = {}
    for key, config in sorted(table.configs.items()):
        at = configs.setdefault(f"{key.n}x{key.k}", {}).setdefault(str(key.group_size), {}).setdefault(key.widths, {})
        at[str(key.bucket)] = asdict(config)
    dense_from = {f"{n}x{k}": m for (n, k), m in sorted(table.dense_from.items())}
    document = {"format": FORMAT, "gpu": gpu, "configs": configs, "dense_from": dense_from}
    # A configuration per line.
    text = re.sub(r"\{[^{}]*\"block_m\"[^{}]*\}", lambda found: re.sub(r"\s+", " ", found[0]), json.dumps(document, indent=1))
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text + "\n")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _config(path: Path, values: Any, where: str) -> Config:
    if not isinstance(values, dict):
        raise _damaged(path, f"{where}: {values!r} is not a configuration")
    known = {spec.name for spec in fields(Config)}
    required = {spec.name for spec in fields(Config) if spec.default is MISSING}
    if not required <= values.keys() <= known:
        wrong = sorted((required - values.keys()) | (values.keys() - known))
        raise _damaged(path, f"{where}: fields {wrong} are missing or unknown")
    for name, value in values.items():
        # By type too: JSON's 16.0 and true equal 16 and 1.
        if not any(type(value) is type(choice) and value == choice for choice in _ALLOWED[name]):
            raise _damaged(path, f"{where}: {name} {value!r} is not supported; it may be {_listed(_ALLOWED[name])}")
    return Config(**values)


def _items(path: Path, value: Any, where: str) -> list[tuple[str, Any]]:
    if not isinstance(value, dict):
        raise _damaged(path, f"{where}: {value!r} is not an object")
    return list(value.items())


def _shape(path: Path, text: str, where: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not found:
        raise _damaged(path, f"{where}: {text!r} is not a shape; it is written NxK, as 4096x14336")
    return int(found[1]), int(found[2])


def _whole(path: Path, text: str, where: str) -> int:
    if not re.fullmatch(r"-?\d+", text):
        raise _damaged(path, f"{where}: {text!r} is not a whole number")
    return int(text)


def _listed(values: tuple[Any, ...]) -> str:
    shown = [json.dumps(value) for value in values]
    return ", ".join(shown) if len(shown) <= 8 else f"{shown[0]}, {shown[1]}, ..., {shown[-1]}"


def _damaged(path: Path, what: str) -> FormatError:
    return FormatError(f"{path}: {what}; delete the file, or mend it, and run `matgptq tune` to measure this GPU again")
