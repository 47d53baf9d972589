"""Which configuration a product runs with: from tables of measurements (kernels.tables), else by rule.

Tables are looked for in ``kernels/tables`` and in the user's directory, which ``matgptq tune`` writes; entries of the latter
win. What no table holds exactly is taken from the nearest that one does: first by range of M, then class of widths, then
shape, then group size. The share of K per program is then adapted, so that as many programs run per multiprocessor as did
for the known shape; but where tiles are many, K is not split further for that.

A row's bits depend on the configuration, because it decides the order of sums. The configuration depends on the range of M
(``kernels.tables.bucket``), the layer, the replica's widths and the GPU, on nothing else: within a range, a row gives the
same bits whatever else is in the batch, and from run to run as long as the tables stay.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import log

import torch

from matgptq_vllm.core.slicing import SliceRule
from matgptq_vllm.kernels import tables
from matgptq_vllm.kernels.capability import MIN_CAPABILITY, check_capability
from matgptq_vllm.kernels.config import MAX_BLOCK_M, MAX_SPLIT_ROWS, MIN_BLOCK_M, MIN_BLOCK_N, Config
from matgptq_vllm.kernels.layout import PAD_N, UNIT_K, padded
from matgptq_vllm.kernels.tables import SEVERAL, Key, Table

DENSE_FROM = 512
"""M from which the dense path is taken where no table knows better."""

OVERLAP_CAPABILITY = (9, 0)
"""First with programmatic dependent launch."""

ENOUGH_TILES = 3
"""Per multiprocessor: with as many, neither more warps nor a split K makes a product faster."""

RESERVED_BYTES = 1 << 10
"""Of a multiprocessor's shared memory, what CUDA takes for every program; one program may have all the rest."""

REGISTERS = 1 << 16
"""Of a multiprocessor, and so of a program at most."""


@dataclass(frozen=True)
class Hardware:
    """What the choice depends on."""

    name: str
    """As the driver gives it; it names the table."""
    num_sms: int
    shared_bytes: int
    """Of shared memory that one program may have."""
    capability: tuple[int, int]


