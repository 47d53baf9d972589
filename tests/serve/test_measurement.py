"""serve.measurement: what the sweep leaves behind."""

import asyncio
from types import SimpleNamespace

import pytest

from serve import measurement
from serve.latency_model import LatencyModel
from serve.load import StepLoad


class Control:
    """The parts of a control that a measurement touches."""

    def __init__(self) -> None:
        self.model = LatencyModel(["8"], [8.0])
        self.tracker, self.source, self.stored = None, "none", -1.0

    def store_model(self) -> None:
        self.stored = self.model.step_ms(StepLoad({"8": 16}))

    def predicted_ms(self, profile: str, batch: int) -> float:
        return self.model.step_ms(StepLoad({profile: batch}))


def test_what_is_stored_knows_the_last_steps_of_the_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    control = Control()

    class Swept:
        def __init__(self, *_: object) -> None:
            pass

        async def run(self, *_: object) -> bool:
            for batch in [1] * 96 + [16] * 8:
                control.model.observe([StepLoad({"8": batch})], 20.0 + batch)
            return True

    monkeypatch.setattr(measurement, "Sweep", Swept)
    client = SimpleNamespace(vllm_config=SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=16)))
    asyncio.run(measurement.measure(client, control, 1.0))  # type: ignore[arg-type]
    assert control.source == "sweep"
    assert control.stored == pytest.approx(36, rel=0.05)
