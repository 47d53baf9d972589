"""What an operator decides about one replica, and how it reaches every vLLM process: through ``additional_config``."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from matgptq_vllm.core.errors import InputError
from matgptq_vllm.core.precision import PARENT_WIDTH, Catalogue, check_profile_name, check_width, uniform_name
from matgptq_vllm.core.profile import Profile

ADDITIONAL_CONFIG_KEY = "matgptq"
"""Key of these options in vLLM's ``--additional-config``."""

SELF_DRAFT_CLASS = "matgptq_vllm.compat.self_draft.SelfDraft"
"""Class that vLLM's speculative method ``custom_class`` is given as model, for self-speculative decoding."""


@dataclass(frozen=True)
class ReplicaOptions:
    """Options of one replica; the same for all its processes."""

    max_width: int = PARENT_WIDTH
    """Widest width this replica serves; the planes below it are neither read nor held."""

    default_precision: str | None = None
    """Profile of requests that ask for none; unset, the uniform profile of max_width."""

    graph_widths: tuple[int, ...] = ()
    """Widths for which batches of that width alone get CUDA graphs of their own."""

    draft_width: int | None = None
    """Width at which tokens are drafted that wider slices verify; only with the speculative method of ``SELF_DRAFT_CLASS``."""

    def __post_init__(self) -> None:
        check_width(self.max_width)
        if self.draft_width is not None and check_width(self.draft_width) >= self.max_width:
            raise InputError(
                f"draft_width is {self.draft_width}; only a narrower slice than the widest of this replica, {self.max_width}, "
                "can draft"
            )
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

    def catalogue(self, profiles: list[Profile]) -> Catalogue:
        """The profiles in index order with this replica's default; InputError if the default is not among them."""
        return Catalogue(tuple(profile.name for profile in profiles), self.default_precision or uniform_name(self.max_width))
