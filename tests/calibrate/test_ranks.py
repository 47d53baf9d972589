import json
import socket
from collections.abc import Callable

import pytest
import torch

from calibrate.options import CalibrateOptions
from calibrate.ranks import Ranks, joined_ranks
from calibrate.run import run_calibration
from matgptq_vllm.core.checkpoint import ParentReader
from matgptq_vllm.core.errors import InputError

CPU = torch.device("cpu")

CALIBRATE = """
import os, sys
from matgptq_vllm.cli import main
os.environ |= environment
sys.stdout = sys.stderr = open(output, "w")
sys.exit(main(arguments))
"""

FAIL_ON_SECOND = """
from calibrate import streams
add = streams.StatisticsAccumulator.add
def failing(self, inputs, original=None):
    if environment["RANK"] == "1":
        raise MemoryError("the second process has no more memory")
    add(self, inputs, original)
streams.StatisticsAccumulator.add = failing
"""


@pytest.fixture
def in_two_processes(start_apart, tmp_path_factory) -> Callable[..., list[tuple[int, str]]]:
    """Function that runs ``matgptq calibrate`` as ``torchrun`` would; returns exit status and output of each process."""

    def run(options: CalibrateOptions, before: str = "") -> list[tuple[int, str]]:
        arguments = ["calibrate", options.model]
        for name in ("out", "text", "num_samples", "seq_len", "group_size", "sweeps", "damp"):
            arguments += ["--" + name.replace("_", "-"), getattr(options, name)]
        arguments += ["--streams", ",".join(map(str, options.streams)), "--device", "cpu"]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        directory = tmp_path_factory.mktemp("output")
        processes = []
        for rank in range(2):
            meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            processes.append(
                start_apart(
                    before + CALIBRATE,
                    environment={"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank), **meeting},
                    arguments=[str(argument) for argument in arguments],
                    output=str(directory / str(rank)),
                )
            )
        for process in processes:
            process.join(timeout=300)
        return [(process.exitcode, (directory / str(rank)).read_text()) for rank, process in enumerate(processes)]

    return run


def test_two_processes_give_the_codes_of_one_up_to_the_order_of_sums(tiny_options, tmp_path, in_two_processes):
    # 11 windows and rows in odd numbers: the processes' shares differ. One near tie that falls otherwise moves what all later
    # columns make up for; few passes over a well conditioned problem keep that rare.
    quiet = {"num_samples": 11, "damp": 0.3, "sweeps": 0}
    options = tiny_options(**quiet)
    one = ParentReader(run_calibration(tiny_options(**quiet, out=tmp_path / "one")))
    first, second = in_two_processes(options)
    assert (first[0], second) == (0, (0, "")), (first, second)
    assert first[1].splitlines()[-1] == f"wrote {options.out}"
    two = ParentReader(options.out)
    assert set(tmp_path.iterdir()) == {options.out, tmp_path / "one"}
    logs = [json.loads((directory / "calibration_log.json").read_text()) for directory in (options.out, tmp_path / "one")]
    for name in one.layers:
        (codes, scales), (other, other_scales) = one.layer(name), two.layer(name)
        assert torch.equal(scales, other_scales)
        assert (codes != other).float().mean() < 0.02
        of_two, of_one = (log["layers"][name] for log in logs)
        assert of_two["tokens"] == of_one["tokens"] == 11 * 32
        for width, error in of_one["errors"].items():
            assert of_two["errors"][width] == pytest.approx(error, rel=0.1)


def test_an_error_in_one_process_ends_all_with_its_message(tiny_options, in_two_processes):
    options = tiny_options()
    first, second = in_two_processes(options, FAIL_ON_SECOND)
    assert second[0] != 0
    assert first[0] == 2
    message = "process 1 of 2 failed, so this one ends too: MemoryError: the second process has no more memory"
    assert first[1].splitlines()[-1] == f"matgptq: error: {message}"
    assert not options.out.exists()


def test_shares_cover_all_items_and_differ_by_at_most_one():
    items = torch.arange(17)
    shares = [Ranks(rank, 5, CPU).part_of(items) for rank in range(5)]
    assert torch.equal(torch.cat(shares), items)
    assert {len(share) for share in shares} == {3, 4}


def test_without_torchrun_a_process_is_alone_and_first():
    with joined_ranks({}, CPU) as ranks:
        assert (ranks.rank, ranks.size, ranks.is_first) == (0, 1, True)
        values = torch.ones(3)
        assert ranks.sum_tensor(values) is values
        assert ranks.gather_rows(values, 3) is values
        assert ranks.from_first("x") == "x"


def test_a_process_without_a_gpu_of_its_own_is_refused():
    with (
        pytest.raises(InputError, match="process 5 is number 5 on its host, which has 0 GPUs"),
        joined_ranks({"WORLD_SIZE": "6", "RANK": "5", "LOCAL_RANK": "5"}, torch.device("cuda")),
    ):
        pass
