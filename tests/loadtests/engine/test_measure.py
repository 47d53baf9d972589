"""loadtests.engine.measure: when an engine that waits for its turn begins."""

from io import StringIO

import pytest

from loadtests.engine.measure import wait_for_turn


def test_a_line_says_that_its_turn_has_come() -> None:
    wait_for_turn(StringIO("begin\n"))


def test_without_the_process_that_started_it_nothing_is_measured() -> None:
    with pytest.raises(SystemExit, match="the process that started this engine has ended"):
        wait_for_turn(StringIO(""))
