"""loadtests.engine.worker: what runs on the device is seen by name."""

import torch

from loadtests.engine.worker import NAME_LENGTH, MeasuredWorker


def test_the_profile_of_a_worker_has_what_ran() -> None:
    worker = MeasuredWorker()
    worker.begin_profile()
    for _ in range(3):
        torch.ones(64, 64) @ torch.ones(64, 64)
    found = worker.end_profile()
    assert all(len(name) <= NAME_LENGTH for name in found)
    if not torch.cuda.is_available():
        us, calls = found["aten::mm"]
        assert (us > 0, calls) == (True, 3)
