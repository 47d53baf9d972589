"""Tenants: who may ask for which precisions, and how much. A tenant is known by its API keys."""

import hashlib
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from matgptq_vllm.core.errors import InputError
from matgptq_vllm.core.precision import AUTO, Catalogue, check_profile_name
from serve.api_keys import DIGEST, digest_of

ANONYMOUS = "anonymous"
"""Name of the tenant of requests without a known key, if there is one."""

MAX_LIMIT = 10**9
"""Largest value of any limit: a limit above it is a mistake, and floats count exactly up to here."""

LIMITS = ("requests_per_minute", "tokens_per_minute", "max_concurrent")
"""Fields of a tenant that are limits."""


class FieldError(InputError):
    """A field of a tenant cannot have its value.

    Args:
        field: which field of Tenant.
        what: the value, what is allowed, what to do; it follows the name of the field in the message.
        index: which entry of ``allowed`` it is about, if one.
    """

    def __init__(self, field: str, what: str, index: int | None = None):
        super().__init__(f"{field} {what}")
        self.field = field
        self.what = what
        self.index = index


class NotAllowedError(InputError):
    """The request's tenant may not use the precision that it asks for: 403. The message may be sent to the client."""


@dataclass(frozen=True)
class Tenant:
    """What the holder of a key may do.

    Raises:
        FieldError: a malformed name, a limit out of range, or fields that contradict each other.
    """

    name: str
    """A metric label; formed like a profile name."""

    default: str | None = None
    """Precision of requests that ask for none: a profile or ``auto``. None: the replica's default."""

    allowed: tuple[str, ...] | None = None
    """Profiles that requests may have; ``auto`` chooses among them. None: all that the replica holds."""

    floor: str | None = None
    """Narrowest profile that ``auto`` may choose. None: the replica's floor."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    """Prompt and generated tokens together. None, here and in the other limits: no limit."""

    max_concurrent: int | None = None
    """Requests in flight at once."""

    def __post_init__(self) -> None:
        _check_name("name", self.name)
        for index, profile in enumerate(self.allowed or ()):
            _check_name("allowed", profile, index)
            if profile == AUTO:
                raise FieldError("allowed", f"has {AUTO!r}, which every tenant may ask for; list profiles only", index)
            if profile in (self.allowed or ())[:index]:
                raise FieldError("allowed", f"has {profile!r} twice; list it once", index)
        if self.allowed == ():
            raise FieldError("allowed", "is empty; list the profiles that are allowed, or leave it out to allow all")
        for field, value in (("default", self.default), ("floor", self.floor)):
            if value is None or (field == "default" and value == AUTO):
                continue
            _check_name(field, value)
            if value == AUTO:
                raise FieldError(field, f"is {AUTO!r}; it must be a profile, such as 3")
            if self.allowed is not None and value not in self.allowed:
                raise FieldError(field, f"is {value!r}, which this tenant is not allowed; it may be {', '.join(self.allowed)}")
        for field in LIMITS:
            _check_limit(field, getattr(self, field))

    def check_allowed(self, profile: str) -> None:
        """Return if this tenant may have ``profile``; ``auto`` always: the choice is then among the allowed profiles.

        Raises:
            NotAllowedError: it may not.
        """
        if self.allowed is not None and profile != AUTO and profile not in self.allowed:
            raise NotAllowedError(
                f"precision {profile!r} is not allowed for this API key; ask for one of {', '.join((*self.allowed, AUTO))}"
            )

    def check_held(self, catalogue: Catalogue) -> None:
        """Return if the replica holds every profile that this tenant names, and a request without a precision gets one.

        Raises:
            FieldError: it does not.
        """
        held = ", ".join(catalogue.profiles)
        for index, profile in enumerate(self.allowed or ()):
            if profile not in catalogue.profiles:
                raise FieldError("allowed", f"has {profile!r}, which this replica does not hold; it holds {held}", index)
        for field, value in (("default", self.default), ("floor", self.floor)):
            if value is not None and value != AUTO and value not in catalogue.profiles:
                raise FieldError(field, f"is {value!r}, which this replica does not hold; it holds {held}")
        if self.default is None and self.allowed is not None and catalogue.default not in self.allowed:
            raise FieldError(
                "allowed",
                f"is {', '.join(self.allowed)}, without the replica's default {catalogue.default}; allow it, or give the "
                f"tenant a default of its own: one of its profiles, or {AUTO}",
            )


class Tenants:
    """All tenants of a replica; never changes, a new file makes a new one.

    Args:
        tenants: their names differ.
        keys: digest of an API key (``api_keys.digest_of``) -> name of its tenant.

    Raises:
        InputError: two tenants have one name, or a key is no digest or belongs to nobody.
    """

    def __init__(self, tenants: Iterable[Tenant], keys: Mapping[str, str]):
        self._by_name: dict[str, Tenant] = {}
        for tenant in tenants:
            if tenant.name in self._by_name:
                raise InputError(f"two tenants are named {tenant.name!r}; rename one")
            self._by_name[tenant.name] = tenant
        # What the dictionary compares must not depend on a stored digest in a way that a client could time: it holds
        # hashes under a secret of this process, so that how far two of them agree says nothing about the digests.
        self._secret = secrets.token_bytes(32)
        self._by_key: dict[bytes, Tenant] = {}
        for digest, name in keys.items():
            if not DIGEST.fullmatch(digest):
                raise InputError(f"a key of tenant {name!r} is no digest; `matgptq hash-key` prints the digest of a key")
            if name not in self._by_name:
                raise InputError(f"a key belongs to {name!r}, which is no tenant; there are {', '.join(self._by_name)}")
            self._by_key[self._place(digest)] = self._by_name[name]

    def __len__(self) -> int:
        return len(self._by_name)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tenants, in the order of the file."""
        return tuple(self._by_name)

    @property
    def num_keys(self) -> int:
        """How many keys there are."""
        return len(self._by_key)

    def get(self, name: str) -> Tenant | None:
        """The tenant named ``name``."""
        return self._by_name.get(name)

    def find(self, api_key: str | None) -> Tenant | None:
        """The tenant of a request.

        Args:
            api_key: the key that it carries, None if none.

        Returns:
            The tenant that the key belongs to; for no key or an unknown one the tenant ``anonymous``; None if there is no
            such tenant: the request is answered with 401. The time that it takes says nothing about the keys.
        """
        found = None if api_key is None else self._by_key.get(self._place(digest_of(api_key)))
        return found or self._by_name.get(ANONYMOUS)

    def _place(self, digest: str) -> bytes:
        return hashlib.blake2b(digest.encode(), key=self._secret, digest_size=32).digest()


def _check_name(field: str, value: object, index: int | None = None) -> None:
    try:
        well_formed = check_profile_name(value) == value
    except InputError:
        well_formed = False
    if not well_formed:
        shown = repr(value) if len(repr(value)) <= 80 else repr(value)[:80] + "..."
        raise FieldError(field, f"has {shown}; use letters, digits, '.', '_' and '-', at most 64 characters", index)


def _check_limit(field: str, value: object) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_LIMIT:
        raise FieldError(field, f"is {value!r}; it must be a whole number from 1 to {MAX_LIMIT}, or left out for no limit")
