"""core.read_ahead: results in order, several at a time, few waiting."""

import threading
import time

import pytest

from matgptq_vllm.core.read_ahead import in_order, num_threads


def test_results_come_in_order_though_work_overlaps() -> None:
    together = threading.Barrier(2, timeout=20)

    def work(item: int) -> int:
        if item < 2:
            together.wait()  # only passed if both run at once
        time.sleep(0.01 if item % 2 else 0)
        return item

    assert list(in_order(work, range(50))) == list(range(50))


def test_no_more_results_wait_than_threads_can_hold() -> None:
    begun: list[int] = []
    results = in_order(lambda item: begun.append(item) or item, range(1000))
    next(results)
    time.sleep(0.1)
    assert len(begun) <= 2 * num_threads()
    results.close()
    assert len(begun) <= 2 * num_threads()


def test_an_error_comes_where_its_result_would_have_come() -> None:
    results = in_order(lambda item: 1 // (item - 2), range(9))
    assert [next(results), next(results)] == [-1, -1]
    with pytest.raises(ZeroDivisionError):
        next(results)
