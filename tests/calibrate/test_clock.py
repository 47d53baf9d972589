import time

import torch

from calibrate.clock import PhaseClock, peak_device_bytes, peak_host_bytes

CPU = torch.device("cpu")


def test_time_counts_for_the_innermost_phase_only():
    clock = PhaseClock(CPU)
    with clock.phase("outer"):
        time.sleep(0.02)
        with clock.phase("inner"):
            time.sleep(0.05)
        time.sleep(0.02)
    found = clock.seconds()
    assert found["inner"] >= 0.05
    assert found["outer"] >= 0.04
    with clock.phase("inner"):
        time.sleep(0.02)
    again = clock.seconds()
    assert again["inner"] >= found["inner"] + 0.02
    assert again["outer"] == found["outer"]


def test_peaks_are_of_the_process_where_there_is_no_gpu():
    assert peak_device_bytes(CPU) is None
    assert peak_host_bytes() > 10_000_000
