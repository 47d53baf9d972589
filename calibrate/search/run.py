"""One run of search, from options to profiles in the parent's table. The only module that owns models, disk and progress."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from calibrate.device import resolve_device
from calibrate.evaluate.divergence import Divergence
from calibrate.evaluate.original import Original
from calibrate.evaluate.perplexity import measure_perplexity
from calibrate.evaluate.sliced_model import parent_config
from calibrate.model import load_model
from calibrate.search.costs import PricedSpace, price, read_times
from calibrate.search.evolution import Outcome
from calibrate.search.fitness import DivergenceFromOriginal, JournaledFitness, Measure, Targets
from calibrate.search.inputs import SearchText, find_original, fingerprint, read_windows
from calibrate.search.journal import Journal
from calibrate.search.options import SearchOptions
from calibrate.search.profile_search import generation_work, search_profile, start_work
from calibrate.search.report import HeldOut, Report, Row
from calibrate.search.space import SearchSpace
from calibrate.search.store import check_names, store_profiles
from calibrate.search.units import Genome, Unit, find_units, genome_profile
from calibrate.search.weights import DeviceParent, SwitchedModel
from matgptq_vllm.core.errors import InputError
from matgptq_vllm.core.precision import PARENT_WIDTH, WIDTHS, uniform_name
from matgptq_vllm.core.storage import profile_bytes

LARGEST_DIVERGENCE = 1.0
"""Nats per token at the widest width beyond which the original cannot be what the parent was made from."""


@dataclass(frozen=True)
class Job:
    """A checked run."""

    options: SearchOptions
    reader: DeviceParent
    units: Sequence[Unit]
    priced: Mapping[str, PricedSpace]
    """Profile to find -> its search space."""

    text: SearchText
    original: Path
    device: torch.device
    dtype: torch.dtype


def run_search(options: SearchOptions) -> Report:
    """Find a profile for every budget and add them to the parent's table.

    A run that is killed leaves its measurements in the parent's folder; the same command goes on from there, to the same
    result.

    Raises:
        InputError: something in ``options`` cannot be used, nothing was written; or an unfinished search had other inputs.
        FormatError: the parent is damaged.
        OSError: the parent's folder cannot be written.
    """
    job = prepare(options)
    inputs = fingerprint(options, job.text, job.original, job.device, job.dtype)
    with Journal(options.model, inputs, options.restart) as journal:
        check_names(job.reader, [name for name in options.names if name not in journal.stored], options.overwrite)
        model = SwitchedModel(
            job.reader, job.units, (WIDTHS[0],) * len(job.units), job.dtype, job.device, kept_bytes=options.kept_bytes
        )
        outcomes, uniform_kl = _search(job, model, journal)
        found = {name: outcome.genome for name, outcome in outcomes.items()}
        held_out, original_perplexity = _held_out(job, model, {**found, **_uniform(job, uniform_kl)})
        rows = [
            _row(job, name, outcome.genome, outcome.fitness, held_out.get(name), outcome) for name, outcome in outcomes.items()
        ]
        rows += [
            _row(job, name, genome, uniform_kl[name], held_out.get(name)) for name, genome in _uniform(job, uniform_kl).items()
        ]
        profiles = [genome_profile(name, job.units, genome) for name, genome in found.items()]
        report = Report(
            model=str(options.model),
            original=str(job.original),
            original_perplexity=original_perplexity,
            rows=tuple(sorted(rows, key=lambda row: row.bits_per_weight)),
            widths={profile.name: dict(profile.widths) for profile in profiles},
        )
        journal.mark_stored(found)
        store_profiles(job.reader, profiles, _log(report, options, inputs))
        journal.remove()
    return report


def plan(options: SearchOptions) -> str:
    """What ``run_search`` would do, after all its checks of the input; nothing is measured or written."""
    job = prepare(options)
    check_names(job.reader, options.names, options.overwrite)
    lines = []
    for name, priced in job.priced.items():
        work = start_work(priced.space, options.settings, options.sensitivity_samples)
        work += (options.generations + 1) * generation_work(options.settings)
        lines.append(
            f"would search {name} for {options.model}: widths of {len(job.units)} units ({len(job.reader.layers)} layers) "
            f"within {priced.budget}, at most {work * options.seq_len:,} tokens through the model"
        )
    held_out = 0 if job.text.held_out is None else job.text.held_out.numel()
    lines.append(
        f"compared with {job.original} on {options.num_samples} windows of {options.seq_len} tokens of {options.text}, "
        f"confirmed on {held_out:,} other tokens; {job.dtype} on {job.device}".replace("torch.", "")
    )
    return "\n".join(lines)


def prepare(options: SearchOptions) -> Job:
    """Check everything that can be checked before a model is loaded.

    Raises:
        InputError, FormatError: as ``run_search``.
    """
    device = resolve_device(options.device)
    auto = torch.float32 if device.type == "cpu" else torch.bfloat16
    reader = DeviceParent(options.model, device)
    units = find_units(reader.layers)
    times = None if options.times is None else read_times(options.times)
    priced = {
        name: price(reader, units, budget, times, options.bandwidth)
        for name, budget in zip(options.names, options.budget, strict=True)
    }
    config = parent_config(reader)
    original = find_original(options, config)
    text = read_windows(options, config)
    dtype = auto if options.dtype == "auto" else getattr(torch, options.dtype)
    return Job(options, reader, units, priced, text, original, device, dtype)


def _search(job: Job, model: SwitchedModel, journal: Journal) -> tuple[dict[str, Outcome], dict[str, float]]:
    """The outcome for every profile to find, and the divergence of uniform profiles around them on the search text."""
    windows = job.text.windows.to(job.device)
    targets = Targets(_run_original(job, windows), len(windows), job.options.kept_bytes)
    measure = DivergenceFromOriginal(model, targets, windows)
    _check_same_model(job, measure)
    outcomes = {name: _search_one(job, name, priced.space, measure, journal) for name, priced in job.priced.items()}
    fitness = JournaledFitness(measure, journal)
    names = {width for outcome in outcomes.values() for width in _neighbours(job, outcome.genome)}
    everything = range(len(windows))
    return outcomes, {uniform_name(w): fitness((w,) * len(job.units), everything) for w in WIDTHS if w in names}


def _search_one(job: Job, name: str, space: SearchSpace, measure: Measure, journal: Journal) -> Outcome:
    options, settings = job.options, job.options.settings
    before = start_work(space, settings, options.sensitivity_samples)
    per_generation = generation_work(settings)
    total = before + (settings.generations + 1) * per_generation
    with tqdm(total=total, desc=f"searching {name}", unit="window", leave=False, disable=None) as progress:

        def on_generation(generation: int, best: float) -> None:
            progress.set_postfix(generation=generation, KL=f"{best:.5f}")
            # Children given up early leave work undone, which the estimate of the time left must not wait for.
            progress.update(before + (generation + 1) * per_generation - progress.n)

        fitness = JournaledFitness(measure, journal, progress.update)
        return search_profile(space, settings, options.sensitivity_samples, fitness, on_generation)


def _held_out(job: Job, model: SwitchedModel, genomes: Mapping[str, Genome]) -> tuple[dict[str, HeldOut], float | None]:
    """Quality of every genome on the held-out text, and the original's perplexity there."""
    if job.text.held_out is None:
        return {}, None
    windows = job.text.held_out.to(job.device)
    original = _run_original(job, windows)
    results = {}
    for name, genome in genomes.items():
        divergence = Divergence(original, f"profile {name}")
        measured = measure_perplexity(model.switch(genome), windows, f"profile {name}", divergence.observe)
        results[name] = HeldOut(divergence.kl, measured.perplexity)
    return results, original.perplexity.perplexity


