"""The tenant file while the server runs."""

import logging
import os
import threading
import time
from pathlib import Path

import pytest

from matgptq_vllm.core.errors import FormatError
from matgptq_vllm.core.precision import Catalogue
from serve import tenant_reload
from serve.api_keys import digest_of
from serve.quotas import Quotas
from serve.tenant_reload import TenantReload

CATALOGUE = Catalogue(("2", "3", "4", "8"), "8")
KEY, OTHER = "sk-0123456789abcdef-secret", "sk-fedcba9876543210-secret"


def text(name: str = "a", key: str = KEY, more: str = "requests_per_minute: 2") -> str:
    return f"tenants:\n  {name}:\n    keys: [{digest_of(key)}]\n    {more}\n"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "tenants.yaml"
    file.write_text(text())
    return file


@pytest.fixture
def reload(path: Path) -> TenantReload:
    """Looks only when it is told to."""
    return TenantReload(path, interval_s=None)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths that were read since."""
    read, done = tenant_reload.read_bounded, []
    monkeypatch.setattr(tenant_reload, "read_bounded", lambda path: done.append(os.fspath(path)) or read(path))
    return done


def replace(path: Path, content: str) -> None:
    new = path.with_suffix(".new")
    new.write_text(content)
    new.rename(path)


def test_a_changed_file_comes_into_force(reload, path):
    before = reload.current()
    assert not reload.check()
    assert reload.current() is before
    replace(path, text("b", OTHER))
    assert reload.check()
    assert (reload.current().find(KEY), reload.current().find(OTHER).name) == (None, "b")
    assert before.find(KEY).name == "a"


def test_a_change_in_place_that_keeps_size_and_time_is_noticed(reload, path):
    reload.check()
    times = os.stat(path)
    path.write_text(text("b"))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert reload.check()
    assert reload.current().names == ("b",)


def test_two_changes_within_one_tick_of_the_clock_are_both_noticed(reload, path, monkeypatch):
    # The second change has the signature of the first: only its content tells them apart.
    monkeypatch.setattr(tenant_reload, "_signature", lambda path: (1, 2, 3, 4, 5))
    path.write_text(text("b"))
    assert reload.check()
    path.write_text(text("c"))
    assert reload.check()
    assert reload.current().names == ("c",)


def test_a_file_at_rest_is_not_read(reload, reads):
    reload.check()
    del reads[:]
    for _ in range(5):
        assert not reload.check()
    assert reads == []


def test_a_file_that_was_only_touched_changes_nothing(reload, path, reads):
    before = reload.current()
    os.utime(path, ns=(1, 1))
    assert not reload.check()
    assert reads == [os.fspath(path)]
    assert reload.current() is before


def test_a_wrong_file_is_logged_once_with_the_line_and_the_old_one_stays(reload, path, caplog):
    replace(path, text(more="requests_per_minute: many"))
    for _ in range(3):
        assert not reload.check()
    assert reload.current().find(KEY).requests_per_minute == 2
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert f"{path}:4:26: tenant 'a': requests_per_minute is 'many'" in caplog.text
    assert "stay in force" in caplog.text
    assert "many" in reload.error


def test_a_wrong_file_that_is_put_right_comes_into_force(reload, path):
    replace(path, "tenants: [")
    assert not reload.check()
    replace(path, text("b"))
    assert reload.check()
    assert (reload.current().names, reload.error) == (("b",), None)


def test_a_wrong_file_that_is_taken_back_is_no_error_any_more(reload, path):
    replace(path, "tenants: [")
    reload.check()
    replace(path, text())
    assert reload.check()
    assert (reload.current().names, reload.error) == (("a",), None)


def test_a_key_never_reaches_the_log(reload, path, caplog):
    caplog.set_level(logging.DEBUG)
    replace(path, f"tenants:\n  a:\n    keys: [{OTHER}]\n")
    reload.check()
    replace(path, text("b", OTHER))
    reload.check()
    assert "hash-key" in caplog.text
    assert OTHER not in caplog.text
    assert digest_of(OTHER) not in caplog.text


def test_a_file_that_is_gone_is_logged_once_and_its_return_noticed(reload, path, caplog):
    path.unlink()
    for _ in range(3):
        assert not reload.check()
    assert reload.current().names == ("a",)
    assert len(caplog.records) == 1
    assert "No such file" in reload.error
    path.write_text(text())
    assert reload.check()
    assert (reload.current().names, reload.error) == (("a",), None)


def test_a_link_that_points_elsewhere_is_a_change(tmp_path, path):
    link, other = tmp_path / "link.yaml", tmp_path / "other.yaml"
    link.symlink_to(path)
    other.write_text(text("b"))
    reload = TenantReload(link, interval_s=None)
    link.unlink()
    link.symlink_to(other)
    assert reload.check()
    assert reload.current().names == ("b",)


def test_what_came_and_went_is_logged_by_name(reload, path, caplog):
    caplog.set_level(logging.INFO)
    replace(path, text("b"))
    reload.check()
    assert "1 tenants with 1 keys are in force; added: b; removed: a" in caplog.text


@pytest.mark.parametrize("content", ["", "tenants: {}", text(more="x: 1")])
def test_the_first_file_must_be_right(path, content):
    path.write_text(content)
    with pytest.raises(FormatError, match=rf"^{path}:\d+:\d+: "):
        TenantReload(path, interval_s=None)


def test_profiles_are_checked_from_when_the_replica_is_known(reload, path):
    replace(path, text(more="auto_floor: 6"))
    assert reload.check()
    with pytest.raises(FormatError, match=r"4:17: tenant 'a': auto_floor is '6', which this replica does not hold"):
        reload.bind(CATALOGUE)
    replace(path, text(more="auto_floor: 4"))
    reload.bind(CATALOGUE)
    assert reload.current().find(KEY).floor == "4"
    replace(path, text(more="auto_floor: 6"))
    assert not reload.check()
    assert reload.current().find(KEY).floor == "4"


def test_what_tenants_used_survives_a_reload(reload, path):
    now = 0.0
    quotas = Quotas(reload.current, lambda: now)
    for _ in range(2):
        assert quotas.admit(reload.current().find(KEY), 1).allowed
    replace(path, text("a", OTHER) + f"  b:\n    keys: [{digest_of(KEY)}]\n")
    assert reload.check()
    assert quotas.admit(reload.current().find(OTHER), 1).reason == "requests"
    assert quotas.admit(reload.current().find(KEY), 1).allowed
    assert len(quotas) == 2
    replace(path, text("b"))
    assert reload.check()
    quotas.admit(reload.current().find(KEY), 1)
    assert len(quotas) == 1


def test_a_thread_looks_by_itself_until_it_is_closed(path):
    reload = TenantReload(path, interval_s=0.01)
    try:
        replace(path, text("b"))
        deadline = time.monotonic() + 20
        while reload.current().names != ("b",) and time.monotonic() < deadline:
            time.sleep(0.005)
        assert reload.current().names == ("b",)
    finally:
        reload.close()
    assert "tenant-file" not in [thread.name for thread in threading.enumerate()]


def test_the_thread_outlives_a_bug_and_tells_of_it(path, monkeypatch, caplog):
    looks = threading.Semaphore(0)

    def fail(path: str) -> bytes:
        looks.release()
        raise RuntimeError("a bug")

    reload = TenantReload(path, interval_s=0.01)
    try:
        monkeypatch.setattr(tenant_reload, "read_bounded", fail)
        replace(path, text("b"))
        assert [looks.acquire(timeout=20) for _ in range(2)] == [True, True]
    finally:
        reload.close()
    assert "looking at the tenant file" in caplog.text
    assert reload.current().names == ("a",)
