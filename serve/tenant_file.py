"""The tenant file: YAML in, ``Tenants`` out, or one error that names file, line and column.

    tenants:
      research:
        keys: ["sha256:..."]              what `matgptq hash-key` prints; the tenant `anonymous` has none
        default_precision: auto           everything from here on may be left out
        allowed_precisions: [3, 4, 8]
        auto_floor: 3
        requests_per_minute: 120
        tokens_per_minute: 200000
        max_concurrent_requests: 8

The file is refused whole: a half-read one could lift a limit. It is plain data: anchors, aliases and tags are refused, so
that its size bounds the work of reading it. Messages never quote an entry of ``keys``, which may be a key by mistake.
"""

import os
import re
import stat
from dataclasses import dataclass
from typing import Any

import yaml

from matgptq_vllm.core.errors import FormatError
from matgptq_vllm.core.precision import Catalogue
from serve.api_keys import DIGEST
from serve.tenants import ANONYMOUS, LIMITS, MAX_LIMIT, FieldError, Tenant, Tenants
from serve.yaml_nodes import YamlSource, kind, line_of, shown

MAX_FILE_BYTES = 256 * 1024

MAX_TENANTS = 500
"""Every tenant is a value of a metric label, so that there must not be many."""

ROOT = "tenants"
KEYS = "keys"

FIELDS = {
    "default_precision": "default",
    "allowed_precisions": "allowed",
    "auto_floor": "floor",
    "requests_per_minute": "requests_per_minute",
    "tokens_per_minute": "tokens_per_minute",
    "max_concurrent_requests": "max_concurrent",
}
"""Field of the file -> field of Tenant."""

