"""The search on a machine whose times are made up."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from matgptq_vllm.core.errors import FormatError
from matgptq_vllm.kernels import tables, tuning
from matgptq_vllm.kernels.config import Config
from matgptq_vllm.kernels.tables import Table
from matgptq_vllm.kernels.tune.options import TuneOptions
from matgptq_vllm.kernels.tune.run import tune
from matgptq_vllm.kernels.tune.search import DENSE_MS, Found, problems, search
from matgptq_vllm.kernels.tuning import Hardware, Problem, default

H200 = Hardware("NVIDIA H200", 132, 227 << 10, (9, 0))
OPTIONS = TuneOptions(shapes=((4096, 4096), (896, 4864)), widths=("several", "4"), ms=(8, 64), seconds=100.0)


class MadeUpMachine:
    """Fastest with three units ahead; the dense path is as fast as the fused at M = ``dense_from``. Work takes made-up time."""

    hardware = H200
    by_rule = False

    def __init__(self, dense_from: float = 384, seconds_per_kernel: float = 0.0, seconds_per_round: float = 0.0) -> None:
        self.now = 0.0
        self.timed: list[tuple[Problem, Config]] = []
        self.layers: list[tuple[int, ...]] = []
        self._dense_from = dense_from
        self._seconds_per_kernel = seconds_per_kernel
        self._seconds_per_round = seconds_per_round

    def clock(self) -> float:
        return self.now

    def compile(self, wanted: Iterable[tuple[Problem, Config]], until: float) -> set[tuple[Problem, Config]]:
        ready = set()
        for pair in wanted:
            if self.now + self._seconds_per_kernel > until:
                break
            self.now += self._seconds_per_kernel
            ready.add(pair)
        return ready

    def layer(self, n: int, k: int, group_size: int, narrowest: int, largest_m: int) -> "MadeUpMachine":
        self.layers.append((n, k, group_size, narrowest, largest_m))
        return self

    def fused(self, problem: Problem, configs: Sequence[Config], seconds: float) -> dict[Config, float]:
        self.now += self._seconds_per_round
        self.timed += [(problem, config) for config in configs]
        return {config: self.us(config) for config in configs}

    def crossing(self, problem: Problem, config: Config, m: int, seconds: float) -> tuple[float, float]:
        assert problem.bucket == tables.bucket(m)
        return float(m), float(self._dense_from)

    @staticmethod
    def us(config: Config) -> float:
        return 10.0 + abs(config.depth - 3) + config.split_k / 100 + (config.num_warps == 8)


def found_by(machine: MadeUpMachine, options: TuneOptions = OPTIONS, known: Table | None = None) -> list[Found]:
    return list(search(options, known or Table(), machine, lambda line: None, machine.clock))


def test_every_entry_gets_the_fastest_of_all_that_was_timed():
    machine = MadeUpMachine()
    results = found_by(machine)
    for (n, k), found in zip(OPTIONS.shapes, results, strict=True):
        assert found.missing == 0
        assert found.table.configs.keys() == {problem.key for problem in problems(OPTIONS, n, k)}
        for key, config in found.table.configs.items():
            of_key = [machine.us(timed) for problem, timed in machine.timed if problem.key == key]
            assert machine.us(config) == min(of_key)
            # The second round found what the first does not hold.
            assert config.depth == 3
    assert machine.layers == [(4096, 4096, 128, 2, max(DENSE_MS)), (896, 4864, 128, 2, max(DENSE_MS))]


def test_the_gain_is_over_what_was_in_use():
    problem = Problem(8, 4096, 4096, (4,), 128)
    options = replace(OPTIONS, shapes=((4096, 4096),), widths=("4",), ms=(8,))
    known = Config(8, 32, 8, 1)
    for table, before in ((Table(), default(problem, H200)), (Table({problem.key: known}), known)):
        ((gain,),) = [found.gains for found in found_by(MadeUpMachine(), options, table)]
        assert gain.problem == problem
        assert gain.before_us == MadeUpMachine.us(before)
        assert gain.us < gain.before_us


@pytest.mark.parametrize(("dense_from", "expected"), [(100, 128), (200, 256), (383.5, 384), (1000, 1024), (5000, 2048)])
def test_the_dense_path_starts_where_it_is_faster_from_there_on(dense_from: float, expected: int):
    for found in found_by(MadeUpMachine(dense_from)):
        assert list(found.table.dense_from.values()) == [expected]


def test_where_products_follow_rules_only_the_start_of_the_dense_path_is_sought(tmp_path: Path):
    machine = MadeUpMachine(700)
    machine.by_rule = True
    path = tmp_path / "table.json"
    text = tune(replace(OPTIONS, out=path), machine)
    assert machine.timed == []
    assert tables.read(path) == Table({}, {(4096, 4096): 768, (896, 4864): 768})
    assert "896x4864: from 768 rows of one width on expanded for cuBLAS" in text
    assert "products of fewer rows follow rules on this GPU" in text
    assert f"wrote {path}" in text


def test_what_does_not_fit_into_the_time_is_left_out_and_counted():
    machine = MadeUpMachine(seconds_per_kernel=0.5, seconds_per_round=4.0)
    results = found_by(machine, replace(OPTIONS, seconds=30.0))
    # The last products may be under way when the time is over.
    assert machine.now <= 45.0
    assert len(results) == 2
    assert 0 < sum(found.missing for found in results) < 8
    assert sum(len(found.gains) + found.missing for found in results) == 8


def test_a_machine_that_compiles_nothing_yields_no_entry():
    for found in found_by(MadeUpMachine(seconds_per_kernel=1e9)):
        assert found == Found(Table(), [], 4)


def test_the_table_is_written_added_to_and_summed_up(tmp_path: Path):
    path = tmp_path / "table.json"
    kept = tables.Key(8, 32, 32, "8", 8)
    tables.write(path, Table({kept: Config(16, 64, 4, 1)}), H200.name)
    text = tune(replace(OPTIONS, out=path), MadeUpMachine())
    table = tables.read(path)
    assert len(table.configs) == 9
    assert kept in table.configs
    assert table.dense_from == {(4096, 4096): 512, (896, 4864): 512}
    assert "NVIDIA H200: 8 entries" in text
    assert "4096x4096 widths several: 1." in text
    assert "x as fast as before" in text
    assert f"wrote {path}" in text


def test_what_was_written_is_what_is_chosen(tmp_path: Path):
    tune(replace(OPTIONS, out=tmp_path / "table.json"), MadeUpMachine())
    table = tables.read(tmp_path / "table.json")
    for problem in problems(OPTIONS, 4096, 4096):
        assert tuning.pick(problem, H200, table) == table.configs[problem.key]


def test_nothing_is_written_when_nothing_was_found(tmp_path: Path):
    text = tune(replace(OPTIONS, out=tmp_path / "table.json"), MadeUpMachine(seconds_per_kernel=1e9))
    assert not list(tmp_path.iterdir())
    assert "8 entries were not measured in the time allowed; run again with more --seconds" in text


def test_a_damaged_table_is_refused_before_anything_is_measured(tmp_path: Path):
    path, machine = tmp_path / "table.json", MadeUpMachine()
    path.write_text("{}")
    with pytest.raises(FormatError, match=r"table\.json: has format None"):
        tune(replace(OPTIONS, out=path), machine)
    assert machine.timed == []
