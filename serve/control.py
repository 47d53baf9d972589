"""Everything that decides about requests of a running replica, put together once the replica is known."""

import hmac
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from matgptq_vllm.core.precision import AUTO
from serve.admission import Admission
from serve.budget import Budget
from serve.controller import Controller
from serve.errors import RequestError
from serve.exchange import Exchange
from serve.following import Following
from serve.latency_cache import LatencyCache
from serve.latency_model import LatencyModel
from serve.load import StepLoad
from serve.load_tracker import LoadTracker
from serve.quotas import Quotas
from serve.replica import Replica, Report
from serve.settings import Settings
from serve.step_observer import StepObserver
from serve.tenant_reload import TenantReload
from serve.tenants import Tenant, Tenants

SHOWN_BATCHES = (1, 8, 32)
"""Batch sizes for which GET /v1/precisions shows predicted step times."""

NOBODY = Tenants((), {})

STORE_EVERY = 5000
"""Steps after which what was learned is kept for the next start."""


@dataclass(frozen=True)
class EngineLimits:
    """What the engine does at once, at most."""

    max_running: int | None = None
    """Sequences; None: not known."""

    max_batched_tokens: int = 2048
    """Tokens per step."""


@dataclass(frozen=True)
class Slo:
    """What ``auto`` requests without budgets of their own aim at."""

    budget: Budget | None
    auto_floor: str | None


def parse_slo(raw: bytes) -> Slo:
    """The SLO in a JSON object with ``tpot_ms``, ``ttft_ms`` and ``auto_floor``; what is missing or null is not set.

    Raises:
        RequestError: 400, it is no such object.
    """
    names = ("tpot_ms", "ttft_ms", "auto_floor")
    try:
        document = json.loads(raw)
    except ValueError:
        document = None
    except RecursionError:
        raise RequestError("the body must be a JSON object; this one is nested too deeply", "body") from None
    if not isinstance(document, dict) or not set(document) <= set(names):
        raise RequestError(f"the body must be a JSON object with {', '.join(names)}", "body")
    times = [document.get(name) for name in names[:2]]
    for name, value in zip(names, times, strict=False):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e7):
            raise RequestError(f"{name} must be a number of milliseconds above 0, or null", "body", param=name)
    budget = None if times == [None, None] else Budget(*times)
    return Slo(budget, document.get("auto_floor"))


