"""lm-eval's client of an OpenAI completions endpoint, asking for one precision. Imports lm-eval."""

from functools import cached_property

from lm_eval.models.openai_completions import LocalCompletionsAPI

from calibrate.evaluate.server import ServerInfo
from matgptq_vllm.core.precision import PRECISION_HEADER


class PrecisionEndpoint(LocalCompletionsAPI):
    """A server as a model of the harness; every request carries the precision header.

    Args:
        precision: what to ask for; the caller has checked that the server holds it.
        tokenizer: folder of the tokenizer, which must be the server's.
        add_bos: whether a prompt begins with the token of a text's beginning.
        concurrency: requests under way at a time.
    """

    def __init__(self, server: ServerInfo, precision: str, tokenizer: str, add_bos: bool, concurrency: int):
        self._precision = precision
        super().__init__(
            model=server.model,
            base_url=f"{server.url}/v1/completions",
            tokenizer=tokenizer,
            tokenizer_backend="huggingface",
            add_bos_token=add_bos,
            num_concurrent=concurrency,
            max_length=server.context,
        )

    @cached_property
    def header(self) -> dict:
        """Headers of every request."""
        return super().header | {PRECISION_HEADER: self._precision}
