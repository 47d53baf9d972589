"""From vLLM's configuration to the replica it describes."""

from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from vllm.platforms import current_platform

from matgptq_vllm.compat.model_folder import local_folder
from matgptq_vllm.core.precision import WIDTHS
from matgptq_vllm.core.replica import ReplicaOptions
from matgptq_vllm.engine.replica import Replica
from matgptq_vllm.kernels.resident import KERNEL_DTYPES

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# Keyed by the quantization config, of which an engine process has one, so that the layers, the loader and the model
# runner of an engine share one Replica, and two engines in one process do not.
_replicas: "WeakKeyDictionary[object, Replica]" = WeakKeyDictionary()


def replica_of(vllm_config: "VllmConfig") -> Replica:
    """The replica of this process's engine; opened by the first call. Errors as ``Replica``."""
    key = vllm_config.quant_config
    if key not in _replicas:
        _replicas[key] = open_replica(vllm_config)
    return _replicas[key]


def open_replica(vllm_config: "VllmConfig") -> Replica:
    """A replica of its own, for a process that only needs to know the profiles."""
    options = ReplicaOptions.from_additional_config(vllm_config.additional_config)
    config = vllm_config.model_config
    # The bytes at every width are known once the narrowest slice is here.
    first_width = options.max_width if options.memory_budget is None else WIDTHS[0]
    folder: Path = local_folder(config.model, config.revision, first_width)
    dtype: Any = config.dtype  # by now no longer a name
    replica = Replica(folder, options, current_platform.is_cuda() and dtype in KERNEL_DTYPES, dtype.itemsize)
    local_folder(config.model, config.revision, replica.options.max_width)
    return replica
