"""Results of simulations as Markdown, and as a plot of load, width and latency over time."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loadtests.simulation.engine import WIDTHS
from loadtests.simulation.policies import Run

HEADINGS = ("scenario", "seed", "policy", "met", "mean width", "of oracle", "switches", "least reversal s", "TTFT p95 ms")


def markdown(documents: Sequence[dict[str, Any]]) -> str:
    """One table, a line per trace and policy."""
    rows = [list(HEADINGS), ["---"] * len(HEADINGS)]
    for document in documents:
        oracle = document["policies"].get("oracle")
        for name, found in document["policies"].items():
            reversal = found["least_reversal_s"]
            rows.append(
                [
                    document["scenario"] + (" elastic" if document["elastic"] else ""),
                    str(document["seed"]),
                    name,
                    f"{found['met']:.1%}",
                    f"{found['width_tokens']:.2f}",
                    f"{found['width_tokens'] / oracle['width_tokens']:.0%}" if oracle else "",
                    str(found["switches"]),
                    "" if reversal is None else f"{reversal:.1f}",
                    f"{found['ttft_p95_ms']:.0f}",
                ]
            )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def plot(document: dict[str, Any], runs: dict[str, Run], path: Path) -> None:
    """Requests per second, width and time per token over time, of the controller and what it is compared with."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [name for name in ("fixed 8", "oracle", "controller") if name in runs]
    figure, (load, width, latency) = pyplot.subplots(3, 1, figsize=(9, 6.5), sharex=True, constrained_layout=True)
    times = [served.arrival.at_s for served in runs["controller"].requests]
    load.hist(times, bins=max(1, int(document["seconds"] / 2)), weights=[0.5] * len(times), color="0.6")
    load.set_ylabel("requests/s")
    for name in shown:
        run = runs[name]
        width.step(times, [WIDTHS[index] for index in run.admitted], where="post", label=name, linewidth=1)
        latency.plot(times, [served.tpot_ms for served in run.requests], ".", markersize=2, label=name)
    width.set_ylabel("width")
    width.legend(loc="lower left", fontsize="small")
    latency.axhline(document["tpot_ms"], color="black", linewidth=0.8)
    latency.set_ylim(0, 3 * document["tpot_ms"])
    latency.set_ylabel("ms per output token")
    latency.set_xlabel("seconds")
    figure.savefig(path, dpi=80)
    pyplot.close(figure)
