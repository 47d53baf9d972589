"""The original model, run once over the windows: its perplexity, and its logits again for every slice compared with it.

Logits of a whole text do not fit anywhere. The inputs of the output head do (one hidden state per token), and the head
gives the same logits from them again; so the original's blocks run once, and need not stay in memory beside a slice.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PreTrainedModel

from calibrate.evaluate.perplexity import measure_perplexity
from matgptq_vllm.core.errors import UnsupportedError

HOST_BYTES = 4 << 30
"""Hidden states beyond this many bytes are kept in a temporary file."""


class Original:
    """The original's answers to ``windows``.

    Args:
        model: the original, on the device to compute on, in the type to compute in. Its weights outside the output head
            are released.
        windows: int64 [num_windows, seq_len].

    Raises:
        InputError: its logits are NaN or infinite.
        UnsupportedError: its class does not separate the output head from the rest.
    """

    def __init__(self, model: PreTrainedModel, windows: torch.Tensor):
        self._model: Any = model
        self._windows = windows
        self._decoder = model.base_model
        if self._decoder is model:
            raise UnsupportedError(f"{type(model).__name__} has no decoder apart from its output head; use --no-original")
        self._hidden: torch.Tensor | None = None
        self._folder: TemporaryDirectory | None = None
        self._output_type: type = type(None)
        self._row = 0
        hook = self._decoder.register_forward_hook(self._keep)
        try:
            self.perplexity = measure_perplexity(model, windows, "the original")
        finally:
            hook.remove()
        self._release_decoder()

    @torch.no_grad()
    def logits(self, start: int, count: int) -> torch.Tensor:
        """Logits float32 [count, seq_len - 1, vocabulary] of ``count`` windows from ``start`` on, on the model's device."""
        assert self._hidden is not None
        states = self._hidden[start : start + count].to(self._model.device)
        # The model's own forward, so that whatever its class does to logits after the head is done here too.
        self._decoder.forward = lambda *_, **__: self._output_type(last_hidden_state=states)
        batch = self._windows[start : start + count].to(self._model.device)
        return self._model(batch, use_cache=False).logits[:, :-1].float()

    def _keep(self, _module: object, _inputs: object, output: Any) -> None:
        states = output.last_hidden_state
        if self._hidden is None:
            self._hidden = self._room((len(self._windows), *states.shape[1:]), states.dtype)
            self._output_type = type(output)
        self._hidden[self._row : self._row + len(states)] = states
        self._row += len(states)

    def _room(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        count = torch.Size(shape).numel()
        if count * dtype.itemsize <= HOST_BYTES:
            return torch.empty(shape, dtype=dtype)
        self._folder = TemporaryDirectory(prefix="matgptq-evaluate-")
        path = str(Path(self._folder.name) / "hidden")
        return torch.from_file(path, shared=True, size=count, dtype=dtype).view(shape)

    def _release_decoder(self) -> None:
        head = self._model.get_output_embeddings()
        kept = {id(parameter) for parameter in head.parameters()}
        for parameter in self._decoder.parameters():
            if id(parameter) not in kept:
                parameter.data = parameter.data.new_empty(0)
