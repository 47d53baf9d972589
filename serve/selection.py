"""Which profile a request is computed at. Pure: selectors in, selection out.

    first match wins        reason     where the client writes it
    X-Precision header      header     ``X-Precision: 4``
    body                    body       ``"precision": 4``, or ``"vllm_xargs": {"precision": "4"}``
    model alias             model      ``"model": "name@4"``
    the replica's default   default    nowhere
    ``auto`` in any         auto       the choice is the replica's

The reasons `tenant`, `budget` and `best-effort` come from admission (serve.admission), which follows.

Every selector present must be well formed; only the one that decides must name a profile that the replica holds.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from matgptq_vllm.core.errors import InputError
from matgptq_vllm.core.precision import (
    ALIAS_SEPARATOR,
    AUTO,
    PRECISION_HEADER,
    XARGS_KEY,
    Catalogue,
    alias,
    check_profile_name,
)
from serve.errors import RequestError

BODY_FIELD = "precision"
"""Body field that selects a precision; it is removed before vLLM sees the body."""

REASONS = ("header", "body", "model", "default", "tenant", "auto", "budget", "best-effort")
"""What a selection may report as its reason: the values of a response header and of a metric label."""


@dataclass(frozen=True)
class Selectors:
    """Everything in one request that may select a precision; None where the request does not have it."""

    header: str | None = None
    body: object = None
    xargs: object = None
    model: object = None


@dataclass(frozen=True)
class Selection:
    """The profile of one request."""

    profile: str
    reason: str
    """One of REASONS."""

    model: str | None = None
    """Name to forward in place of a model alias; None if the request named no alias."""


def select(selectors: Selectors, catalogue: Catalogue, models: Collection[str]) -> Selection:
    """The profile that ``selectors`` ask for.

    Args:
        models: names under which the replica serves its model, aliases left out (``base_models``).

    Raises:
        RequestError: 400, a selector is malformed, two contradict each other, or the profile is not held; 404, the
            model alias names no profile that is held. The messages list what can be asked for.
    """
    header = _well_formed(selectors.header, "X-Precision", "header", catalogue)
    body = _well_formed(selectors.body, BODY_FIELD, "precision", catalogue)
    xargs = _well_formed(selectors.xargs, f"vllm_xargs.{XARGS_KEY}", "precision", catalogue)
    if body is not None and xargs is not None and body != xargs:
        raise RequestError(
            f"{BODY_FIELD} is {body!r} but vllm_xargs.{XARGS_KEY} is {xargs!r}; send one of them. {_offer(catalogue)}",
            "precision",
            param=BODY_FIELD,
        )
    model, from_alias = split_alias(selectors.model, models)
    if header is not None:
        return _resolve(header, "header", "X-Precision", model, catalogue)
    if body is not None:
        return _resolve(body, "body", BODY_FIELD, model, catalogue)
    if xargs is not None:
        return _resolve(xargs, "body", f"vllm_xargs.{XARGS_KEY}", model, catalogue)
    if model is not None and from_alias is not None:
        return _resolve_alias(model, from_alias, catalogue)
    return Selection(catalogue.default, "default")


def precision_header(headers: Iterable[tuple[bytes, bytes]], catalogue: Catalogue | None) -> str | None:
    """The value of X-Precision among ASGI ``headers``, or None.

    Args:
        catalogue: what can be asked for, for messages; None where nothing can.

    Raises:
        RequestError: 400, it occurs twice (equal or not: proxies disagree about which one counts) or is not UTF-8.
    """
    offer = "" if catalogue is None else f". {_offer(catalogue)}"
    values = [value for name, value in headers if name.lower() == PRECISION_HEADER.encode()]
    if not values:
        return None
    if len(values) > 1:
        raise RequestError(f"X-Precision occurs {len(values)} times; send it once{offer}", "header", param="X-Precision")
    try:
        return values[0].decode("utf-8").strip(" \t")
    except UnicodeDecodeError:
        message = f"X-Precision is not UTF-8; send a precision such as 4{offer}"
        raise RequestError(message, "header", param="X-Precision") from None


def split_alias(model: object, models: Collection[str]) -> tuple[str | None, str | None]:
    """(name, precision) of the alias ``name@precision`` of a served name; (None, None) if ``model`` is no such alias."""
    if not isinstance(model, str) or model in models:
        return None, None
    name, separator, precision = model.rpartition(ALIAS_SEPARATOR)
    return (name, precision) if separator and name in models else (None, None)


def base_models(served: Iterable[str], catalogue: Catalogue) -> tuple[str, ...]:
    """The names in ``served`` that are not aliases of another one at a profile of ``catalogue``."""
    names = tuple(served)
    aliases = {alias(name, profile) for name in names for profile in catalogue.profiles}
    return tuple(name for name in names if name not in aliases)


def _well_formed(value: object, param: str, rejection: str, catalogue: Catalogue) -> str | None:
    if value is None:
        return None
    try:
        return check_profile_name(value)
    except InputError as error:
        raise RequestError(f"{param}: {error}. {_offer(catalogue)}", rejection, param=param) from None


def _resolve(asked: str, reason: str, param: str, model: str | None, catalogue: Catalogue) -> Selection:
    try:
        profile = catalogue.resolve(asked)
    except InputError as error:
        raise RequestError(str(error), "precision", param=param) from None
    return Selection(profile, AUTO if asked == AUTO else reason, model)


def _resolve_alias(model: str, asked: str, catalogue: Catalogue) -> Selection:
    if asked != AUTO and asked not in catalogue.profiles:
        shown = asked if len(asked) <= 64 else asked[:64] + "..."
        offered = ", ".join(alias(model, name) for name in (*catalogue.profiles, AUTO))
        raise RequestError(
            f"model {alias(model, shown)!r} does not exist: this replica holds no precision {shown!r}; ask for {model} or "
            f"one of {offered}",
            "model",
            status=404,
            param="model",
        )
    return Selection(catalogue.resolve(asked), AUTO if asked == AUTO else "model", model)


def _offer(catalogue: Catalogue) -> str:
    return f"This replica holds {', '.join((*catalogue.profiles, AUTO))}"
