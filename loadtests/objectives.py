"""Service level objectives: what a request must keep to be worth counting."""

from dataclasses import dataclass

from loadtests.records import COMPLETED, Record
from matgptq_vllm.core.errors import InputError

NAMES = ("ttft", "tpot", "e2e")


@dataclass(frozen=True)
class Objectives:
    """Upper bounds in milliseconds; None: no bound."""

    ttft: float | None = None
    """Time to the first token, from when the request was due."""
    tpot: float | None = None
    """Mean time per token after the first."""
    e2e: float | None = None
    """Time to the last token, from when the request was due."""

    def met(self, record: Record) -> bool:
        """Whether a request was answered in full and within all bounds."""
        if record.outcome != COMPLETED:
            return False
        found = {
            "ttft": first_token_s(record),
            "tpot": record.tpot_s or 0.0,
            "e2e": record.end_s - record.due_s,
        }
        return all(bound is None or 1e3 * found[name] <= bound for name in NAMES for bound in [getattr(self, name)])

    def text(self) -> str:
        """As on the command line."""
        return ",".join(f"{name}:{value:g}" for name in NAMES for value in [getattr(self, name)] if value is not None)


def first_token_s(record: Record) -> float:
    """From when the request was due to its first token: waiting for the bound on concurrency counts."""
    return record.start_s - record.due_s + record.ttft_s


def parse_objectives(text: str) -> Objectives:
    """From ``ttft:500,tpot:30``; InputError names what is wrong."""
    found: dict[str, float] = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition(":")
        try:
            bound = float(value)
        except ValueError:
            bound = -1.0
        if name not in NAMES or not bound > 0:
            raise InputError(
                f"--slo {part!r} is no objective; give names of {', '.join(NAMES)} with milliseconds, such as ttft:500,tpot:30"
            )
        found[name] = bound
    return Objectives(**found)
