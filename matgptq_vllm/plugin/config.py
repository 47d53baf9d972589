"""MatGPTQConfig: what vLLM makes of a parent's ``quantization_config``, and which linear layers read slices."""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from matgptq_vllm.compat.model_loader import check_load_format
from matgptq_vllm.compat.replica import replica_of
from matgptq_vllm.compat.versions import check_vllm_version
from matgptq_vllm.core.errors import FormatError, UnsupportedError
from matgptq_vllm.core.manifest import CONFIG_FILE, MANIFEST_FILE
from matgptq_vllm.core.parent import QUANT_METHOD, ParentSpec
from matgptq_vllm.kernels.capability import MIN_CAPABILITY
from matgptq_vllm.plugin.linear import MatGPTQLinearMethod


def register_config() -> None:
    """Register the quantization method; calling it again changes nothing."""
    if QUANT_METHOD not in QUANTIZATION_METHODS:
        register_quantization_config(QUANT_METHOD)(MatGPTQConfig)


class MatGPTQConfig(QuantizationConfig):
    """Quantization config of a parent; one instance per engine process."""

    def __init__(self, spec: ParentSpec):
        super().__init__()
        self.spec = spec
        self.control_token = secrets.token_hex(16)
        """Known to the processes of this engine, which all have this object (``core.width_limit``)."""

    def get_name(self) -> Any:  # vLLM's type lists its built-in methods
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        major, minor = MIN_CAPABILITY
        return 10 * major + minor

    @staticmethod
    def get_config_filenames() -> list[str]:
        # Everything is in config.json; vLLM looks for no other file.
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "MatGPTQConfig":
        """The config of a parent; FormatError if config.json is another method's or another version's."""
        check_vllm_version()
        return cls(ParentSpec.from_dict(config, source=CONFIG_FILE))

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The sliced linear method for the parent's layers; other linear layers stay as they are.

        Raises:
            UnsupportedError: vLLM was told to load weights in a way that cannot read a parent, or the parent has experts.
            FormatError: the parent has some but not all members of a layer that vLLM fuses.
        """
        vllm_config = get_current_vllm_config()
        check_load_format(vllm_config.load_config.load_format)
        if not isinstance(layer, LinearBase):
            # Which class runs the experts differs between vLLM releases; that the parent has layers inside it does not.
            if any(name.startswith(f"{prefix}.") for name in replica_of(vllm_config).reader.layers):
                raise UnsupportedError(
                    f"{prefix}: parents of mixture-of-experts models cannot be served yet; measure them with matgptq "
                    "evaluate, or serve the original model"
                )
            return None
        replica = replica_of(vllm_config)
        members = self._members(prefix)
        held = [name for name in members if name in replica.reader.layers]
        if not held:
            return UnquantizedLinearMethod()
        if held != members:
            raise FormatError(f"{MANIFEST_FILE}: vLLM computes {members} as one layer, but the parent has only {held} of them")
        return MatGPTQLinearMethod(replica, members)

    def compile_kernels(
        self, model: torch.nn.Module, device: torch.device, say: Callable[[str], None], alone: Sequence[int], most_alone: int
    ) -> None:
        """Have the kernels of all of a loaded model's layers compiled, where kernels run (``kernels.compile_ahead``).

        Args:
            alone: widths for which products of up to ``most_alone`` rows are launched that know no other width.
        """
        kinds = [
            kind
            for layer in model.modules()
            if isinstance(method := getattr(layer, "quant_method", None), MatGPTQLinearMethod)
            and (kind := method.kernel_kind(layer)) is not None
        ]
        if kinds:
            # Needs Triton, which a machine without a GPU may not have.
            from matgptq_vllm.kernels.compile_ahead import compile_ahead

            narrowed = [replace(kind, widths=(width,), most_rows=most_alone) for kind in kinds for width in alone]
            compile_ahead([*kinds, *narrowed], device, say)

    def _members(self, prefix: str) -> list[str]:
        """Checkpoint names of the layers that vLLM runs as the layer ``prefix``."""
        parent, _, leaf = prefix.rpartition(".")
        return [f"{parent}.{member}" for member in self.packed_modules_mapping.get(leaf, [leaf])]
