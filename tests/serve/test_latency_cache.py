"""serve.latency_cache: what one start learned is there at the next, and a damaged file is no harm."""

import json

import pytest

from serve.latency_cache import LatencyCache, cache_folder
from serve.latency_model import LatencyModel
from serve.load import StepLoad

KEY = {"device": "cpu", "parent": "abc"}


def model() -> LatencyModel:
    return LatencyModel(["2", "8"], [2.0, 8.0])


def learned() -> LatencyModel:
    result = model()
    for _ in range(8):
        result.observe([StepLoad({"8": 4})], 20.0)
    return result


def test_what_was_stored_comes_back(tmp_path):
    LatencyCache(tmp_path / "new", KEY).store(learned())
    found = model()
    assert LatencyCache(tmp_path / "new", KEY).restore(found)
    assert found.step_ms(StepLoad({"8": 4})) == learned().step_ms(StepLoad({"8": 4}))


def test_another_machine_or_parent_has_a_file_of_its_own(tmp_path):
    LatencyCache(tmp_path, KEY).store(learned())
    assert not LatencyCache(tmp_path, {**KEY, "device": "NVIDIA H200"}).restore(model())


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"{}", b'{"key": {}, "model": {}}', b"\xff"])
def test_a_damaged_file_is_not_used(tmp_path, damage):
    cache = LatencyCache(tmp_path, KEY)
    cache.store(learned())
    cache.path.write_bytes(damage)
    assert not cache.restore(model())


def test_numbers_that_cannot_be_are_not_used(tmp_path, caplog):
    cache = LatencyCache(tmp_path, KEY)
    cache.store(learned())
    document = json.loads(cache.path.read_text())
    document["model"]["coefficients"][0] = -1
    cache.path.write_text(json.dumps(document))
    assert not cache.restore(model())
    assert str(cache.path) in caplog.text


def test_a_folder_that_cannot_be_written_is_logged(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    LatencyCache(tmp_path / "file" / "below", KEY).store(learned())
    assert "cannot be kept" in caplog.text


def test_what_is_written_in_another_thread_is_the_model_at_the_time_of_the_call(tmp_path):
    cache, known = LatencyCache(tmp_path, KEY), learned()
    document = known.to_json()
    writer = cache.store_soon(known)
    known.observe([StepLoad({"8": 1})], 500.0)
    writer.join()
    found = model()
    assert cache.restore(found)
    assert found.to_json() == document


def test_the_folder_is_the_users_unless_said(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder(None) == tmp_path / "matgptq-vllm" / "latency"
    assert str(cache_folder("/elsewhere")) == "/elsewhere"
