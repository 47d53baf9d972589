"""Self-speculative decoding in a real engine: what a narrow slice drafts changes no answer, and leaves nothing in the cache."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from .greedy import agree
from .replica_server import ROOT, engine_environment

pytestmark = pytest.mark.engine

SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams
from matgptq_vllm.core.replica import SELF_DRAFT_CLASS, ReplicaOptions

directory = sys.argv[1]
PRECISIONS = ["8", "4", "mix-kind", "3", "2", "6"]
TEXT = "It was the best of times, it was the worst of times. The old man looked at the sea and "

def answers(drafting):
    options = {"additional_config": ReplicaOptions(draft_width=3 if drafting else None).to_additional_config()}
    if drafting:
        options["speculative_config"] = {"method": "custom_class", "model": SELF_DRAFT_CLASS, "num_speculative_tokens": 3}
    llm = LLM(directory, dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=8, block_size=32,
              distributed_executor_backend="uni", disable_log_stats=False, gpu_memory_utilization=0.2,
              worker_cls="matgptq_vllm.compat.worker.MatGPTQWorker",
              scheduler_cls="matgptq_vllm.compat.scheduler.MatGPTQScheduler", **options)

    def ask(prompts, max_tokens, precisions):
        params = [SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, logprobs=2,
                                 extra_args={"precision": precision}) for precision in precisions]
        return llm.generate(prompts, params, use_tqdm=False)

    def shown(output):
        steps = output.outputs[0].logprobs
        return {"tokens": list(output.outputs[0].token_ids),
                "top": [{str(token): value.logprob for token, value in step.items()} for step in steps]}

    # The whole context of the model, so that drafting has to stop before its end.
    first = ask([TEXT * (1 + index % 3) for index in range(6)], 40, PRECISIONS)
    # Again with what was generated as part of the prompt: its blocks come from the cache.
    again = [{"prompt_token_ids": [*output.prompt_token_ids, *output.outputs[0].token_ids]} for output in first]
    second = ask(again, 4, PRECISIONS)
    to_end = ask([TEXT], 256 - len(first[0].prompt_token_ids), ["8"])
    found = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    return {
        "first": [shown(output) for output in first], "second": [shown(output) for output in second],
        "length": len(to_end[0].outputs[0].token_ids) + len(to_end[0].prompt_token_ids),
        "cached": [output.num_cached_tokens for output in second],
        "drafted": found.get("vllm:spec_decode_num_draft_tokens", 0),
        "accepted": found.get("vllm:spec_decode_num_accepted_tokens", 0),
    }

print(json.dumps([answers(False), answers(True)]))
"""


def test_drafting_changes_no_greedy_answer_and_leaves_no_narrow_keys(profiled_parent: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(profiled_parent)],
        capture_output=True,
        text=True,
        env={**engine_environment("v1"), "VLLM_LOGGING_LEVEL": "ERROR"},
        cwd=ROOT,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    plain, drafting = json.loads(done.stdout.splitlines()[-1])
    for one, other in zip(plain["first"], drafting["first"], strict=True):
        assert agree(one, other)
    assert drafting["cached"] == plain["cached"]
    for before, after, one, other in zip(plain["first"], drafting["first"], plain["second"], drafting["second"], strict=True):
        if before["tokens"] == after["tokens"]:
            # Keys that the draft left in a cached block would change what follows from it.
            top = max(one["top"][0].values())
            assert max(other["top"][0].values()) == pytest.approx(top, abs=2e-3)
    assert drafting["length"] == plain["length"] == 256
    assert plain["drafted"] == 0
    # Most of what 3 bits propose, 8 bits would say too.
    assert drafting["accepted"] > 0.3 * drafting["drafted"] > 0