def _run_original(job: Job, windows: torch.Tensor) -> Original:
    original: Any = load_model(job.original, job.dtype)
    for layer, shape in job.reader.layers.items():
        try:
            found = tuple(original.get_submodule(layer).weight.shape)
        except AttributeError:
            found = None
        if found != shape:
            raise InputError(
                f"{job.original} is not the original of {job.options.model}: its {layer} is {found or 'not there'}, the "
                f"parent's {shape}; pass the model that was calibrated as --original"
            )
    return Original(original.to(job.device), windows)


def _check_same_model(job: Job, measure: DivergenceFromOriginal) -> None:
    (divergence,) = measure((PARENT_WIDTH,) * len(job.units), [0])
    if divergence > LARGEST_DIVERGENCE:
        raise InputError(
            f"at width {PARENT_WIDTH}, {job.options.model} differs from {job.original} by {divergence:.2f} nats per token: it "
            "was not made from that model, or is damaged; pass the model that was calibrated as --original"
        )


def _neighbours(job: Job, genome: Genome) -> list[int]:
    """The nearest uniform widths at most and at least as wide as ``genome`` on average."""
    average = genome_profile("found", job.units, genome).average_bits(job.reader.num_weights)
    return [max(w for w in WIDTHS if w <= average), min(w for w in WIDTHS if w >= average)]


def _uniform(job: Job, names: Mapping[str, float]) -> dict[str, Genome]:
    return {name: (int(name),) * len(job.units) for name in names}


def _row(job: Job, name: str, genome: Genome, kl: float, held_out: HeldOut | None, outcome: Outcome | None = None) -> Row:
    profile = genome_profile(name, job.units, genome)
    return Row(
        name=name,
        bits_per_weight=profile.average_bits(job.reader.num_weights),
        weight_bytes=profile_bytes(job.reader, profile),
        search_kl=kl,
        held_out=held_out,
        cost=None if outcome is None else job.priced[name].amount(genome),
        # Generation 0 only sorts the starts.
        generations=None if outcome is None else len(outcome.history) - 2,
    )


def _log(report: Report, options: SearchOptions, inputs: Mapping[str, str]) -> dict[str, Any]:
    """What the search log keeps of every found profile."""
    budgets = dict(zip(options.names, options.budget, strict=True))
    rows = {row.name: asdict(row) for row in report.rows}
    settings = asdict(options.settings)
    return {
        name: {
            "budget": str(budgets[name]),
            **rows[name],
            "original": report.original,
            "settings": settings,
            "inputs": dict(inputs),
        }
        for name in report.widths
    }
