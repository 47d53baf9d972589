"""Profiles: a width for every linear layer of a parent, and the table of them that travels with it.

Uniform profiles are never stored: ``"4"`` means width 4 everywhere in any parent. Standard library only.
"""

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from matgptq_vllm.core.errors import FormatError, InputError
from matgptq_vllm.core.precision import AUTO, WIDTHS, check_profile_name, check_width, uniform_name, uniform_width

PROFILES_FILE = "matgptq_profiles.json"
PROFILES_VERSION = 1

FUSED_LAYERS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
"""Layers that engines run as one matrix product: they must have one width."""


@dataclass(frozen=True)
class Profile:
    """A named assignment of a width to every linear layer."""

    name: str
    widths: Mapping[str, int] = field(repr=False)
    """Layer name, as in the checkpoint, to width in bits."""

    def __post_init__(self) -> None:
        check_profile_name(self.name)
        if self.name == AUTO:
            raise InputError(f"a profile cannot be called {AUTO!r}: that name leaves the choice to the replica")
        for width in self.widths.values():
            check_width(width)
        uniform = uniform_width(self.name)
        if uniform is not None and any(width != uniform for width in self.widths.values()):
            raise InputError(f"the name {self.name!r} means width {uniform} everywhere; name a mixed profile otherwise")
        _check_fused(self)

    @property
    def max_width(self) -> int:
        """Widest width of any layer."""
        return max(self.widths.values())

    def width_of(self, layers: Iterable[str]) -> int:
        """The one width of ``layers`` (the members of a fused layer); InputError if they differ or are not in the profile."""
        found = {name: self.widths.get(name) for name in layers}
        values = set(found.values())
        width = values.pop() if len(values) == 1 else None
        if width is None:
            raise InputError(f"profile {self.name!r} has no common width for the fused layers {found}")
        return width

    def average_bits(self, num_weights: Mapping[str, int]) -> float:
        """Mean bits read per weight. ``num_weights`` maps layer name to its number of weights."""
        return sum(self.widths[name] * count for name, count in num_weights.items()) / sum(num_weights.values())


def uniform_profile(width: int, layers: Iterable[str]) -> Profile:
    """The profile that reads every one of ``layers`` at ``width``."""
    return Profile(uniform_name(check_width(width)), dict.fromkeys(layers, width))


def all_profiles(layers: Collection[str], stored: Iterable[Profile], max_width: int) -> list[Profile]:
    """Every profile that can be read with ``max_width`` bits: the uniform ones, narrow to wide, then the stored ones."""
    uniform = [uniform_profile(width, layers) for width in WIDTHS if width <= max_width]
    return uniform + [profile for profile in stored if profile.max_width <= max_width]


def profiles_to_json(profiles: Iterable[Profile]) -> str:
    """The text of a profile table.

    Raises:
        InputError: two profiles of one name, or a uniform profile, which no table may hold.
    """
    table: dict[str, Any] = {}
    for profile in profiles:
        if profile.name in table or uniform_width(profile.name) is not None:
            reason = "is there twice" if profile.name in table else "is uniform and always there"
            raise InputError(f"profile {profile.name!r} {reason}; name the profile otherwise, or leave it out")
        table[profile.name] = {"widths": dict(profile.widths)}
    return json.dumps({"version": PROFILES_VERSION, "profiles": table}, indent=1) + "\n"


def profiles_from_json(text: str, layers: Collection[str], source: str = PROFILES_FILE) -> list[Profile]:
    """The profiles of a table.

    Args:
        layers: the quantized layers of the parent; every profile must cover exactly these.
        source: where ``text`` was read, for messages.

    Raises:
        FormatError: not a profile table, another version, or a profile that does not fit the parent.
    """
    try:
        document: Any = json.loads(text, object_pairs_hook=_unique_keys)
        version, table = document["version"], dict(document["profiles"])
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{source}: not a profile table ({type(error).__name__}: {error})") from error
    if version != PROFILES_VERSION:
        raise FormatError(f"{source}: version is {version!r}, this release reads {PROFILES_VERSION}")
    profiles = []
    for name, entry in table.items():
        try:
            profile = Profile(name, dict(entry["widths"]))
        except (InputError, KeyError, TypeError, ValueError) as error:
            raise FormatError(f"{source}: profile {name!r}: {error}") from error
        if uniform_width(name) is not None:
            raise FormatError(f"{source}: profile {name!r} is uniform and needs no entry; remove it")
        if profile.widths.keys() != set(layers):
            differing = sorted(profile.widths.keys() ^ set(layers))
            raise FormatError(f"{source}: profile {name!r} does not cover the parent's layers; differing: {differing[:4]}")
        profiles.append(profile)
    return profiles


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError(f"a name is there twice among {[name for name, _ in pairs][:8]}")
    return table


def _check_fused(profile: Profile) -> None:
    for name, width in profile.widths.items():
        leaf = name.rpartition(".")[2]
        for group in FUSED_LAYERS:
            if leaf == group[0]:
                members = [name.removesuffix(leaf) + member for member in group]
                held = [member for member in members if member in profile.widths]
                if any(profile.widths[member] != width for member in held):
                    profile.width_of(held)
