from dataclasses import replace
from pathlib import Path

import pytest
import torch

from matgptq_vllm.core.errors import FormatError, UnsupportedError
from matgptq_vllm.core.precision import WIDTHS
from matgptq_vllm.kernels import tables, tuning
from matgptq_vllm.kernels.config import MAX_SPLIT_ROWS, Config
from matgptq_vllm.kernels.layout import PAD_N, padded
from matgptq_vllm.kernels.tables import Key, Table
from matgptq_vllm.kernels.tuning import Hardware, Problem, default, fitted, pick

H200 = Hardware("NVIDIA H200", 132, 227 << 10, (9, 0))
A10 = Hardware("NVIDIA A10", 72, 99 << 10, (8, 6))
CPU = torch.device("cpu")
PROBLEM = Problem(16, 4096, 4096, WIDTHS, 128)
CONFIG = Config(16, 32, 4, 2, split_k=2)


@pytest.fixture
def user_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory of user tables, with nothing remembered of others."""

    def forget() -> None:
        for cached in (tuning._choose, tuning.dense_from, tuning.table_of, tuning.hardware_of):
            cached.cache_clear()

    monkeypatch.setenv("MATGPTQ_TUNING_DIR", str(tmp_path))
    monkeypatch.setattr(tables, "SHIPPED", tmp_path / "no-tables-are-shipped")
    forget()
    yield tmp_path
    forget()


def is_allowed(config: Config, problem: Problem, hardware: Hardware) -> bool:
    return (
        config.num_warps * config.block_m * config.block_n * 4 <= hardware.shared_bytes
        and padded(problem.n, PAD_N) % config.block_n == 0
        and 1 <= config.split_k <= problem.units
        and config.depth >= 1
        and (config.max_registers is None or config.num_warps * 32 * config.max_registers <= 65536)
        and (config.split_k == 1 or problem.bucket <= MAX_SPLIT_ROWS)
        and (hardware.capability >= (9, 0) or not config.pdl)
    )


@pytest.mark.parametrize("hardware", [H200, A10, tuning.hardware_of(CPU)], ids=lambda hardware: hardware.name)
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (28672, 8192), (130, 520), (1, 32)])
@pytest.mark.parametrize("bucket", [8, 16, 64, 128, 256, 512, 8192])
def test_the_rule_keeps_to_the_limits_for_every_gpu_shape_and_m(hardware: Hardware, n: int, k: int, bucket: int):
    problem = Problem(bucket, n, k, WIDTHS, 128)
    config = default(problem, hardware)
    assert is_allowed(config, problem, hardware)
    assert config.block_m == min(bucket, 32)
    assert config.pdl == (hardware is H200)


@pytest.mark.parametrize(
    ("bucket", "n", "k", "expected"),
    [
        (8, 28672, 4096, Config(8, 16, 4, 1, pdl=True)),  # 1792 tiles: a few warps each
        (8, 4096, 4096, Config(8, 16, 8, 1, pdl=True)),  # 256 tiles: more warps
        (8, 1024, 14336, Config(8, 16, 8, 1, split_k=2, pdl=True)),  # 64 tiles: K is split too
        (8, 1024, 1024, Config(8, 16, 8, 1, pdl=True)),  # with 8 units, only for idle warps
        (16, 1024, 14336, Config(16, 32, 8, 1, split_k=4, pdl=True)),
    ],
)
def test_by_rule_more_warps_share_k_the_fewer_tiles_there_are(bucket: int, n: int, k: int, expected: Config):
    assert default(Problem(bucket, n, k, WIDTHS, 128), H200) == expected


def test_a_configuration_beyond_the_limits_is_brought_within_them():
    greedy = Config(32, 64, 16, 3, split_k=40, max_registers=168, pdl=True)
    for hardware in (H200, A10):
        for bucket in (8, 256, 512):
            problem = replace(PROBLEM, bucket=bucket, k=14336)
            config = fitted(greedy, problem, hardware)
            assert is_allowed(config, problem, hardware)
            assert (config.block_m, config.block_n) == (32, 64)
    assert fitted(greedy, replace(PROBLEM, bucket=512), H200).split_k == 1
    assert fitted(greedy, PROBLEM, H200).pdl
    assert not fitted(greedy, PROBLEM, A10).pdl


def test_the_sums_of_all_warps_fit_in_shared_memory():
    config = Config(32, 64, 16, 1)  # 128 KiB
    assert fitted(config, PROBLEM, H200).num_warps == 16
    assert fitted(config, PROBLEM, A10).num_warps == 8


def test_no_warp_is_promised_more_registers_than_there_are():
    assert fitted(Config(8, 16, 16, 1, max_registers=128), PROBLEM, H200).max_registers == 128
    assert fitted(Config(8, 16, 16, 1, max_registers=136), PROBLEM, H200).max_registers is None
    assert fitted(Config(8, 16, 8, 1, max_registers=248), PROBLEM, H200).max_registers == 248


@pytest.mark.parametrize(
    ("k", "warps", "split", "depth", "expected"),
    [
        (2048, 4, 8, 1, (4, 1)),  # 16 units: 4 programs of 4 warps
        (2048, 8, 2, 3, (2, 1)),
        (2048, 8, 1, 3, (1, 2)),
        (2432, 4, 2, 3, (2, 3)),  # 19 units
        (520, 8, 4, 2, (1, 1)),  # fewer than warps
    ],
)
def test_k_is_split_and_read_ahead_no_further_than_warps_have_units(
    k: int, warps: int, split: int, depth: int, expected: tuple[int, int]
):
    config = fitted(Config(16, 32, warps, depth, split), replace(PROBLEM, k=k), H200)
    assert (config.split_k, config.depth) == expected
    assert config.num_warps == warps


def test_one_within_the_limits_stays_as_it_is():
    assert fitted(CONFIG, PROBLEM, H200) == CONFIG


def test_what_was_measured_is_taken():
    other = Config(32, 64, 8, 1)
    table = Table({PROBLEM.key: CONFIG, PROBLEM.key._replace(bucket=32): other, PROBLEM.key._replace(widths="4"): other})
    assert pick(PROBLEM, H200, table) == CONFIG
    assert pick(replace(PROBLEM, bucket=32), H200, table) == other
    assert pick(replace(PROBLEM, widths=(4,)), H200, table) == other


@pytest.mark.parametrize(
    ("wanted", "nearest"),
    [
        (PROBLEM.key._replace(bucket=128), PROBLEM.key._replace(bucket=64)),
        (PROBLEM.key._replace(n=5120, k=5120), PROBLEM.key),
        (PROBLEM.key._replace(n=24576), PROBLEM.key._replace(n=28672)),
        (PROBLEM.key._replace(group_size=64), PROBLEM.key),
        (PROBLEM.key._replace(widths="3"), PROBLEM.key._replace(widths="4")),
        (PROBLEM.key._replace(widths="8"), PROBLEM.key._replace(widths="4")),
    ],
)
def test_an_unknown_product_is_served_by_the_nearest_known(wanted: Key, nearest: Key):
    known = [PROBLEM.key, PROBLEM.key._replace(bucket=64), PROBLEM.key._replace(n=28672), PROBLEM.key._replace(widths="4")]
    table = Table({key: replace(CONFIG, split_k=1, max_registers=64 + 8 * index) for index, key in enumerate(known)})
    widths = WIDTHS if wanted.widths == "several" else (int(wanted.widths),)
    problem = Problem(wanted.bucket, wanted.n, wanted.k, widths, wanted.group_size)
    assert pick(problem, H200, table).max_registers == table.configs[nearest].max_registers


def test_another_shape_gets_as_many_programs_per_multiprocessor():
    table = Table({PROBLEM.key: CONFIG})  # 128 tiles in 2 shares, 32 units
    assert pick(replace(PROBLEM, n=8192), H200, table) == replace(CONFIG, split_k=1)
    assert pick(replace(PROBLEM, n=2048), H200, table) == replace(CONFIG, split_k=4, depth=2)
    assert pick(replace(PROBLEM, n=1024), H200, table) == replace(CONFIG, split_k=8, depth=1)  # no units for more warps
    assert pick(replace(PROBLEM, n=57344), H200, table) == replace(CONFIG, split_k=1)


def test_where_tiles_are_many_k_is_split_no_further_than_for_the_known_shape():
    table = Table({PROBLEM.key._replace(n=57344): replace(CONFIG, split_k=1)})  # 1792 tiles
    assert pick(replace(PROBLEM, n=14336), H200, table) == replace(CONFIG, split_k=1)


@pytest.mark.usefixtures("user_tables")
def test_all_m_of_a_range_get_the_same_configuration():
    chosen = [tuning.choose(m, 256, 1024, [2, 4], 128, CPU) for m in range(1, 65)]
    assert [chosen.index(config) for config in chosen] == sorted(chosen.index(config) for config in chosen)
    assert all(chosen[m - 1] is chosen[tables.bucket(m) - 1] for m in range(1, 65))


def test_a_user_table_is_found_by_the_name_of_the_gpu(user_tables: Path):
    key = Key(256, 1024, 128, "4", 8)
    mine = Config(32, 64, 2, 2)
    tables.write(user_tables / "cpu.json", Table({key: mine}, {(256, 1024): 77}), "cpu")
    assert tuning.choose(3, 256, 1024, (4,), 128, CPU) == mine
    assert tuning.dense_from(256, 1024, CPU) == 77
    assert tuning.dense_from(300, 1000, CPU) == 77


@pytest.mark.usefixtures("user_tables")
def test_without_a_table_the_dense_path_starts_at_a_fixed_m():
    assert tuning.dense_from(256, 1024, CPU) == tuning.DENSE_FROM


def test_a_damaged_user_table_is_an_error_that_names_it(user_tables: Path):
    (user_tables / "cpu.json").write_text("not json")
    with pytest.raises(FormatError, match=r"cpu\.json: cannot be read as JSON"):
        tuning.choose(1, 256, 1024, (4,), 128, CPU)


@pytest.mark.usefixtures("user_tables")
def test_a_gpu_is_described_by_its_properties_and_an_old_one_refused(monkeypatch: pytest.MonkeyPatch):
    class Properties:
        name = "NVIDIA H200"
        major, minor = 9, 0
        multi_processor_count = 132
        shared_memory_per_multiprocessor = 228 << 10

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    assert tuning.hardware_of(torch.device("cuda:0")) == H200
    Properties.name, Properties.major, Properties.minor = "Tesla T4", 7, 5
    with pytest.raises(UnsupportedError, match=r"Tesla T4 has compute capability 7\.5; the kernels need 8\.0 or more"):
        tuning.hardware_of(torch.device("cuda:1"))
