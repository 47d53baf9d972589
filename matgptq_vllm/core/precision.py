"""What a client may ask for: widths, profile names, and the names under which a precision travels.

Standard library only: the HTTP layer, the engine and calibration all import this file.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from matgptq_vllm.core.errors import InputError

PARENT_WIDTH = 8
"""Bits of a parent's codes."""

WIDTHS = (2, 3, 4, 6, 8)
"""Widths that can be read from a parent."""

AUTO = "auto"
"""The precision with which a client leaves the choice of profile to the replica."""

PRECISION_HEADER = "x-precision"
"""Request header that selects a precision; the response header of the same name reports the profile used."""

REASON_HEADER = "x-precision-reason"
"""Response header that reports which selector decided."""

XARGS_KEY = "precision"
"""Key of a request's profile in vLLM's ``SamplingParams.extra_args`` (``vllm_xargs`` in a request body)."""

GROUP_KEY = "precision_group"
"""Key, in the same place, of the group of requests whose profile follows the replica's load while they run. The server alone
writes it; a request without it keeps its profile."""

SALT_PREFIX = f"{XARGS_KEY}="
"""How the ``cache_salt`` of a prompt begins that names a profile where ``extra_args`` do not reach: in vLLM's beam search."""

SALT_SEPARATOR = "|"
"""Between the profile and a client's own salt."""

ALIAS_SEPARATOR = "@"
"""``name@4`` is the model ``name`` read at profile ``4``."""

PROFILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""What a profile may be called: it travels in headers, metric labels and file names."""


def uniform_name(width: int) -> str:
    """Name of the profile that reads every layer at ``width`` bits."""
    return str(width)


def uniform_width(name: str) -> int | None:
    """Width of the uniform profile ``name``, or None if ``name`` is not the name of one."""
    return int(name) if name in {uniform_name(width) for width in WIDTHS} else None


def check_width(width: object) -> int:
    """Return ``width`` if a parent can be read at it.

    Raises:
        InputError: ``width`` is not one of WIDTHS.
    """
    if isinstance(width, bool) or not isinstance(width, int) or width not in WIDTHS:
        raise InputError(f"width {width!r} cannot be read from a parent; use one of {_listed(map(str, WIDTHS))}")
    return width


def check_profile_name(name: object) -> str:
    """Return ``name`` as a string if it is a well-formed profile name (an int stands for a uniform width).

    Raises:
        InputError: ``name`` is not a string or int, or has characters that a profile name cannot have.
    """
    if isinstance(name, int) and not isinstance(name, bool):
        name = str(name)
    if not isinstance(name, str) or not PROFILE_NAME.fullmatch(name):
        raise InputError(
            f"{_shown(name)} is not a precision; a precision is a width such as 4, or the name of a profile "
            "(letters, digits, '.', '_' and '-', at most 64 characters)"
        )
    return name


def alias(model: str, profile: str) -> str:
    """Model name under which ``/v1/models`` offers ``model`` at ``profile``."""
    return f"{model}{ALIAS_SEPARATOR}{profile}"


def salt_of_precision(precision: str, salt: str | None = None) -> str:
    """The cache salt ``salt`` of a prompt, made to name ``precision``."""
    return f"{SALT_PREFIX}{precision}" + (f"{SALT_SEPARATOR}{salt}" if salt else "")


def precision_of_salt(salt: str | None) -> str | None:
    """The precision that a cache salt names, or None; the inverse of ``salt_of_precision``."""
    if salt is None or not salt.startswith(SALT_PREFIX):
        return None
    return salt.removeprefix(SALT_PREFIX).partition(SALT_SEPARATOR)[0]


@dataclass(frozen=True)
class Catalogue:
    """The profiles that a replica holds, in index order, and the one that it reads when nobody asks.

    The position of a profile in ``profiles`` is its index in every per-token buffer of the engine.
    """

    profiles: tuple[str, ...]
    default: str

    def __post_init__(self) -> None:
        if self.default not in self.profiles:
            raise InputError(
                f"default precision {self.default!r} is not held by this replica; it holds {_listed(self.profiles)}"
            )

    def resolve(self, precision: object) -> str:
        """Name of the profile meant by ``precision``; None and ``auto`` mean the default.

        Raises:
            InputError: malformed, or not held by this replica. The message lists what can be asked for.
        """
        if precision is None or precision == AUTO:
            return self.default
        try:
            name = check_profile_name(precision)
        except InputError as error:
            raise InputError(f"{error}. This replica holds {_listed((*self.profiles, AUTO))}") from None
        if name not in self.profiles:
            raise InputError(
                f"precision {name!r} is not held by this replica; ask for one of {_listed((*self.profiles, AUTO))}"
            )
        return name

    def within(self, max_width: int, widths: Mapping[str, int]) -> "Catalogue":
        """The profiles that need at most ``max_width``; a default that needs more becomes that uniform width.

        Positions in it are no indices: those remain the positions in this catalogue.

        Args:
            widths: profile -> widest width of any layer.
        """
        profiles = tuple(profile for profile in self.profiles if widths[profile] <= max_width)
        return Catalogue(profiles, self.default if self.default in profiles else uniform_name(max_width))

    def index(self, precision: object) -> int:
        """Index of the profile meant by ``precision``; errors as ``resolve``."""
        return self.profiles.index(self.resolve(precision))


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)


def _shown(value: object, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + "..."
