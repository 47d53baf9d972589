import json
import os
import subprocess
import sys

import pytest

from calibrate.search.fitness import JournaledFitness
from calibrate.search.journal import JOURNAL_FILE, Journal
from matgptq_vllm.core.errors import FormatError, InputError

INPUTS = {"parent": "abc", "--seed": "0"}


def record(directory, genome=(2, 3), values=None):
    with Journal(directory, INPUTS) as journal:
        journal.add(genome, {0: 0.1, 5: 1 / 3} if values is None else values)


def test_measurements_come_back_bit_by_bit(tmp_path):
    record(tmp_path)
    record(tmp_path, values={1: 1e-17})
    record(tmp_path, genome=(8, 8))
    with Journal(tmp_path, INPUTS) as journal:
        assert journal.measured == {(2, 3): {0: 0.1, 5: 1 / 3, 1: 1e-17}, (8, 8): {0: 0.1, 5: 1 / 3}}


@pytest.mark.parametrize("cut", [1, 2, 20, 44])
def test_a_line_that_was_cut_off_is_dropped_and_the_next_begins_on_its_own(tmp_path, cut):
    record(tmp_path)
    record(tmp_path, genome=(4, 4))
    path = tmp_path / JOURNAL_FILE
    os.truncate(path, path.stat().st_size - cut)
    with Journal(tmp_path, INPUTS) as journal:
        assert journal.measured.keys() == {(2, 3)}
        journal.add((6, 6), {0: 2.0})
    with Journal(tmp_path, INPUTS) as journal:
        assert journal.measured.keys() == {(2, 3), (6, 6)}
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_journal_cut_within_its_first_line_begins_anew(tmp_path):
    record(tmp_path)
    os.truncate(tmp_path / JOURNAL_FILE, 5)
    record(tmp_path, genome=(4, 4))
    with Journal(tmp_path, INPUTS) as journal:
        assert journal.measured.keys() == {(4, 4)}


def test_other_inputs_are_refused_by_name_until_told_to_restart(tmp_path):
    record(tmp_path)
    other = {**INPUTS, "--seed": "1"}
    with (
        pytest.raises(InputError, match=r"--seed was 0, is 1\. Run that command again .* --restart"),
        Journal(tmp_path, other),
    ):
        pass
    with Journal(tmp_path, INPUTS) as journal:
        assert journal.measured
    with Journal(tmp_path, other, restart=True) as journal:
        assert not journal.measured
        journal.add((2, 2), {0: 1.0})
    with Journal(tmp_path, other) as journal:
        assert journal.measured.keys() == {(2, 2)}


def test_an_altered_journal_is_an_error_that_says_what_to_do(tmp_path):
    record(tmp_path)
    with (tmp_path / JOURNAL_FILE).open("a") as file:
        file.write("{nonsense\n")
    with pytest.raises(FormatError, match="--restart"), Journal(tmp_path, INPUTS):
        pass


def test_two_searches_of_one_parent_do_not_run_at_once(tmp_path):
    code = (
        "import sys; from pathlib import Path; from calibrate.search.journal import Journal\n"
        "from matgptq_vllm.core.errors import InputError\n"
        "try:\n    Journal(Path(sys.argv[1]), {}).__enter__()\nexcept InputError as error: print(error)"
    )
    with Journal(tmp_path, INPUTS) as journal:
        journal.add((2, 2), {0: 1.0})
        output = subprocess.check_output([sys.executable, "-c", code, tmp_path], text=True)
    assert "another search" in output


def test_a_journal_without_measurements_is_not_left_behind(tmp_path):
    with Journal(tmp_path, INPUTS):
        assert (tmp_path / JOURNAL_FILE).exists()
    assert list(tmp_path.iterdir()) == []


def test_names_being_stored_are_remembered(tmp_path):
    with Journal(tmp_path, INPUTS) as journal:
        journal.add((2, 2), {0: 1.0})
        journal.mark_stored(["mix-3.0"])
    with Journal(tmp_path, INPUTS) as journal:
        assert journal.stored == {"mix-3.0"}
        journal.remove()
    assert list(tmp_path.iterdir()) == []


def test_fitness_measures_each_window_once_and_counts_what_is_new(tmp_path):
    calls, counted = [], []

    def measure(genome, windows):
        calls.append((genome, list(windows)))
        return [float(sum(genome) * window) for window in windows]

    with Journal(tmp_path, INPUTS) as journal:
        fitness = JournaledFitness(measure, journal, counted.append)
        assert fitness((1, 2), [1, 3]) == 6.0
        assert fitness((1, 2), [3, 3, 3, 1]) == 7.5
        assert fitness((1, 2), range(4)) == 4.5
        assert fitness((1, 1), [2]) == 4.0
    assert calls == [((1, 2), [1, 3]), ((1, 2), [0, 2]), ((1, 1), [2])]
    assert counted == [2, 0, 2, 1]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_divergence_that_is_not_finite_is_an_error_and_is_not_recorded(tmp_path, value):
    with Journal(tmp_path, INPUTS) as journal:
        fitness = JournaledFitness(lambda genome, windows: [value] * len(windows), journal)
        with pytest.raises(InputError, match="NaN or infinite"):
            fitness((2, 2), [0])
        assert not journal.measured
