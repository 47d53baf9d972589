from dataclasses import replace
from pathlib import Path

import pytest
import torch

from matgptq_vllm.core.errors import FormatError, UnsupportedError
from matgptq_vllm.core.precision import WIDTHS
from matgptq_vllm.core.slicing import SLICE_RULES
from matgptq_vllm.kernels import tables, tuning
from matgptq_vllm.kernels.config import MAX_SPLIT_ROWS, Config
from matgptq_vllm.kernels.layout import PAD_N, padded
from matgptq_vllm.kernels.tables import Key, Table
from matgptq_vllm.kernels.tuning import Hardware, Problem, default, fitted, pick, shared_bytes

H200 = Hardware("NVIDIA H200", 132, 227 << 10, (9, 0))
A10 = Hardware("NVIDIA A10", 72, 99 << 10, (8, 6))
CPU = torch.device("cpu")
PROBLEM = Problem(16, 4096, 4096, WIDTHS, 128)
CONFIG = Config(16, 64, 4, 4, 3, step=256)


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
        shared_bytes(config, problem) <= hardware.shared_bytes
        and padded(problem.n, PAD_N) % config.block_n == 0
        and 1 <= config.split_k <= problem.blocks
        and (config.split_k == 1 or problem.bucket <= MAX_SPLIT_ROWS)
        and (hardware.capability >= (9, 0) or not config.pdl)
    )


@pytest.mark.parametrize("hardware", [H200, A10, tuning.hardware_of(CPU)], ids=lambda hardware: hardware.name)
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (28672, 8192), (130, 520), (1, 32)])
@pytest.mark.parametrize("bucket", [8, 16, 64, 128, 256, 512, 8192])
def test_the_rule_keeps_to_the_limits_for_every_gpu_shape_and_m(hardware: Hardware, n: int, k: int, bucket: int):
    for widths in ((2,), (8,), WIDTHS):
        for rule in SLICE_RULES:
            problem = Problem(bucket, n, k, widths, 128, rule)
            assert is_allowed(default(problem, hardware), problem, hardware)


def test_the_rule_fills_the_gpu_when_there_are_few_tiles():
    config = default(PROBLEM, H200)
    assert 0.5 * H200.num_sms <= PROBLEM.tiles(config) * config.split_k <= 4 * H200.num_sms
    assert default(replace(PROBLEM, n=57344), H200).split_k == 1


def test_a_configuration_beyond_the_limits_is_brought_within_them():
    greedy = Config(128, 128, 40, 8, 8, step=512, pdl=True)
    for hardware in (H200, A10):
        config = fitted(greedy, replace(PROBLEM, bucket=256), hardware)
        assert is_allowed(config, PROBLEM, hardware)
        assert config.block_n == 128
    assert fitted(greedy, PROBLEM, H200).split_k == 8
    assert fitted(greedy, replace(PROBLEM, bucket=512), H200).split_k == 1
    assert fitted(greedy, PROBLEM, H200).pdl
    assert not fitted(greedy, PROBLEM, A10).pdl


def test_one_within_the_limits_stays_as_it_is():
    assert fitted(CONFIG, PROBLEM, H200) == CONFIG


# As Triton 3.6 reports it for sm_90, rule curved, group 128.
@pytest.mark.parametrize(
    ("widths", "block_m", "block_n", "stages", "step", "reported"),
    [
        ((4,), 16, 64, 4, 256, 86016),
        ((8,), 64, 128, 3, 256, 212992),
        ((3,), 16, 64, 3, 256, 57344),
        ((2,), 16, 64, 3, 256, 32768),
        ((4,), 16, 64, 3, 512, 81920),
        ((2, 4), 64, 64, 2, 512, 147456),
    ],
)
def test_shared_memory_is_never_taken_for_less_than_it_is(
    widths: tuple[int, ...], block_m: int, block_n: int, stages: int, step: int, reported: int
):
    config = Config(block_m, block_n, 1, 4, stages, step=step)
    found = shared_bytes(config, Problem(block_m, 4096, 4096, widths, 128))
    assert reported <= found <= reported + 128 * 2 * block_n


def test_wider_slices_need_more_shared_memory():
    sizes = [shared_bytes(CONFIG, replace(PROBLEM, widths=(width,))) for width in WIDTHS]
    assert sizes == sorted(set(sizes))
    assert shared_bytes(CONFIG, PROBLEM) == sizes[-1]
    assert shared_bytes(CONFIG, replace(PROBLEM, widths=(4,), rule="round")) == sizes[WIDTHS.index(6)]


def test_what_was_measured_is_taken():
    other = Config(32, 128, 1, 8, 2, step=256)
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
    table = Table({key: replace(CONFIG, split_k=1, num_stages=2 + index) for index, key in enumerate(known)})
    widths = WIDTHS if wanted.widths == "several" else (int(wanted.widths),)
    problem = Problem(wanted.bucket, wanted.n, wanted.k, widths, wanted.group_size)
    assert pick(problem, H200, table).num_stages == table.configs[nearest].num_stages


def test_another_shape_gets_as_many_programs_per_multiprocessor():
    table = Table({PROBLEM.key: CONFIG})  # 64 tiles in 4 shares
    assert pick(replace(PROBLEM, n=8192), H200, table) == replace(CONFIG, split_k=2)
    assert pick(replace(PROBLEM, n=2048), H200, table) == replace(CONFIG, split_k=8)
    assert pick(replace(PROBLEM, n=1024), H200, table) == replace(CONFIG, split_k=8)  # no more blocks of K
    assert pick(replace(PROBLEM, n=57344), H200, table) == replace(CONFIG, split_k=1)


@pytest.mark.usefixtures("user_tables")
def test_all_m_of_a_range_get_the_same_configuration():
    chosen = [tuning.choose(m, 256, 1024, [2, 4], 128, CPU) for m in range(1, 65)]
    assert [chosen.index(config) for config in chosen] == sorted(chosen.index(config) for config in chosen)
    assert all(chosen[m - 1] is chosen[tables.bucket(m) - 1] for m in range(1, 65))


def test_a_user_table_is_found_by_the_name_of_the_gpu(user_tables: Path):
    key = Key(256, 1024, 128, "4", 8)
    tables.write(user_tables / "cpu.json", Table({key: replace(CONFIG, split_k=2)}, {(256, 1024): 77}), "cpu")
    assert tuning.choose(3, 256, 1024, (4,), 128, CPU) == replace(CONFIG, split_k=2)
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
