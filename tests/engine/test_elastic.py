"""engine.elastic: the order of what happens to layers and memory, and what a failure leaves behind."""

import threading

import pytest
import torch

from matgptq_vllm.core.errors import InputError, UnsupportedError
from matgptq_vllm.engine.elastic import ElasticPlanes


class Log(list):
    """What happened, in order."""


class Memory:
    def __init__(self, log: Log, plane: int):
        self.log, self.plane, self.full = log, plane, False

    def allocate(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def drop(self) -> None:
        self.log.append(("drop", self.plane))

    def restore(self) -> None:
        if self.full:
            raise UnsupportedError("out of memory")
        self.log.append(("restore", self.plane))

    def filled(self) -> None:
        self.log.append(("filled", self.plane))


class Layer:
    def __init__(self, log: Log):
        self.log, self.may_load = log, threading.Event()

    def limit(self, max_width: int) -> None:
        self.log.append(("limit", max_width))

    def load(self, planes: range) -> None:
        assert self.may_load.wait(20)
        self.log.append(("load", planes))


@pytest.fixture
def made() -> tuple[ElasticPlanes, Log, Layer, dict[int, Memory]]:
    log, memories = Log(), {}
    elastic = ElasticPlanes((2, 1, 1, 2, 2), "nested", 8, lambda plane: memories.setdefault(plane, Memory(log, plane)))
    layer = Layer(log)
    elastic.add(layer)
    return elastic, log, layer, memories


def finished(elastic: ElasticPlanes) -> None:
    assert elastic._growing is not None
    elastic._growing[1].exception(20)
    elastic.finish()


def test_rows_are_limited_before_memory_goes_and_after_it_is_filled(made) -> None:
    elastic, log, layer, _ = made
    elastic.shrink(3)
    assert log == [("limit", 3), ("drop", 2), ("drop", 3), ("drop", 4)]
    log.clear()
    elastic.grow(6)
    assert (elastic.growing, elastic.max_width) == (True, 3)
    elastic.finish()
    assert elastic.max_width == 3  # not before the planes are read
    layer.may_load.set()
    finished(elastic)
    assert log == [("restore", 2), ("restore", 3), ("load", range(2, 4)), ("filled", 2), ("filled", 3), ("limit", 6)]
    assert (elastic.growing, elastic.max_width, elastic.failure) == (False, 6, None)


def test_the_plane_of_every_width_is_not_dropped(made) -> None:
    elastic, _, _, memories = made
    assert sorted(memories) == [1, 2, 3, 4]
    assert elastic.new_tensor(0, (2, 3), torch.int16) is None
    assert elastic.new_tensor(1, (2, 3), torch.int16).shape == (2, 3)


def test_if_memory_is_short_all_is_as_before(made) -> None:
    elastic, log, _, memories = made
    elastic.shrink(4)
    log.clear()
    memories[4].full = True
    elastic.grow(8)
    finished(elastic)
    assert log == [("restore", 3), ("drop", 3)]
    assert (elastic.max_width, elastic.failure, elastic.growing) == (4, "out of memory", False)


def test_if_reading_fails_the_memory_goes_again(made, monkeypatch) -> None:
    elastic, log, layer, _ = made
    elastic.shrink(6)
    log.clear()
    monkeypatch.setattr(layer, "load", lambda planes: 1 // 0)
    elastic.grow(8)
    finished(elastic)
    assert log == [("restore", 4), ("drop", 4)]
    assert elastic.failure.startswith("ZeroDivisionError")


@pytest.mark.parametrize("wrong", [5, 8, 9])
def test_only_what_is_narrower_or_wider_and_available_is_taken(made, wrong: int) -> None:
    elastic, log, layer, _ = made
    with pytest.raises(InputError):
        elastic.shrink(wrong)
    with pytest.raises(InputError):
        elastic.grow(wrong)
    assert log == []
    elastic.shrink(2)
    elastic.grow(4)
    with pytest.raises(InputError, match="are being read"):
        elastic.shrink(2)
    layer.may_load.set()
    finished(elastic)
