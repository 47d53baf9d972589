"""Prompts in chunks, told from running sequences that get no token."""

import pytest

from serve.chunk_detector import ChunkDetector

QUIET, SILENT, STARTED = (False, False), (True, False), (False, True)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([QUIET, QUIET], [False, False]),
        ([SILENT, STARTED, QUIET], [False, False, False]),
        ([SILENT, SILENT, STARTED, QUIET], [False, True, True, False]),
        ([SILENT, SILENT, SILENT, STARTED, STARTED], [False, True, True, True, False]),
        ([SILENT, QUIET, SILENT, QUIET], [False, False, False, False]),
        # It was abandoned before its last chunk.
        ([SILENT, SILENT, QUIET, STARTED], [False, True, False, False]),
    ],
)
def test_silence_twice_in_a_row_is_a_chunk_and_so_is_the_start_that_ends_it(steps, expected):
    detector = ChunkDetector()
    assert [detector.seen(silent, started) for silent, started in steps] == expected
