"""What an operator decides about one replica, and how it reaches every vLLM process: through ``additional_config``."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from matgptq_vllm.core.errors import InputError
from matgptq_vllm.core.precision import PARENT_WIDTH, Catalogue, check_profile_name, check_width, uniform_name
from matgptq_vllm.core.profile import Profile
from matgptq_vllm.core.resident_bytes import ResidentBytes

ADDITIONAL_CONFIG_KEY = "matgptq"
"""Key of these options in vLLM's ``--additional-config``."""

SELF_DRAFT_CLASS = "matgptq_vllm.compat.self_draft.SelfDraft"
"""Class that vLLM's speculative method ``custom_class`` is given as model, for self-speculative decoding."""


_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?")


def parse_bytes(text: int | str) -> int:
    """Bytes meant by a number, or by text such as ``6GiB``, ``6.5G``, ``500MB`` (without ``i``: powers of 1000).

    Raises:
        InputError: no such text, or less than a byte.
    """
    match = _SIZE.fullmatch(text.strip()) if isinstance(text, str) else None
    if isinstance(text, int) and not isinstance(text, bool):
        size = text
    elif match is not None:
        number, unit, binary = match.groups()
        size = int(float(number) * (1024 if binary else 1000) ** ("KMGT".index(unit) + 1 if unit else 0))
    else:
        size = 0
    if size < 1:
        raise InputError(f"memory budget {text!r} is not a size; write a number of bytes, or a size such as 6GiB or 500MB")
    return size


@dataclass(frozen=True)
class ReplicaOptions:
    """Options of one replica; the same for all its processes."""

    max_width: int = PARENT_WIDTH
    """Widest width this replica serves; the planes below it are neither read nor held."""

    default_precision: str | None = None
    """Profile of requests that ask for none; unset, the uniform profile of max_width."""

    graph_widths: tuple[int, ...] | None = None
    """Widths for which batches of that width alone get CUDA graphs of their own; None: all that are held, where that works."""

    draft_width: int | None = None
    """Width at which tokens are drafted that wider slices verify; only with the speculative method of ``SELF_DRAFT_CLASS``."""

    memory_budget: int | str | None = None
    """Bytes that all weights of one copy of the model may take (``core.resident_bytes``), as a number or as in ``"6GiB"``; the
    replica then serves the widest width, max_width at most, that fits."""

    def __post_init__(self) -> None:
        check_width(self.max_width)
        if self.memory_budget is not None:
            object.__setattr__(self, "memory_budget", parse_bytes(self.memory_budget))
        if self.draft_width is not None and check_width(self.draft_width) >= self.max_width:
            raise InputError(
                f"draft_width is {self.draft_width}; only a narrower slice than the widest of this replica, {self.max_width}, "
                "can draft"
            )
        if self.graph_widths is not None:
            # A list, where the options came as JSON.
            object.__setattr__(self, "graph_widths", tuple(map(check_width, self.graph_widths)))
        if self.graph_widths and max(self.graph_widths) > self.max_width:
            raise InputError(
                f"graph_widths are {self.graph_widths}, but this replica holds up to {self.max_width}; leave the others out"
            )
        if self.default_precision is not None:
            # An int stands for a uniform width; keep the name it means.
            object.__setattr__(self, "default_precision", check_profile_name(self.default_precision))

    @classmethod
    def from_additional_config(cls, additional_config: object) -> "ReplicaOptions":
        """Options in vLLM's ``additional_config``; the defaults where it has none.

        Raises:
            InputError: unknown options, or values out of range.
        """
        options: Any = additional_config.get(ADDITIONAL_CONFIG_KEY, {}) if isinstance(additional_config, Mapping) else {}
        names = [field.name for field in fields(cls)]
        if not isinstance(options, Mapping) or not set(options) <= set(names):
            raise InputError(f"additional_config[{ADDITIONAL_CONFIG_KEY!r}] is {options!r}; it may have {', '.join(names)}")
        return cls(**options)

    def to_additional_config(self) -> dict[str, Any]:
        """The inverse of ``from_additional_config``; options that have their default are left out."""
        defaults = asdict(type(self)())
        return {ADDITIONAL_CONFIG_KEY: {name: value for name, value in asdict(self).items() if value != defaults[name]}}

    def within_budget(self, resident: ResidentBytes) -> "ReplicaOptions":
        """These options with the max width that the budget allows; InputError if none fits."""
        if self.memory_budget is None:
            return self
        return replace(self, max_width=resident.widest_within(parse_bytes(self.memory_budget), self.max_width))

    def catalogue(self, profiles: list[Profile]) -> Catalogue:
        """The profiles in index order with this replica's default; InputError if the default is not among them."""
        return Catalogue(tuple(profile.name for profile in profiles), self.default_precision or uniform_name(self.max_width))
