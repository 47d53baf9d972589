"""A run with times made up: those of ``anchors`` at two values of M, ours given by the test."""

from collections.abc import Callable, Mapping

import pytest

from matgptq_vllm.kernels.bench.competitors import ALL
from matgptq_vllm.kernels.bench.results import Cell, Device, Failure, Results
from matgptq_vllm.kernels.bench.shapes import MODELS

MODEL = "llama-3.1-8b"


@pytest.fixture
def results_of() -> Callable[..., Results]:
    def make(sums: Mapping[tuple[str, int], float], failures: tuple[Failure, ...] = (), name: str = "NVIDIA H200") -> Results:
        """A run whose layer sums are ``sums``, each layer's part in proportion to its weights."""
        total = sum(shape.num_weights for shape in MODELS[MODEL])
        cells = [
            Cell(
                model=MODEL,
                layer=shape.layer,
                n=shape.n,
                k=shape.k,
                competitor=key,
                m=m,
                us=(us := whole * shape.num_weights / total),
                low_us=0.9 * us,
                high_us=1.1 * us,
                rounds=5,
                bytes_read=shape.num_weights // 2,
                error=0.003,
            )
            for (key, m), whole in sums.items()
            for shape in MODELS[MODEL]
        ]
        keys = {key for key, _ in sums} | {failure.competitor for failure in failures}
        return Results(
            device=Device(name, 4.0e12, {"torch": "2.11.0"}),
            group_size=128,
            rule="curved",
            competitors=[competitor.key for competitor in ALL if competitor.key in keys],
            ms=sorted({m for _, m in sums}),
            cells=cells,
            failures=failures,
        )

    return make
