"""From vLLM's configuration to the replica it describes."""

from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from matgptq_vllm.compat.model_folder import local_folder
from matgptq_vllm.core.replica import ReplicaOptions
from matgptq_vllm.engine.replica import Replica

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
    folder: Path = local_folder(vllm_config.model_config.model, vllm_config.model_config.revision, options.max_width)
    return Replica(folder, options)