@dataclass
class Control:
    """The parts, for one event loop."""

    replica: Replica
    settings: Settings
    model: LatencyModel
    tracker: LoadTracker
    admission: Admission
    following: Following | None = None
    tenants: TenantReload | None = None
    cache: LatencyCache | None = None
    source: str = "none"
    """Where the latency model comes from: none, cache, sweep or online."""

    in_flight: set[Exchange] = field(default_factory=set)
    """Generation requests that the engine has."""

    def __post_init__(self) -> None:
        self.all_profiles = self.replica
        """The replica with all that it can hold; ``replica`` is what it holds now."""

    def hold(self, max_width: int) -> None:
        """Admit new requests up to ``max_width`` only."""
        self.replica = self.all_profiles.within(max_width)
        self.admission.hold(self.replica.catalogue)

    def wider_in_flight(self, max_width: int) -> list[Exchange]:
        """Requests in flight that need more than ``max_width``."""
        widths = self.all_profiles.profile_widths
        return [each for each in self.in_flight if each.selection is not None and widths[each.selection.profile] > max_width]

    @classmethod
    def of(
        cls,
        replica: Replica,
        settings: Settings,
        observer: StepObserver,
        tenants: TenantReload | None = None,
        cache: LatencyCache | None = None,
        limits: EngineLimits = EngineLimits(),
    ) -> "Control":
        """The control of a replica, with what an earlier start learned of it.

        Raises:
            InputError: the settings name a profile that the replica does not hold.
        """
        order = sorted(replica.catalogue.profiles, key=lambda name: (replica.average_bits[name], name))
        model = LatencyModel(order, [replica.average_bits[name] for name in order])
        source = "cache" if cache is not None and cache.restore(model) else "none"
        tracker = LoadTracker(observer.idle)
        slo = None
        if settings.tpot_slo_ms is not None or settings.ttft_slo_ms is not None:
            slo = Budget(settings.tpot_slo_ms, settings.ttft_slo_ms)
        controller = Controller(
            model,
            model.profiles,
            max_running=limits.max_running,
            max_batched_tokens=limits.max_batched_tokens,
            elastic=settings.elastic_running,
        )
        following = Following(controller, tracker) if settings.elastic_running else None
        admission = Admission(
            replica.catalogue,
            controller,
            tracker,
            Quotas(lambda: NOBODY if tenants is None else tenants.current()),
            model.profiles,
            slo,
            settings.auto_floor,
            settings.default_auto,
            following,
        )
        control = cls(replica, settings, model, tracker, admission, following, tenants, cache, source)
        tracker.on_step(control._learn)
        observer.listen(tracker.observe)
        return control

    def tenant_of(self, api_key: str | None) -> Tenant | None:
        """The tenant that a key belongs to; None if the replica has no tenants.

        Raises:
            RequestError: 401, no tenant has that key.
        """
        if self.tenants is None:
            return None
        tenant = self.tenants.current().find(api_key)
        if tenant is None:
            told = "the request has no API key" if api_key is None else "the API key is unknown"
            raise RequestError(f"{told}; send `Authorization: Bearer KEY` with a key of this server", "key", status=401)
        return tenant

    def is_admin(self, api_key: str | None) -> bool:
        """Whether ``api_key`` is the key of the admin endpoints."""
        expected = self.settings.admin_key
        return expected is not None and api_key is not None and hmac.compare_digest(api_key.encode(), expected.encode())

    def set_slo(self, slo: Slo) -> None:
        """Let ``auto`` requests aim at something else; InputError if the floor is not held."""
        if slo.auto_floor == AUTO:
            raise RequestError(f"auto_floor is {AUTO!r}; it must be a profile, such as 3", "body", param="auto_floor")
        floor = None if slo.auto_floor is None else self.replica.catalogue.resolve(slo.auto_floor)
        self.admission.slo, self.admission.floor = slo.budget, floor

    def store_model(self) -> None:
        """Keep what was learned for the next start."""
        if self.cache is not None:
            self.cache.store(self.model)

    def to_json(self, workers: Sequence[Report] | None) -> dict[str, Any]:
        """The document of ``GET /v1/precisions``."""
        document = self.replica.to_json(workers)
        for entry in document["data"]:
            entry["step_ms"] = {str(batch): self.predicted_ms(entry["id"], batch) for batch in SHOWN_BATCHES}
        load = self.tracker.load()
        return {
            **document,
            "load": {
                "running": dict(load.running),
                "waiting": load.waiting,
                "context_tokens": load.context_tokens,
                "kv_cache_usage": self.tracker.kv_cache_usage(),
            },
            "latency_model": {
                "source": self.source,
                "observations": self.model.num_observations,
                "mean_error": self.model.mean_error,
                "coefficients": self.model.coefficients(),
            },
            "slo": self.slo_json(),
            "decisions": list(self.admission.decisions),
        }

    def slo_json(self) -> dict[str, Any]:
        """What ``auto`` requests aim at now."""
        slo = self.admission.slo
        return {
            "tpot_ms": None if slo is None else slo.tpot_ms,
            "ttft_ms": None if slo is None else slo.ttft_ms,
            "auto_floor": self.admission.floor,
        }

    def predicted_ms(self, profile: str, batch: int) -> float | None:
        """Predicted milliseconds of a step that decodes ``batch`` sequences at one profile; None while nothing is known."""
        if self.model.num_observations == 0:
            return None
        return round(self.model.step_ms(StepLoad({profile: batch})), 3)

    def _learn(self, steps: Sequence[StepLoad], milliseconds: float) -> None:
        self.model.observe(steps, milliseconds)
        if self.source == "none":
            self.source = "online"
        if self.cache is not None and self.model.num_observations % STORE_EVERY == 0:
            self.cache.store_soon(self.model)
