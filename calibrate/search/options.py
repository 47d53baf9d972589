"""The options of search. Imports no torch: the command line is built from this file."""

# option() returns a dataclass field, which is not shared between instances.
# ruff: noqa: RUF009

from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

from calibrate.option_fields import DEVICES, check_at_least, check_choices, option
from calibrate.search.budget import Budget, parse_bandwidth, parse_budgets, parse_size
from calibrate.search.evolution import Settings, Stage
from matgptq_vllm.core.errors import InputError
from matgptq_vllm.core.precision import AUTO, check_profile_name, uniform_width

DEFAULT_MEMORY = 4 << 30
DTYPES = ("auto", "float32", "bfloat16")


def parse_stages(text: str) -> tuple[Stage, ...]:
    """``"8:5,32:2"`` -> stages of 8 windows with 5 survivors and 32 with 2; InputError unless all are WINDOWS:SURVIVORS."""
    stages = []
    for item in text.split(","):
        windows, _, survivors = item.strip().partition(":")
        try:
            stages.append(Stage(int(windows), int(survivors)))
        except ValueError:
            raise InputError(f"{item!r} in {text!r} is not WINDOWS:SURVIVORS; write for example 8:5,32:2") from None
    return tuple(stages)


@dataclass(frozen=True)
class SearchOptions:
    """Find a profile, a width for every layer, under a budget; it is added to the parent's table."""

    model: Path = option("folder of the parent", parse=Path)
    budget: tuple[Budget, ...] = option(
        "bits per weight on average (3.0), bytes of quantized weights (500MiB, 3.5GB), or predicted time per token of the "
        "quantized layers (2.5ms); several with commas: one profile each",
        parse=parse_budgets,
        metavar="BUDGET[,...]",
    )
    text: Path = option("UTF-8 text to search on; never the text that results are judged on", parse=Path)
    original: Path | None = option(
        "folder of the original model, the judge (default: the one that the parent was calibrated from)",
        None,
        parse=Path,
        metavar="MODEL",
    )
    name: str | None = option("name of the profile (default: mix-BUDGET)", None)
    overwrite: bool = option("replace a stored profile of that name", False)
    restart: bool = option("drop what an unfinished search of this parent has measured", False)
    times: Path | None = option(
        'for a budget of time: JSON file {"NxK": {"width": microseconds}} of every matrix product',
        None,
        parse=Path,
        metavar="FILE",
    )
    bandwidth: Fraction | None = option(
        "for a budget of time without --times: bytes per second at which weights are read, such as 4.0TB/s",
        None,
        parse=parse_bandwidth,
    )
    num_samples: int = option("windows of text to search on", 128, parse=int)
    seq_len: int = option("tokens per window", 256, parse=int)
    generations: int = option("generations of the evolution, at most", 16, parse=int)
    offspring: int = option("children per generation", 16, parse=int)
    selection: tuple[Stage, ...] | None = option(
        "comparisons before the one on all windows (default: a third of the children survive 1/16 of the windows, 2 of them "
        "1/4)",
        None,
        parse=parse_stages,
        metavar="WINDOWS:SURVIVORS,...",
    )
    patience: int = option("generations without progress after which to stop", 4, parse=int)
    sensitivity_samples: int = option(
        "windows on which each layer's sensitivity is measured for the first profiles; 0 leaves that out", 24, parse=int
    )
    seed: int = option("seed of windows and evolution", 0, parse=int)
    held_out: float = option(
        "share of the text, its end, that is not searched on but used to confirm the result; 0 for none", 0.1, parse=float
    )
    held_out_samples: int = option("windows of that part to measure on, at most", 64, parse=int)
    held_out_seq_len: int = option("tokens per window of that part", 512, parse=int)
    memory: int | None = option(
        "bound, each, on kept distributions of the original and on kept weights; it changes speed, not results (default: 4GiB)",
        None,
        parse=parse_size,
        metavar="SIZE",
    )
    device: str = option("where to compute", "auto", choices=DEVICES)
    dtype: str = option("type to compute in; auto is float32 on a CPU and bfloat16 on a GPU", "auto", choices=DTYPES)
    dry_run: bool = option("check everything and print the plan; measure and write nothing", False)
    json: bool = option("print JSON instead of a table", False)

    def __post_init__(self) -> None:
        check_choices(self)
        for name, least in (
            ("num_samples", 1), ("seq_len", 2), ("generations", 0), ("offspring", 1), ("patience", 1),
            ("sensitivity_samples", 0), ("seed", 0), ("held_out_samples", 1), ("held_out_seq_len", 2),
        ):  # fmt: skip
            check_at_least(name, getattr(self, name), least)
        if not 0 <= self.held_out <= 0.9:
            raise InputError(f"held_out is {self.held_out!r}; it must be a share from 0 to 0.9, 0.1 is usual")
        if self.times is not None and self.bandwidth is not None:
            raise InputError("--times and --bandwidth exclude each other; give one")
        given = "--times" if self.times is not None else "--bandwidth"
        if (self.times or self.bandwidth) and all(budget.kind != "time" for budget in self.budget):
            raise InputError(f"{given} is for a budget of time, such as 2.5ms; leave it out")
        if self.name is not None and len(self.budget) > 1:
            raise InputError(f"--name {self.name} names one profile, but {len(self.budget)} budgets are given; leave it out")
        for name in self.names:
            check_profile_name(name)
            if name == AUTO or uniform_width(name) is not None:
                raise InputError(f"a profile found by search cannot be called {name!r}; choose another --name, such as mix-3.0")
        for earlier, later in pairwise(self.stages):
            if later.windows <= earlier.windows or later.survivors > earlier.survivors:
                raise InputError(
                    f"selection: {later.windows}:{later.survivors} after {earlier.windows}:{earlier.survivors}; each "
                    "comparison must be on more windows, with no more survivors"
                )
        for stage in self.stages:
            check_at_least("selection: windows", stage.windows, 1)
            check_at_least("selection: survivors", stage.survivors, 1)
            if stage.windows > self.num_samples:
                raise InputError(f"selection compares on {stage.windows} windows; there are {self.num_samples} (--num-samples)")

    @property
    def names(self) -> tuple[str, ...]:
        """Name of the profile of every budget."""
        return tuple(f"mix-{budget.text}" if self.name is None else self.name for budget in self.budget)

    @property
    def kept_bytes(self) -> int:
        """Bound on kept distributions, and on kept weights."""
        return DEFAULT_MEMORY if self.memory is None else self.memory

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Comparisons before the one on all windows."""
        if self.selection is not None:
            return self.selection
        few, more = max(1, self.num_samples // 16), self.num_samples // 4
        first = Stage(few, max(2, self.offspring // 3))
        return (first, Stage(more, 2)) if more > few else (first,)

    @property
    def settings(self) -> Settings:
        """Settings of the evolution."""
        return Settings(self.generations, self.offspring, self.stages, self.num_samples, self.patience, self.seed)