_NUMBER = re.compile(r"[0-9]{1,18}")
_STR, _INT, _FLOAT = (f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float"))

_Entries = dict[str, tuple[Any, Any]]


def load_tenants(path: str | os.PathLike[str], catalogue: Catalogue | None = None) -> Tenants:
    """The tenants in the file ``path``.

    Args:
        catalogue: the profiles that the replica holds; None: not known yet, and names of profiles are not checked.

    Raises:
        FormatError: the file is not a right tenant file. OSError: it cannot be read.
    """
    return parse_tenants(read_bounded(path), os.fspath(path), catalogue)


def read_bounded(path: str | os.PathLike[str]) -> bytes:
    """The bytes of ``path``, at most one more than MAX_FILE_BYTES of them.

    Raises:
        FormatError: it is no regular file. OSError: it cannot be read.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise FormatError(f"{os.fspath(path)} is no regular file; a tenant file is a YAML file")
    with open(path, "rb") as file:
        return file.read(MAX_FILE_BYTES + 1)


def parse_tenants(data: bytes, source: str, catalogue: Catalogue | None = None) -> Tenants:
    """The tenants in the text of a tenant file.

    Args:
        data: the text in UTF-8.
        source: where it was read, for messages.
        catalogue: as for ``load_tenants``.

    Raises:
        FormatError: ``source:line:column: what is wrong, the value, what is allowed``.
    """
    return _Reader(YamlSource(source), catalogue).tenants(data)


@dataclass(frozen=True)
class _Reader:
    source: YamlSource
    catalogue: Catalogue | None

    def tenants(self, data: bytes) -> Tenants:
        if len(data) > MAX_FILE_BYTES:
            raise self.source.error(1, 1, f"the file is larger than {MAX_FILE_BYTES} bytes, which is the limit")
        root = self.source.compose(data)
        if root is None:
            raise self.source.error(1, 1, f"the file is empty; it needs the field {ROOT}")
        entries = self.source.mapping(root, "the file")
        for name, (key, _) in entries.items():
            if name != ROOT:
                raise self.source.at(key, f"unknown field {shown(name)}; the file has one field, {ROOT}")
        if ROOT not in entries:
            raise self.source.at(root, f"the file has no field; it needs {ROOT}")
        key, node = entries[ROOT]
        named = self.source.mapping(node, ROOT)
        if not 1 <= len(named) <= MAX_TENANTS:
            raise self.source.at(key, f"{ROOT} has {len(named)} entries; 1 to {MAX_TENANTS} are allowed")
        digests: dict[str, tuple[str, int]] = {}
        tenants = [self._tenant(name, key, value, digests) for name, (key, value) in named.items()]
        return Tenants(tenants, {digest: name for digest, (name, _) in digests.items()})

    def _tenant(self, name: str, key: Any, node: Any, digests: dict[str, tuple[str, int]]) -> Tenant:
        """One tenant; adds its keys to ``digests``: digest -> tenant and line, of all tenants so far."""
        entries = self.source.mapping(node, f"tenant {shown(name)}")
        for field, (place, _) in entries.items():
            if field != KEYS and field not in FIELDS:
                raise self._wrong(place, name, f"unknown field {shown(field)}; it may have {', '.join((KEYS, *FIELDS))}")
        values = {own: self._value(name, field, entries[field][1]) for field, own in FIELDS.items() if field in entries}
        try:
            tenant = Tenant(name, **values)
            if self.catalogue is not None:
                tenant.check_held(self.catalogue)
        except FieldError as error:
            raise self._field_error(error, name, key, entries) from None
        if name == ANONYMOUS:
            if KEYS in entries:
                raise self._wrong(
                    entries[KEYS][0], name, f"it has {KEYS}, but is for requests without a known one; leave them out"
                )
        elif KEYS not in entries:
            raise self._wrong(key, name, f"it has no {KEYS}, so nobody could use it; `matgptq hash-key --new` makes one")
        else:
            self._read_keys(name, entries[KEYS][1], digests)
        return tenant

    def _read_keys(self, name: str, node: Any, digests: dict[str, tuple[str, int]]) -> None:
        if not isinstance(node, yaml.SequenceNode) or not node.value:
            found = "an empty list" if isinstance(node, yaml.SequenceNode) else kind(node)
            raise self._wrong(node, name, f"{KEYS} is {found}; it must be a list of what `matgptq hash-key` prints")
        for entry in node.value:
            if not isinstance(entry, yaml.ScalarNode) or not DIGEST.fullmatch(entry.value):
                raise self._wrong(
                    entry,
                    name,
                    f"{KEYS} has {kind(entry)}, which is no digest; keys themselves are not kept in this file: run "
                    "`matgptq hash-key`, give it the key, and write here what it prints: sha256: and 64 lower-case "
                    "hexadecimal digits",
                )
            if entry.value in digests:
                other, line = digests[entry.value]
                raise self._wrong(
                    entry,
                    name,
                    f"{KEYS} has {entry.value[:15]}..., which tenant {shown(other)} has on line {line}; a key belongs to "
                    "one tenant, once",
                )
            digests[entry.value] = (name, line_of(entry))

    def _value(self, name: str, field: str, node: Any) -> Any:
        own = FIELDS[field]
        if own in LIMITS:
            if not isinstance(node, yaml.ScalarNode) or node.tag != _INT or not _NUMBER.fullmatch(node.value):
                raise self._wrong(node, name, f"{field} is {shown(node)}; it must be a whole number from 1 to {MAX_LIMIT}")
            return int(node.value)
        if own != "allowed":
            return self._precision(name, field, node)
        if not isinstance(node, yaml.SequenceNode):
            raise self._wrong(node, name, f"{field} is {shown(node)}; it must be a list of precisions, such as [3, 4, 8]")
        return tuple(self._precision(name, field, entry) for entry in node.value)

    def _precision(self, name: str, field: str, node: Any) -> str:
        # The text as written: 4 is a width, and 3.0 would be the name of a profile.
        if isinstance(node, yaml.ScalarNode) and node.tag in (_STR, _INT, _FLOAT):
            return node.value
        raise self._wrong(
            node, name, f"{field} has {shown(node)}, which is no precision; use a width such as 4 or the name of a profile"
        )

    def _field_error(self, error: FieldError, name: str, key: Any, entries: _Entries) -> FormatError:
        field = next((written for written, own in FIELDS.items() if own == error.field), None)
        if field is None:
            return self.source.at(key, f"the name of a tenant {error.what}")
        node = entries[field][1]
        return self._wrong(node if error.index is None else node.value[error.index], name, f"{field} {error.what}")

    def _wrong(self, place: Any, tenant: str, message: str) -> FormatError:
        return self.source.at(place, f"tenant {shown(tenant)}: {message}")
