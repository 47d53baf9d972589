"""A whole load test: probe, run, report, judge. Imports vLLM."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path

# Before vLLM is imported: its messages are not about this command.
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from loadtests import gate, report
from loadtests.campaign import AGAINST, TESTED, Campaign
from loadtests.generator import check_tokenizer
from loadtests.options import LoadTestOptions
from loadtests.server import Server, probe
from loadtests.watch import Sample, Watch, checks

INTERRUPTED_STATUS = 130


def run_load_test(options: LoadTestOptions, server: Server) -> int:
    """Run the test and write the report; returns the exit status.

    Raises:
        InputError: the servers do not offer what is asked for, or the baseline is of another load.
    """
    server.check_precisions(options.precisions)
    servers = {TESTED: server}
    if options.against is not None:
        servers[AGAINST] = probe(options.against)
    # The server's own folder, unless it is on another machine.
    tokenizer = options.tokenizer or server.root
    check_tokenizer(tokenizer)
    campaign = Campaign(options, servers, tokenizer)
    baseline = gate.read_report(options.baseline) if options.baseline is not None else None
    options.out.mkdir(parents=True, exist_ok=True)
    began = datetime.now(timezone.utc).isoformat(timespec="seconds")
    watch = Watch(server, options.soak) if options.soak is not None else None
    interrupted = False
    with _stoppable(), watch or contextlib.nullcontext():
        try:
            campaign.run()
        except KeyboardInterrupt:
            interrupted = True
            print("matgptq loadtest: interrupted; writing the report of what there is", file=sys.stderr)
    verdict, samples = [], []
    if watch is not None and campaign.runs:
        idle = watch.wait_until_idle()
        samples = watch.during(campaign.runs[-1])
        verdict = checks(watch.soak, samples, idle, campaign.runs[-1].records, watch.unanswered)
    written = report.as_dict(campaign, interrupted, began, samples, verdict)
    report.write(written, options.out)
    _draw(campaign, samples, options.out)
    print(report.summary_table(written))
    for check in verdict:
        print(f"{'passed' if check.passed else 'FAILED'}: {check.name}: {check.found}, allowed {check.allowed}")
    print(f"report: {options.out / 'report.md'}")
    worse = []
    if baseline is not None and not interrupted:
        worse = gate.regressions(written, baseline, options.fail_if)
        print(gate.text(worse, options.fail_if))
    if interrupted:
        return INTERRUPTED_STATUS
    failed = any(run.summary.failed for run in campaign.runs)
    return int(failed or bool(worse) or not all(check.passed for check in verdict))


def _draw(campaign: Campaign, samples: Sequence[Sample], folder: Path) -> None:
    try:
        from loadtests.plots import draw
    except ImportError as error:
        note = f"matgptq loadtest: no pictures ({error}); where matplotlib is: python -m loadtests.redraw {folder}"
        print(note, file=sys.stderr)
        return
    draw(campaign.runs, samples, folder)


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """SIGINT stops the test, also where a shell has started it in the background; so does SIGTERM, which ends jobs."""
    handlers = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: lambda *_: signal.raise_signal(signal.SIGINT),
    }
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
