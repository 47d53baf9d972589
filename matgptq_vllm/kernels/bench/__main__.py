"""python -m matgptq_vllm.kernels.bench: time the sliced products on this GPU and save what was found."""

import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from matgptq_vllm.core.errors import MatGPTQError, UnsupportedError
from matgptq_vllm.kernels.bench import plot, report
from matgptq_vllm.kernels.bench.options import BenchOptions, parse_options
from matgptq_vllm.kernels.bench.results import Device, Results, as_json
from matgptq_vllm.kernels.capability import check_capability

JSON_FILE = "results.json"
MARKDOWN_FILE = "report.md"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, save and print; returns the exit status (2: wrong input, or no GPU for it; 1: the GPU failed on the way)."""
    try:
        options = parse_options(arguments)
        if options.plot:
            plot.check_plotting()
        _check_device()
        options.out.mkdir(parents=True, exist_ok=True)
        return _run(options)
    except (MatGPTQError, OSError) as error:
        print(f"matgptq_vllm.kernels.bench: error: {error}", file=sys.stderr)
        return 2


def save(results: Results, options: BenchOptions) -> None:
    """Write the JSON file, a plot per model and the Markdown page that shows them."""
    plots = {}
    if options.plot:
        for model in results.models:
            plots[model] = f"{model}.png"
            plot.draw(results, model, options.out / plots[model])
    (options.out / JSON_FILE).write_text(as_json(results) + "\n", encoding="utf-8")
    (options.out / MARKDOWN_FILE).write_text(report.as_markdown(results, plots), encoding="utf-8")


def _check_device() -> None:
    """UnsupportedError unless there is a GPU that the kernels run on."""
    import torch

    if not torch.cuda.is_available():
        raise UnsupportedError(
            "no CUDA GPU is visible to torch; this benchmark times GPU kernels: run it on a machine with one"
        )
    check_capability(torch.cuda.get_device_name(), torch.cuda.get_device_capability())


def _run(options: BenchOptions) -> int:
    import torch

    from matgptq_vllm.kernels.bench import measure

    device = torch.device("cuda", torch.cuda.current_device())
    about = Device(torch.cuda.get_device_name(device), measure.copy_bytes_per_s(device), _versions(options))
    measurement = measure.Measurement(options, device)
    status = 0
    try:
        for model in options.models:
            measurement.model(model)
    except measure.DeviceLostError as error:
        print(f"matgptq_vllm.kernels.bench: error: {error}; what was measured before is saved", file=sys.stderr)
        status = 1
    results = Results(
        device=about,
        group_size=options.group_size,
        rule=options.rule,
        competitors=[competitor.key for competitor in options.competitors],
        ms=options.ms,
        cells=measurement.cells,
        failures=measurement.failures,
    )
    save(results, options)
    print(as_json(results) if options.json else report.as_text(results))
    print(f"saved in {options.out}", file=sys.stderr)
    return status


def _versions(options: BenchOptions) -> dict[str, str]:
    """Versions of what is measured. vLLM is imported here, before the clock of a model's seconds runs."""
    from matgptq_vllm.kernels.bench import peers

    found = {}
    for name in ("torch", "triton"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if any(competitor.family in ("marlin", "machete") for competitor in options.competitors):
        try:
            found["vllm"] = peers.vllm_version()
        except UnsupportedError as error:
            # Its kernels' own rows will say so too.
            print(f"note: {error}", file=sys.stderr)
    return found


if __name__ == "__main__":
    sys.exit(main())
