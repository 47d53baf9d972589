"""compat.logs: what the project says at level INFO is seen where vLLM's lines are."""

import logging
from collections.abc import Iterator

import pytest

from matgptq_vllm.compat.logs import PACKAGES, join_vllm_logs


@pytest.fixture
def loggers() -> Iterator[list[logging.Logger]]:
    """vLLM's logger and ours, the latter untouched; afterwards as they were."""
    all_loggers = [logging.getLogger(name) for name in ("vllm", *PACKAGES)]
    kept = [(each.handlers, each.level, each.propagate) for each in all_loggers]
    for each in all_loggers:
        each.handlers, each.propagate = [], True
        each.setLevel(logging.NOTSET)
    yield all_loggers
    for each, (handlers, level, propagate) in zip(all_loggers, kept, strict=True):
        each.handlers, each.propagate = handlers, propagate
        each.setLevel(level)


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.seen.append(record.getMessage())


def test_lines_go_where_vllms_go_at_its_level_and_once(loggers: list[logging.Logger]) -> None:
    lines = Lines()
    loggers[0].addHandler(lines)
    loggers[0].setLevel(logging.INFO)
    loggers[0].propagate = False
    join_vllm_logs()
    join_vllm_logs()
    for name in PACKAGES:
        logging.getLogger(f"{name}.part").info("said by %s", name)
        logging.getLogger(f"{name}.part").debug("too much")
    assert lines.seen == [f"said by {name}" for name in PACKAGES]


def test_where_vllm_sets_up_nothing_neither_do_we(loggers: list[logging.Logger]) -> None:
    join_vllm_logs()
    assert all(not each.handlers and each.propagate for each in loggers)
