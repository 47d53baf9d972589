"""Self-speculative decoding: a narrow slice of the parent proposes tokens, the request's own slice verifies them.

The drafting class of vLLM's speculative method ``custom_class`` (runner V1), for which the speculative configuration names
``SelfDraft``. After a step, it runs the model that the worker holds ``num_speculative_tokens`` more times at the draft
profile, a row per request, from the last token on:

    position of the token      n - 1      n        n + 1   ...      (n tokens are known; the last one's KV is not)
    input of draft run         0          1        2                token n - 1, then what the run before proposed
    written by draft runs      narrow KV  narrow   narrow
    written by the next step   KV at the request's width, of the last token and every proposed one

A draft run attends to the KV of the request's own width up to n - 2 and to its own after that, in the request's own blocks:
there is no second cache. The next step computes all of these positions again, so that no narrow KV stays; a block becomes
part of the prefix cache only after that. Proposals are the most likely tokens, without a distribution, and vLLM accepts one
with the probability that the verifying slice gives it: what is sampled has that slice's distribution.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata

from matgptq_vllm.core.errors import UnsupportedError
from matgptq_vllm.core.replica import SELF_DRAFT_CLASS
from matgptq_vllm.engine.precision_state import PrecisionState


def drafts_itself(vllm_config: Any) -> bool:
    """Whether the engine's speculative decoding is this one."""
    speculative = vllm_config.speculative_config
    return speculative is not None and speculative.method == "custom_class" and speculative.model == SELF_DRAFT_CLASS


class SelfDraft:
    """Proposes tokens for vLLM to verify. Does nothing until ``attach``."""

    def __init__(self, vllm_config: VllmConfig):
        assert vllm_config.speculative_config is not None
        self._vllm_config = vllm_config
        self._num_tokens = vllm_config.speculative_config.num_speculative_tokens
        self._max_model_len = vllm_config.model_config.max_model_len
        self._runner: Any = None

    def load_model(self, model: torch.nn.Module) -> None:
        """Called by vLLM; the model is the one that verifies."""

    def attach(self, runner: Any, state: PrecisionState, profile: int, verifying: frozenset[int]) -> None:
        """Draft with what ``runner`` holds.

        Args:
            profile: index of the profile that drafts.
            verifying: indices of the profiles whose requests are drafted for: the wider ones.
        """
        self._runner, self._state, self._profile, self._verifying = runner, state, profile, verifying

    def propose(
        self,
        sampled_token_ids: Sequence[Sequence[int]],
        num_tokens_no_spec: npt.NDArray[np.int32],
        token_ids_cpu: npt.NDArray[np.int32],
        slot_mappings: object = None,
    ) -> list[list[int]]:
        """Tokens that may follow, for each request of the step just done.

        Args:
            sampled_token_ids: what the step sampled, by row of vLLM's batch; empty while a prompt is being computed.
            num_tokens_no_spec: int [rows]: tokens known of each request, the sampled ones included.
            token_ids_cpu: int [rows, max length]: these tokens.
        """
        drafts: list[list[int]] = [[] for _ in sampled_token_ids]
        rows = [
            row
            for row, sampled in enumerate(sampled_token_ids)
            if sampled and num_tokens_no_spec[row] + self._num_tokens < self._max_model_len and self._is_verifying(row)
        ]
        if rows:
            lengths = num_tokens_no_spec[rows].astype(np.int64)
            proposed = self._draft(rows, token_ids_cpu[rows, lengths - 1], lengths - 1)
            for row, tokens in zip(rows, proposed.tolist(), strict=True):
                drafts[row] = tokens
        return drafts

    def _is_verifying(self, row: int) -> bool:
        req_id = self._runner.input_batch.req_ids[row]
        return self._state.common_profile([req_id]) in self._verifying

    def _draft(self, rows: list[int], tokens: npt.NDArray[np.integer], positions: npt.NDArray[np.int64]) -> torch.Tensor:
        """int64 [len(rows), drafts]: the most likely tokens after ``tokens`` at ``positions`` (both [len(rows)])."""
        runner = self._runner
        device = runner.device
        (groups,) = self._groups()
        table = runner.input_batch.block_table[0]
        blocks = table.get_device_tensor(len(runner.input_batch.req_ids))[torch.tensor(rows, device=device)]
        input_ids = torch.from_numpy(tokens.astype(np.int32)).to(device)
        position = torch.from_numpy(positions).to(device)
        last = int(positions.max())
        self._state.write_uniform_step(self._profile)
        proposed = []
        for run in range(self._num_tokens):
            block = blocks.gather(1, (position // table.block_size)[:, None])[:, 0].long()
            slots = block * table.block_size + position % table.block_size
            metadata = self._attention(groups, blocks, position + 1, slots, last + run + 1)
            with (
                torch.inference_mode(),
                set_forward_context(
                    metadata, self._vllm_config, num_tokens=len(rows), slot_mapping=dict.fromkeys(metadata, slots)
                ),
            ):
                hidden = runner.model(input_ids=input_ids, positions=position)
                input_ids = runner.model.compute_logits(hidden).argmax(-1).int()
            proposed.append(input_ids)
            position = position + 1
        return torch.stack(proposed, 1)

    def _groups(self) -> list[Any]:
        groups: list[Any] = self._runner.attn_groups
        if len(groups) != 1:
            raise UnsupportedError(
                f"the model has {len(groups)} kinds of KV cache; self-speculative decoding supports one, start without "
                "--draft-width"
            )
        return groups

    @staticmethod
    def _attention(
        groups: Any, blocks: torch.Tensor, seq_lens: torch.Tensor, slots: torch.Tensor, max_seq_len: int
    ) -> dict[str, Any]:
        """Metadata of every attention layer for a row per request."""
        count = len(slots)
        starts = torch.arange(count + 1, dtype=torch.int32)
        common = CommonAttentionMetadata(
            query_start_loc=starts.to(slots.device), query_start_loc_cpu=starts, seq_lens=seq_lens.int(), num_reqs=count,
            num_actual_tokens=count, max_query_len=1, max_seq_len=max_seq_len, block_table_tensor=blocks, slot_mapping=slots,
            seq_lens_cpu_upper_bound=torch.full((count,), max_seq_len, dtype=torch.int32),
        )  # fmt: skip
        metadata: dict[str, Any] = {}
        for group in groups:
            built = group.get_metadata_builder().build_for_drafting(common, draft_index=1)
            metadata |= dict.fromkeys(group.layer_names, built)
        return metadata
