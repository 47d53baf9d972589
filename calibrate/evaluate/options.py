"""The options of evaluate. Imports no torch: the command line is built from this file."""

# option() returns a dataclass field, which is not shared between instances.
# ruff: noqa: RUF009

from dataclasses import dataclass
from pathlib import Path

from calibrate.option_fields import DEVICES, check_at_least, check_choices, option
from matgptq_vllm.core.errors import InputError
from matgptq_vllm.core.precision import WIDTHS, check_profile_name


def parse_names(text: str) -> tuple[str, ...]:
    """``"4, mix-3.0"`` -> ("4", "mix-3.0"); InputError unless every item is a name and none is there twice."""
    names = tuple(check_profile_name(name.strip()) for name in text.split(","))
    return check_distinct("profile", names)


def parse_tasks(text: str) -> tuple[str, ...]:
    """Comma-separated task names and files; InputError if one is empty or there twice."""
    tasks = tuple(task.strip() for task in text.split(","))
    if "" in tasks:
        raise InputError(f"--tasks {text!r} has an empty item; give names of lm-eval tasks or paths of task files")
    return check_distinct("task", tasks)


def check_distinct(what: str, names: tuple[str, ...]) -> tuple[str, ...]:
    """``names``, if none is there twice."""
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{what} {name!r} is there twice; name each once")
    return names


@dataclass(frozen=True)
class EvaluateOptions:
    """Measure a parent at its profiles, or a plain model: perplexity, distance to the original, lm-eval tasks."""

    model: Path = option("folder of a parent, or of a plain Hugging Face model", parse=Path)
    text: Path | None = option("UTF-8 text to measure on; it must not be text that was calibrated on", None, parse=Path)
    width: int | None = option("measure this width only", None, parse=int, choices=WIDTHS)
    profile: tuple[str, ...] | None = option(
        "measure these profiles only: widths or names of the parent's table", None, parse=parse_names, metavar="NAME,..."
    )
    precision: tuple[str, ...] | None = option(
        "the same as --profile, in the word that requests use; with --url also auto",
        None,
        parse=parse_names,
        metavar="NAME,...",
    )
    original: Path | None = option(
        "folder of the model that the parent is compared with (default: the one that it was calibrated from)",
        None,
        parse=Path,
        metavar="MODEL",
    )
    no_original: bool = option("compare with no original: leaves out KL divergence and top-1 agreement", False)
    seq_len: int = option("tokens per window; the first of each is not scored", 512, parse=int)
    limit_windows: int | None = option("measure the first N windows only", None, parse=int, metavar="N")
    tasks: tuple[str, ...] | None = option(
        "lm-eval tasks to run: names, or paths of task files", None, parse=parse_tasks, metavar="TASK,..."
    )
    limit_examples: int | None = option("run the first N examples of every task only", None, parse=int, metavar="N")
    url: str | None = option("run the tasks through the server at this address instead", None, metavar="http://HOST:PORT")
    concurrency: int = option("requests under way at a time, with --url", 8, parse=int)
    out: Path | None = option("folder for report.json, report.md and quality.png", None, parse=Path, metavar="DIR")
    update_card: bool = option("put the measured quality into the parent's model card", False)
    device: str = option("where to compute", "auto", choices=DEVICES)
    json: bool = option("print JSON instead of a table", False)

    def __post_init__(self) -> None:
        check_choices(self)
        check_at_least("seq_len", self.seq_len, 2)
        check_at_least("concurrency", self.concurrency, 1)
        for name in ("limit_windows", "limit_examples"):
            if (limit := getattr(self, name)) is not None:
                check_at_least(name, limit, 1)
        if sum(choice is not None for choice in (self.width, self.profile, self.precision)) > 1:
            raise InputError("--width, --profile and --precision exclude each other; give one")
        for given in (self.profile, self.precision):
            check_distinct("profile", tuple(check_profile_name(name) for name in given or ()))
        if self.original is not None and self.no_original:
            raise InputError(f"--original {self.original} and --no-original exclude each other; give one")
        if self.text is None and self.tasks is None:
            raise InputError("nothing to measure; give --text FILE, --tasks NAMES or both")
        if self.url is not None and (self.tasks is None or self.text is not None):
            raise InputError("--url runs lm-eval tasks only; give it with --tasks and without --text")
        if self.update_card and self.text is None:
            raise InputError("--update-card writes the quality measured on a text; give --text FILE")
        if self.out is not None and self.out.exists() and not self.out.is_dir():
            raise InputError(f"--out {self.out} is a file; give a folder")

    @property
    def profile_names(self) -> tuple[str, ...] | None:
        """Names of the profiles to measure; None for all."""
        if self.width is not None:
            return (str(self.width),)
        return self.profile or self.precision