@dataclass(frozen=True)
class Problem:
    """A product, as far as the choice depends on it."""

    bucket: int
    """Range of M (kernels.tables.bucket)."""
    n: int
    k: int
    widths: tuple[int, ...]
    group_size: int
    rule: SliceRule = "curved"

    @property
    def key(self) -> Key:
        return Key(self.n, self.k, self.group_size, tables.widths_class(self.widths), self.bucket)

    @property
    def units(self) -> int:
        """Units of K."""
        return padded(self.k, UNIT_K) // UNIT_K

    def tiles(self, config: Config) -> int:
        """Programs before K is split."""
        return -(-self.bucket // config.block_m) * (padded(self.n, PAD_N) // config.block_n)


def choose(
    m: int, n: int, k: int, widths: Sequence[int], group_size: int, device: torch.device, rule: SliceRule = "curved"
) -> Config:
    """The configuration for ``m`` rows. Cheap after the first call per range of M: no GPU call, no file.

    Args:
        widths: every width that a row may have, ascending.

    Raises:
        FormatError: a table of this GPU is damaged.
        UnsupportedError: the GPU is too old.
    """
    return _choose(Problem(tables.bucket(m), n, k, tuple(widths), group_size, rule), device)


@lru_cache(maxsize=1024)
def dense_from(n: int, k: int, device: torch.device) -> int:
    """M from which kernels.dense is faster than the fused product; that of the nearest shape in the tables, or 512."""
    known = table_of(hardware_of(device).name).dense_from
    return known[min(known, key=lambda shape: _far(shape, (n, k)))] if known else DENSE_FROM


@lru_cache(maxsize=16384)
def _choose(problem: Problem, device: torch.device) -> Config:
    hardware = hardware_of(device)
    return pick(problem, hardware, table_of(hardware.name))


def pick(problem: Problem, hardware: Hardware, table: Table) -> Config:
    """The configuration by ``table``, or by rule if that is empty; within the limits either way."""
    wanted = problem.key
    if wanted in table.configs:
        return fitted(table.configs[wanted], problem, hardware)
    if not table.configs:
        return default(problem, hardware)
    nearest = min(table.configs, key=lambda key: _distance(key, wanted))
    config = table.configs[nearest]
    known, tiles = replace(problem, bucket=nearest.bucket, n=nearest.n, k=nearest.k), problem.tiles(config)
    split = max(round(known.tiles(config) * config.split_k / tiles), 1)
    if tiles >= ENOUGH_TILES * hardware.num_sms:
        split = min(split, config.split_k)
    return fitted(replace(config, split_k=split), problem, hardware)


def default(problem: Problem, hardware: Hardware) -> Config:
    """The configuration where nothing was measured: the fewer tiles, the more warps share K."""
    block_m = min(problem.bucket, MAX_BLOCK_M)
    config = Config(block_m, MIN_BLOCK_N if block_m == MIN_BLOCK_M else 2 * MIN_BLOCK_N, num_warps=4, depth=1, pdl=True)
    tiles = problem.tiles(config)
    if tiles < ENOUGH_TILES * hardware.num_sms:
        config = replace(config, num_warps=8, split_k=max(hardware.num_sms // tiles, 1))
    return fitted(config, problem, hardware)


def fitted(config: Config, problem: Problem, hardware: Hardware) -> Config:
    """``config``, or the nearest to it that keeps to the limits of the kernel and the GPU and leaves no warp without work.

    The latter as far as the layer's units of K suffice for the warps.
    """
    warps = config.num_warps
    # Nothing but the warps' sums of a tile, float32, goes through shared memory, and at most all of them at once.
    while warps > 1 and warps * config.block_m * config.block_n * 4 > hardware.shared_bytes:
        warps //= 2
    split = 1 if problem.bucket > MAX_SPLIT_ROWS else max(min(config.split_k, problem.units // warps), 1)
    units_per_warp = -(-problem.units // (split * warps))
    registers = config.max_registers
    return replace(
        config,
        num_warps=warps,
        split_k=split,
        depth=min(config.depth, units_per_warp),
        max_registers=registers if registers is None or registers * 32 * warps <= REGISTERS else None,
        pdl=config.pdl and hardware.capability >= OVERLAP_CAPABILITY,
    )


@lru_cache(maxsize=64)
def hardware_of(device: torch.device) -> Hardware:
    """A device as the choice sees it; UnsupportedError below compute capability 8.0."""
    if device.type != "cuda":
        # Triton's interpreter: anything is right, few programs are quick.
        return Hardware(device.type, num_sms=1, shared_bytes=96 << 10, capability=MIN_CAPABILITY)
    properties = torch.cuda.get_device_properties(device)
    capability = (properties.major, properties.minor)
    check_capability(properties.name, capability)
    shared_bytes = properties.shared_memory_per_multiprocessor - RESERVED_BYTES
    return Hardware(properties.name, properties.multi_processor_count, shared_bytes, capability)


@lru_cache(maxsize=16)
def table_of(gpu: str) -> Table:
    """What shipped and user tables know of a GPU, read once per process."""
    return tables.load(gpu, (tables.SHIPPED, tables.user_directory()))


def _distance(known: Key, wanted: Key) -> tuple[float, ...]:
    return (
        abs(log(known.bucket / wanted.bucket)),
        _class_distance(known.widths, wanted.widths),
        _far((known.n, known.k), (wanted.n, wanted.k)),
        abs(known.group_size - wanted.group_size),
    )


def _class_distance(known: str, wanted: str) -> int:
    if known == wanted:
        return 0
    if wanted == SEVERAL:
        # The widest decides how much is in flight.
        return 1 + 8 - int(known)
    return 8 if known == SEVERAL else abs(int(known) - int(wanted))


def _far(known: tuple[int, int], wanted: tuple[int, int]) -> float:
    """How different two shapes are: N and K by their ratios."""
    return sum(abs(log(a / b)) for a, b in zip(known, wanted, strict=True))
