"""One import, from options to a parent on disk."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from calibrate.data import read_text
from calibrate.exchange.cards import import_card
from calibrate.exchange.options import ImportOptions
from calibrate.exchange.published import PublishedCheckpoint, open_published
from calibrate.export import check_target, write_config
from calibrate.model_card import CARD_FILE
from matgptq_vllm.core.checkpoint_writer import ParentWriter
from matgptq_vllm.core.errors import InputError
from matgptq_vllm.core.precision import WIDTHS, uniform_width
from matgptq_vllm.core.profile import FUSED_LAYERS, Profile

SHARD_BYTES = 1 << 30
"""Bytes per shard: each of the parent's six file sets has one shard in memory until it is full."""


@dataclass(frozen=True)
class ImportReport:
    """What an import did, or would do."""

    source: str
    parent: str
    layers: int
    weights: int
    """Weights of the quantized layers."""
    group_size: int
    scale_dtype: str
    profiles: dict[str, float]
    """Name of each imported profile -> its mean bits per weight."""
    notes: tuple[str, ...]
    """What differs from the source."""

    def as_json(self) -> str:
        """The report as a JSON object."""
        return json.dumps(asdict(self), indent=1)

    def as_text(self, verb: str) -> str:
        """The report for a terminal; ``verb`` is what was or would be done with the parent."""
        lines = [
            f"{verb} {self.parent}: {self.layers} layers, {self.weights / 1e6:.1f} M weights, slice rule round, "
            f"group size {self.group_size}, {self.scale_dtype} scales, from {self.source}"
        ]
        lines += [f"profile {name}: {bits:.2f} bits per weight" for name, bits in self.profiles.items()]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def run_import(options: ImportOptions) -> ImportReport:
    """Import a published checkpoint; with ``dry_run`` everything is checked but the values, and nothing is written.

    The parent appears, or is replaced, only when it is whole. Tensors are read one at a time.

    Raises:
        InputError: the source cannot become a parent; the message says why.
        FormatError: a file of the source is damaged.
        UnsupportedError: the model has layers that cannot be quantized.
        OSError: the disk is full or the folder cannot be written; an old parent there is untouched.
    """
    replaces = check_target(options.out, options.overwrite)
    published = open_published(options.model)
    notes = _notes(published)
    profiles = [_read_profile(path, published, notes) for path in options.profiles or ()]
    num_weights = {name: n * k for name, (n, k) in published.layers.items()}
    report = ImportReport(
        source=str(options.model),
        parent=str(options.out),
        layers=len(published.layers),
        weights=sum(num_weights.values()),
        group_size=published.spec.group_size,
        scale_dtype=published.spec.scale_dtype,
        profiles={profile.name: profile.average_bits(num_weights) for profile in profiles},
        notes=tuple(notes),
    )
    if not options.dry_run:
        _write(options, published, profiles, replaces)
    return report


def _write(options: ImportOptions, published: PublishedCheckpoint, profiles: list[Profile], replaces: bool) -> None:
    with ParentWriter(options.out, published.spec, overwrite=replaces, shard_bytes=SHARD_BYTES) as writer:
        for name, codes, scales in published.read_layers():
            writer.add_layer(name, codes, scales)
        for name, tensor in published.read_others():
            writer.add_tensor(name, tensor)
        write_config(options.model, writer.directory, published.spec.to_dict())
        card = import_card(options.model.absolute().name, published.config, published.spec)
        (writer.directory / CARD_FILE).write_text(card, encoding="utf-8")
        writer.finish(profiles)


def _notes(published: PublishedCheckpoint) -> list[str]:
    notes = []
    if published.inference_width not in WIDTHS:
        notes.append(f"the source runs at {published.inference_width} bits; a parent serves {', '.join(map(str, WIDTHS))}")
    if published.dropped:
        notes.append(
            f"left out {len(published.dropped)} tensors the model has no place for: {', '.join(published.dropped[:4])}"
        )
    return notes


def _read_profile(path: Path, published: PublishedCheckpoint, notes: list[str]) -> Profile:
    """The profile in a file of the published search. Layers that engines fuse get the widest width of their members."""
    widths: dict[str, int] = {}
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        name, _, width = (part.strip() for part in line.rpartition(":"))
        if name not in published.layers or name in widths:
            reason = "is there twice" if name in widths else "is not a quantized layer of the checkpoint"
            raise InputError(f"{path}, line {number}: {name!r} {reason}; write one line 'layer: width' per layer")
        if not width.isdecimal() or int(width) not in WIDTHS:
            raise InputError(f"{path}, line {number}: {width!r} is not one of the widths {', '.join(map(str, WIDTHS))}")
        widths[name] = int(width)
    missing = sorted(published.layers.keys() - widths.keys())
    if missing:
        raise InputError(f"{path} has no width for {len(missing)} layers: {', '.join(missing[:4])}; write one line for each")
    raised = _raise_fused(widths)
    if raised:
        notes.append(f"{path.name}: {raised} layers got the wider width of a layer that engines fuse them with")
    if uniform_width(path.stem) is not None:
        raise InputError(f"{path}: the name {path.stem!r} means a uniform width; name the file otherwise")
    return Profile(path.stem, widths)


def _raise_fused(widths: dict[str, int]) -> int:
    """Give the members of every fused layer their widest width, in place; returns how many layers changed."""
    before: Mapping[str, int] = dict(widths)
    for name in before:
        parent, _, leaf = name.rpartition(".")
        for group in FUSED_LAYERS:
            if leaf in group:
                members = [f"{parent}.{member}" for member in group if f"{parent}.{member}" in before]
                widths[name] = max(before[member] for member in members)
    return sum(widths[name] != before[name] for name in before)
