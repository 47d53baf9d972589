"""``python -m loadtests.simulation --out DIR``: fixed widths, the controller and an oracle on bursty traces."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from loadtests.simulation.compare import SCENARIOS, compare
from loadtests.simulation.report import markdown, plot

DESCRIPTION = """\
Simulate an engine under Poisson traffic with 5x bursts, and compare what chooses the width of each request: always the same
one, the server's controller, or an oracle that knows all that will come. No server, no GPU, no waiting: time is simulated.
Writes results.json, results.md and a plot per scenario into --out, and prints the table."""

EPILOG = """\
example: python -m loadtests.simulation --out simulation --elastic --seed 0 --seed 1
         python -m loadtests.simulation --out quick --seconds 60 --no-oracle      (seconds)
The oracle's search takes most of the time: about a minute for each 300 s of trace."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the simulations that the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.simulation",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--scenario", choices=sorted(SCENARIOS), action="append", help="which engine (default: all)")
    parser.add_argument("--seed", type=int, action="append", help="of trace and noise; may be repeated (default: 0)")
    parser.add_argument("--seconds", type=float, default=300.0, help="length of the trace (default: %(default)s)")
    parser.add_argument("--elastic", action="store_true", help="running requests follow the chosen width")
    parser.add_argument("--no-oracle", action="store_true", help="leave the oracle out")
    given = parser.parse_args(arguments)
    if not given.seconds >= 10:
        parser.error(f"--seconds is {given.seconds:g}; a trace needs at least 10 s to say anything")

    given.out.mkdir(parents=True, exist_ok=True)
    documents = []
    for name in given.scenario or sorted(SCENARIOS):
        for position, seed in enumerate(given.seed or [0]):
            document, runs = compare(SCENARIOS[name], given.seconds, seed, given.elastic, not given.no_oracle)
            documents.append(document)
            if position == 0:
                plot(document, runs, given.out / f"{name}.png")
            print(f"{name}, seed {seed}: done", file=sys.stderr, flush=True)
    (given.out / "results.json").write_text(json.dumps(documents, indent=1) + "\n", encoding="utf-8")
    table = markdown(documents)
    (given.out / "results.md").write_text(table, encoding="utf-8")
    print(table, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
