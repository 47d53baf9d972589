"""One evaluation, from options to a report and its files."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PretrainedConfig

from calibrate.data import encode_text, leading_windows, load_tokenizer
from calibrate.device import resolve_device
from calibrate.evaluate.comparison import Choice, choose_original
from calibrate.evaluate.divergence import Divergence
from calibrate.evaluate.options import EvaluateOptions
from calibrate.evaluate.original import Original
from calibrate.evaluate.perplexity import measure_perplexity
from calibrate.evaluate.plot import check_plotting, draw
from calibrate.evaluate.report import PLOT_FILE, Report, Result, TaskResult, as_json, as_markdown, quality_section
from calibrate.evaluate.resident_parent import ResidentParent
from calibrate.evaluate.sliced_model import parent_config
from calibrate.evaluate.subject import Subject, parent_subjects, plain_subjects
from calibrate.evaluate.tasks import TaskRunner, check_harness
from calibrate.model import load_config
from calibrate.model_card import write_quality
from matgptq_vllm.core.checkpoint import ParentReader
from matgptq_vllm.core.errors import InputError
from matgptq_vllm.core.manifest import CONFIG_FILE, MANIFEST_FILE
from matgptq_vllm.core.quality import QUALITY_FILE


def run_evaluation(options: EvaluateOptions) -> Report:
    """Measure what ``options`` ask for, in float32, and write the files that they ask for.

    Raises:
        InputError: no such model, original, profile, task or text, a precision of a model that is not a parent, or a
            model whose logits are NaN.
        FormatError: the parent is damaged.
        UnsupportedError: an optional package that the options need is not installed.
    """
    is_parent = (options.model / MANIFEST_FILE).is_file()
    _check(options, is_parent)
    if options.url is not None:
        report = Report(model=str(options.model), url=options.url, tasks=TaskRunner(options).through_server(options.url))
    elif is_parent:
        report = _parent_report(options, resolve_device(options.device))
    else:
        report = _plain_report(options, resolve_device(options.device))
    if options.out is not None:
        write_report(report, options.out, plot=is_parent and bool(report.results))
    if options.update_card:
        write_quality(options.model, quality_section(report))
        (options.model / QUALITY_FILE).write_text(as_json(_portable(report)) + "\n", encoding="utf-8")
    return report


def write_report(report: Report, directory: Path, plot: bool) -> None:
    """Write report.json, report.md and, with ``plot``, PLOT_FILE into ``directory``, which is made if it is not there."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "report.json").write_text(as_json(report) + "\n", encoding="utf-8")
    (directory / "report.md").write_text(as_markdown(report, plot), encoding="utf-8")
    if plot:
        draw(report, directory / PLOT_FILE)


def _portable(report: Report) -> Report:
    """The report with names in place of paths: it travels with the parent."""
    text = None if report.text is None else Path(report.text).name
    original = None if report.original_model is None else Path(report.original_model).name
    return replace(report, model=Path(report.model).name, text=text, original_model=original)


def _check(options: EvaluateOptions, is_parent: bool) -> None:
    """Refuse now what would fail after the measurement."""
    if not (options.model / CONFIG_FILE).is_file():
        raise InputError(f"{options.model} has no {CONFIG_FILE}: neither a parent nor a Hugging Face model folder")
    if not is_parent and options.url is None and options.profile_names is not None:
        raise InputError(
            f"{options.model} is not a parent and has no precision {', '.join(options.profile_names)!r}; "
            "leave --width, --profile and --precision out to measure it as it is"
        )
    if options.update_card and not is_parent:
        raise InputError(f"{options.model} is not a parent; --update-card writes into a parent's model card")
    if options.out is not None and options.text is not None and is_parent:
        check_plotting()
    if options.tasks is not None:
        check_harness()


def _parent_report(options: EvaluateOptions, device: torch.device) -> Report:
    summary = ParentReader(options.model)
    names = options.profile_names
    profiles = summary.profiles() if names is None else [summary.profile(name) for name in names]
    reader = ResidentParent(options.model, max(profile.max_width for profile in profiles))
    config = parent_config(reader)
    choice = Choice(None) if options.text is None else choose_original(options, config)
    return _measure(options, config, parent_subjects(reader, profiles, device), choice, device)


def _plain_report(options: EvaluateOptions, device: torch.device) -> Report:
    config = load_config(options.model)
    choice = Choice(None) if options.original is None else choose_original(options, config)
    return _measure(options, config, plain_subjects(options.model, device), choice, device)


def _measure(
    options: EvaluateOptions, config: PretrainedConfig, subjects: Iterable[Subject], choice: Choice, device: torch.device
) -> Report:
    """Measure ``subjects``, which load when asked for: the original comes and goes before them."""
    runner = None if options.tasks is None else TaskRunner(options)
    windows = None if options.text is None else _windows(options, config)
    original = baseline = None
    if choice.directory is not None and windows is not None:
        original, baseline = _run_original(choice.directory, windows, device)
    results: list[Result] = []
    tasks: list[TaskResult] = []
    for subject in subjects:
        if windows is not None:
            results.append(_quality(subject, windows, original))
        if runner is not None:
            tasks += runner.on_model(subject.model, subject.precision)
    return Report(
        model=str(options.model),
        text=None if options.text is None else str(options.text),
        seq_len=None if windows is None else options.seq_len,
        tokens=None if windows is None else windows.shape[0] * (windows.shape[1] - 1),
        original_model=None if choice.directory is None else str(choice.directory),
        original=baseline,
        results=results,
        tasks=tasks,
        notes=[] if choice.note is None else [choice.note],
    )


def _run_original(directory: Path, windows: torch.Tensor, device: torch.device) -> tuple[Original, Result]:
    (subject,) = plain_subjects(directory, device)
    original = Original(subject.model, windows)
    baseline = Result(
        precision=f"original, {subject.precision}",
        bits_per_weight=subject.bits_per_weight,
        weight_bytes=subject.weight_bytes,
        perplexity=original.perplexity.perplexity,
    )
    return original, baseline


def _quality(subject: Subject, windows: torch.Tensor, original: Original | None) -> Result:
    """Perplexity of ``subject`` on ``windows``, int64 [num_windows, seq_len], and its distance to ``original``."""
    label = f"profile {subject.precision}"
    divergence = None if original is None else Divergence(original, label)
    measured = measure_perplexity(subject.model, windows, label, None if divergence is None else divergence.observe)
    result = Result(subject.precision, subject.bits_per_weight, subject.weight_bytes, measured.perplexity)
    if original is None or divergence is None:
        return result
    return replace(
        result,
        increase=measured.perplexity / original.perplexity.perplexity - 1,
        kl=divergence.kl,
        top1_agreement=divergence.top1_agreement,
    )


def _windows(options: EvaluateOptions, config: PretrainedConfig) -> torch.Tensor:
    """int64 [num_windows, seq_len]."""
    assert options.text is not None
    text_config = config.get_text_config()
    context = getattr(text_config, "max_position_embeddings", None)
    if context is not None and options.seq_len > context:
        raise InputError(f"seq_len is {options.seq_len}, but the model's context is {context} tokens; use at most that")
    tokens = encode_text(options.text, load_tokenizer(options.model), text_config.vocab_size)
    return leading_windows(tokens, options.seq_len, options.limit_windows, options.text)
