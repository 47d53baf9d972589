"""What an export will write, decided and checked before anything is written."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoConfig

from calibrate.data import encode_text, leading_windows, load_tokenizer
from calibrate.device import resolve_device
from calibrate.exchange import formats
from calibrate.exchange.export_report import EXPORT_FILE
from calibrate.exchange.options import ExportOptions
from calibrate.export import check_target
from calibrate.model import skeleton
from matgptq_vllm.core.checkpoint import ParentReader
from matgptq_vllm.core.errors import InputError
from matgptq_vllm.core.profile import Profile

GROUP_SIZES = (128, 64, 32)
"""Group sizes that vLLM's kernels read, besides one scale per output channel."""

FOLDER_KIND = "slice checkpoint"


@dataclass(frozen=True)
class Plan:
    """What an export will write, checked against the parent."""

    reader: ParentReader
    profile: Profile
    bits: int
    group_size: int
    """Of the checkpoint: divides the parent's, so that every group has one scale there too."""

    device: torch.device
    windows: torch.Tensor | None
    """Tokens int64 [num_windows, seq_len] to measure perplexity on."""

    unquantized: list[str]
    """Linear layers that stay as they are."""

    def inputs_per_scale(self, name: str) -> int:
        """Group size of a layer in inputs."""
        return self.reader.layers[name][1] if self.group_size == -1 else self.group_size

    @property
    def scale_dtype(self) -> torch.dtype:
        """Type of the checkpoint's scales: the parent's."""
        return getattr(torch, self.reader.spec.scale_dtype)


def make_plan(options: ExportOptions) -> Plan:
    """Check everything an export needs; nothing is written.

    Raises:
        InputError: something in ``options`` does not fit the parent or the format.
        FormatError: the parent is damaged.
    """
    device = resolve_device(options.device)
    check_target(options.out, options.overwrite, marker=EXPORT_FILE, kind=FOLDER_KIND)
    reader = ParentReader(options.model)
    profile = reader.profile(options.precision)
    bits = options.bits or (4 if profile.max_width <= 4 else 8)
    if profile.max_width > bits:
        raise InputError(
            f"precision {profile.name} has layers of width {profile.max_width}; {bits} bits cannot hold them: use --bits 8"
        )
    for name, shape in reader.layers.items():
        formats.check_shape(options.format, name, shape, bits)
    config = AutoConfig.from_pretrained(options.model, local_files_only=True)
    del config.quantization_config
    linears = [name for name, module in skeleton(config).named_modules() if isinstance(module, nn.Linear)]
    windows = None
    if options.text is not None:
        tokens = encode_text(options.text, load_tokenizer(options.model), config.get_text_config().vocab_size)
        windows = leading_windows(tokens, options.seq_len, options.limit_windows, options.text)
    return Plan(
        reader=reader,
        profile=profile,
        bits=bits,
        group_size=_group_size(reader),
        device=device,
        windows=windows,
        unquantized=[name for name in linears if name not in reader.layers],
    )


def describe_plan(options: ExportOptions) -> str:
    """What ``run_export`` would do, after all its checks of the input."""
    plan = make_plan(options)
    weights = sum(plan.reader.num_weights.values())
    size = "one scale per output channel" if plan.group_size == -1 else f"group size {plan.group_size}"
    return (
        f"would export precision {plan.profile.name} of {options.model} as {options.format}, {plan.bits} bits per weight, "
        f"{size}: {len(plan.reader.layers)} layers, {weights * plan.bits / 8 / 2**20:.1f} MiB of codes, to {options.out}"
    )


def _group_size(reader: ParentReader) -> int:
    if reader.spec.group_size == -1:
        return -1
    for size in GROUP_SIZES:
        if size <= reader.spec.group_size and not any(k % size for _, k in reader.layers.values()):
            return size
    name, (_, k) = next(item for item in reader.layers.items() if item[1][1] % GROUP_SIZES[-1])
    raise InputError(
        f"{name} has {k} inputs; the formats need whole groups of {', '.join(map(str, GROUP_SIZES))} inputs that divide the "
        f"parent's groups of {reader.spec.group_size}: calibrate with --group-size -1, one scale per output channel"
    )
