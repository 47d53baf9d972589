"""Write a plain Hugging Face model folder, shard by shard, so that a folder of its name is always whole."""

import json
import shutil
import stat
from pathlib import Path
from types import TracebackType

import safetensors
import safetensors.torch
import torch

from matgptq_vllm.core.folder_swap import partial_directory, put_in_place, sync
from matgptq_vllm.core.manifest import CONFIG_FILE, INDEX_FILE


class ModelFolderWriter:
    """Context manager that writes one folder; leaving it by an error removes everything written.

    Args:
        directory: the folder to create or, at the end, to replace.
        shard_bytes: a shard is closed when it holds this much.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """

    def __init__(self, directory: Path, shard_bytes: int):
        self._target = directory.absolute()
        self.directory = partial_directory(self._target)
        """Folder to put config.json, tokenizer and model card into, before ``finish``."""
        self._shard_bytes = shard_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._shard_of: dict[str, int] = {}
        self._num_shards = 0
        self.total_bytes = 0
        """Bytes of all tensors added."""

    def __enter__(self) -> "ModelFolderWriter":
        shutil.rmtree(self.directory, ignore_errors=True)
        self.directory.mkdir(parents=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        # After finish() the folder has been renamed and there is nothing left to remove.
        shutil.rmtree(self.directory, ignore_errors=True)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Add a tensor under its name in the checkpoint."""
        assert name not in self._shard_of, name
        # A copy: safetensors refuses views and tensors that share memory.
        tensor = tensor.detach().to("cpu", copy=True).contiguous()
        if self._pending and sum(held.nbytes for held in self._pending.values()) + tensor.nbytes > self._shard_bytes:
            self._flush()
        self._pending[name] = tensor
        self._shard_of[name] = self._num_shards
        self.total_bytes += tensor.nbytes

    def finish_weights(self) -> None:
        """Write what is pending and the index; config.json must be there. Files may still be added to the folder."""
        self._flush()
        mode = stat.S_IMODE((self.directory / CONFIG_FILE).stat().st_mode)
        names = [f"model-{shard + 1:05}-of-{self._num_shards:05}.safetensors" for shard in range(self._num_shards)]
        for shard, name in enumerate(names):
            path = self.directory / name
            (self.directory / _pending_file(shard)).rename(path)
            # safetensors makes files that only their owner may read.
            path.chmod(mode)
        index = {
            "metadata": {"total_size": self.total_bytes},
            "weight_map": {name: names[shard] for name, shard in self._shard_of.items()},
        }
        (self.directory / INDEX_FILE).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")

    def finish(self) -> None:
        """Give the folder its name, after ``finish_weights``."""
        for path in self.directory.iterdir():
            sync(path)
        put_in_place(self._target)

    def _flush(self) -> None:
        path = self.directory / _pending_file(self._num_shards)
        try:
            safetensors.torch.save_file(self._pending, str(path), metadata={"format": "pt"})
        except safetensors.SafetensorError as error:
            raise OSError(f"{path}: cannot be written ({error})") from error
        self._pending = {}
        self._num_shards += 1


def _pending_file(shard: int) -> str:
    # The number of shards is known only at the end; until then a file has a name that no reader looks for.
    return f"model-{shard + 1:05}.pending"
