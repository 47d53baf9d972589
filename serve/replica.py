"""What a replica's workers report, as the HTTP side uses it."""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from matgptq_vllm.core.errors import UnsupportedError
from matgptq_vllm.core.precision import Catalogue, alias
from serve.selection import base_models

REPLICA_RPC = "matgptq_replica"
"""Name of the worker method that reports on a replica."""

LIVE_FIELDS = ("runner", "code_bytes", "scale_bytes", "other_bytes", "steps", "tokens")
"""Fields of a worker's report that differ between workers, or change while it runs."""

Report = Mapping[str, Any]


@dataclass(frozen=True)
class Replica:
    """The profiles that one replica holds; the same on all its workers."""

    catalogue: Catalogue
    max_width: int
    slice_rule: str
    average_bits: Mapping[str, float]
    """Profile -> bits read per weight, mean over the quantized weights."""

    bytes_per_weight: Mapping[str, float]
    """Profile -> bytes read per weight, scales included."""

    perplexity: Mapping[str, float]
    """Profile -> perplexity, of those that the parent's evaluation report has."""

    models: tuple[str, ...]
    """Names under which the model is served, aliases left out."""

    profile_widths: Mapping[str, int] = field(default_factory=dict)
    """Profile -> the max width that it needs."""

    memory: Mapping[str, Any] = field(default_factory=dict)
    """Bytes of all weights by max width, and what a memory budget led to."""

    @classmethod
    def from_reports(cls, reports: Sequence[Report], served_names: Collection[str]) -> "Replica":
        """The replica whose workers reported ``reports``.

        Raises:
            UnsupportedError: there are no reports, they lack a field, or the workers hold different profiles.
        """
        try:
            found = [
                (
                    Catalogue(tuple(report["profiles"]), report["default"]),
                    int(report["max_width"]),
                    str(report["slice_rule"]),
                    dict(report["average_bits"]),
                    dict(report["bytes_per_weight"]),
                    dict(report.get("perplexity", {})),
                    dict(report["profile_widths"]),
                    {
                        "budget_bytes": report["memory_budget"],
                        "reason": report["memory_reason"],
                        "weight_bytes": dict(report["weight_bytes"]),
                    },
                )
                for report in reports
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise UnsupportedError(
                f"a worker's report is damaged ({type(error).__name__}: {error}); start the replica with `matgptq serve`"
            ) from error
        if not found or any(other[:3] != found[0][:3] for other in found):
            raise UnsupportedError(
                f"the workers hold {[other[0].profiles for other in found]}; all must hold the same profiles: start all "
                "workers with the same parent and options"
            )
        catalogue = found[0][0]
        return cls(*found[0][:6], base_models(served_names, catalogue), *found[0][6:])

    def within(self, max_width: int) -> "Replica":
        """This replica as long as it holds no more than ``max_width``."""
        return replace(self, catalogue=self.catalogue.within(max_width, self.profile_widths), max_width=max_width)

    def to_json(self, workers: Sequence[Report] | None) -> dict[str, Any]:
        """The document of ``GET /v1/precisions``; ``workers`` are fresh reports, None if they did not come in time."""
        precisions = [
            {
                "id": name,
                "object": "precision",
                "default": name == self.catalogue.default,
                "average_bits": self.average_bits.get(name),
                "bytes_per_weight": self.bytes_per_weight.get(name),
                "perplexity": self.perplexity.get(name),
                "models": [alias(model, name) for model in self.models],
            }
            for name in self.catalogue.profiles
        ]
        live = None if workers is None else [{key: worker.get(key) for key in LIVE_FIELDS} for worker in workers]
        return {
            "object": "list",
            "data": precisions,
            "default": self.catalogue.default,
            "max_width": self.max_width,
            "slice_rule": self.slice_rule,
            "memory": dict(self.memory),
            "workers": live,
        }


class LiveReports:
    """Fresh reports, one call to the workers at a time: any number of clients cost the engine no more than one."""

    def __init__(self, fetch: Callable[[], Awaitable[Sequence[Report]]], timeout_s: float):
        self._fetch = fetch
        self._timeout_s = timeout_s
        self._running: asyncio.Task[Sequence[Report]] | None = None

    async def get(self) -> Sequence[Report] | None:
        """The workers' reports, or None if they take longer than the timeout. Errors of the engine are passed on."""
        if self._running is None or self._running.done():
            self._running = asyncio.ensure_future(self._call())
        running = self._running
        # Not wait_for: it would cancel the call, which is still under way in the engine and serves the next client.
        await asyncio.wait({running}, timeout=self._timeout_s)
        return running.result() if running.done() else None

    async def _call(self) -> Sequence[Report]:
        return await self._fetch()
