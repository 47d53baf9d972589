"""matgptq loadtest: options, and errors that a user can act on, before any load."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from loadtests.cli import add_verbs, options_from
from loadtests.options import LoadTestOptions, Rate
from loadtests.server import Server
from loadtests.workload import Lengths
from matgptq_vllm.cli import main
from matgptq_vllm.core.errors import InputError

REPLICA = Server("http://host:8000", "llama", "/models/llama", 1024, "0.32.0", {"2": 2.0, "8": 8.0, "mix-3.0": 3.0})


def parsed(*arguments: str) -> LoadTestOptions:
    parser = argparse.ArgumentParser()
    add_verbs(parser.add_subparsers())
    namespace = parser.parse_args(["loadtest", "http://host:8000", "--out", "report", *arguments])
    return options_from(namespace, REPLICA.uniform())


def test_options_are_read() -> None:
    options = parsed("--precisions", "2,mix", "--rates", "1,80%,inf", "--concurrency", "4,8", "--input-len", "10-20",
                     "--cancel", "5%", "--malformed", "0.02", "--budget-ms", "12.5", "--slo", "tpot:30",
                     "--seconds", "2m")  # fmt: skip
    assert options.precisions == ("2", "mix")
    assert options.rates == (Rate(1.0), Rate(0.8, of_capacity=True), Rate(math.inf))
    assert [str(rate) for rate in options.rates] == ["1", "80%", "inf"]
    assert (options.concurrency, options.workload.input_len, options.workload.seconds) == ((4, 8), Lengths(10, 20), 120.0)
    assert (options.workload.cancel, options.workload.malformed) == (0.05, 0.02)
    assert options.headers == {"X-Latency-Budget-Ms": "12.5"}
    assert options.soak is None


def test_defaults_are_all_widths_or_a_mix_of_them() -> None:
    assert parsed().precisions == ("2", "8")
    soak = parsed("--soak", "15m", "--rates", "80%", "--server-pid", "7")
    assert (soak.precisions, soak.workload.seconds) == (("mix",), 900.0)
    assert soak.soak is not None
    assert (soak.soak.server_pid, soak.soak.max_memory_growth) == (7, 0.02)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rates", "fast"], "--rates 'fast' is not a rate such as 2, inf or 80%"),
        (["--rates", "0"], "sends nothing"),
        (["--rates", "nan"], "is not a rate"),
        (["--rates", ","], "--rates is empty"),
        (["--rates", "2,2.0"], "names something twice"),
        (["--concurrency", "0"], "would send nothing"),
        (["--concurrency=-1"], "is not a whole number"),
        (["--repeats", "0"], "would measure nothing"),
        (["--cancel", "60%", "--malformed", "50%"], "more than all requests"),
        (["--cancel=-5%"], "is not a share"),
        (["--seconds", "1d"], "is not a time"),
        (["--input-len", "20-10"], "is not a number of tokens"),
        (["--budget-ms", "0"], "is not a number of milliseconds above 0"),
        (["--trace", "nothere.csv"], "neither poisson, fixed, bursts, chat nor a CSV file"),
        (["--soak", "15m"], "needs a finite rate"),
        (["--soak", "15m", "--rates", "1,2"], "--soak is one run"),
        (["--server-pid", "3"], "--server-pid is for --soak"),
    ],
)
def test_wrong_options_are_named(arguments: Sequence[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parsed(*arguments)


def test_unknown_precisions_are_listed_with_what_there_is() -> None:
    REPLICA.check_precisions(["2", "mix", "auto", "default", "mix-3.0"])
    with pytest.raises(InputError, match=r"does not offer precision 4, five; it offers 2, 8, mix-3\.0, auto, mix, default"):
        REPLICA.check_precisions(["2", "4", "five"])
    stock = Server("http://host:8001", "llama", "", None, "0.32.0", {})
    stock.check_precisions(["default"])
    with pytest.raises(InputError, match="has no precisions"):
        stock.check_precisions(["4"])


def test_a_server_that_is_not_there_is_an_error_without_a_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "report"
    assert main(["loadtest", "http://127.0.0.1:9", "--out", str(out)]) == 2
    assert capsys.readouterr().err.startswith("matgptq: error: http://127.0.0.1:9 does not answer (")
    assert not out.exists()


def test_what_is_no_server_address_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["loadtest", "localhost:8000", "--out", str(tmp_path)]) == 2
    assert "give its address, such as http://localhost:8000" in capsys.readouterr().err
