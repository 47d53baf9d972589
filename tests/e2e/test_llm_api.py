"""vLLM's offline API: plain ``LLM(DIR)``, and per-request precision through ``extra_args``. One process per engine."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from .replica_server import ROOT, engine_environment

pytestmark = pytest.mark.engine

PREAMBLE = """
import json, sys
import torch
from vllm import LLM, SamplingParams

# What vLLM finds free on a GPU would be wrong while other engines start beside this one.
KV_CACHE = dict(kv_cache_memory_bytes=1 << 28) if torch.cuda.is_available() else {}

def engine(directory, distributed_executor_backend="uni", **options):
    defaults = dict(dtype="float32", enforce_eager=True, max_model_len=512, max_num_seqs=16, disable_log_stats=True)
    return LLM(directory, block_size=32, distributed_executor_backend=distributed_executor_backend,
               gpu_memory_utilization=0.1, **{**defaults, **KV_CACHE, **options})

PRECISION = dict(worker_cls="matgptq_vllm.compat.worker.MatGPTQWorker",
                 scheduler_cls="matgptq_vllm.compat.scheduler.MatGPTQScheduler")

def ask(llm, *precisions, prompt="The old man looked at the sea and"):
    params = [SamplingParams(temperature=0, max_tokens=8, logprobs=1,
                             extra_args=None if p is None else {"precision": p}) for p in precisions]
    return llm.generate([prompt] * len(params), params, use_tqdm=False)

def logprobs(output):
    steps = zip(output.outputs[0].logprobs, output.outputs[0].token_ids)
    return [step[token].logprob for step, token in steps]
"""


def run_engine(script: str, directory: Path, runner: str = "v1", *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PREAMBLE + script, str(directory), *arguments],
        capture_output=True,
        text=True,
        env={**engine_environment(runner), "VLLM_LOGGING_LEVEL": "ERROR"},
        cwd=ROOT,
        timeout=300,
    )


def answer_of(result: subprocess.CompletedProcess[str]) -> dict:
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


PLAIN = """
llm = engine(sys.argv[1])
print(json.dumps({"default": logprobs(ask(llm, None)[0]), "asked": logprobs(ask(llm, "2")[0])}))
"""

MIXED = """
llm = engine(sys.argv[1], **PRECISION)
together = ask(llm, "8", 4, "mix-depth", None, "auto", "2")
alone = {p: logprobs(ask(llm, p)[0]) for p in ("8", "4", "mix-depth", "2")}
refused = ask(llm, "4", "5", prompt="He")
long = "It was the best of times, it was the worst of times. " * 10
cached = [ask(llm, p, prompt=long)[0].num_cached_tokens for p in ("4", "4", 4, "3", None, "8")]
print(json.dumps({
    "together": [logprobs(output) for output in together], "alone": alone, "cached": cached,
    "refused": [[output.outputs[0].finish_reason, str(output.outputs[0].stop_reason), len(output.outputs[0].token_ids)]
                for output in refused],
    "after": logprobs(ask(llm, "8")[0]),
}))
"""


def test_plain_llm_serves_the_default_precision(profiled_parent: Path) -> None:
    answer = answer_of(run_engine(PLAIN, profiled_parent))
    # Without the worker and scheduler classes a request's own precision has no effect.
    assert answer["asked"] == pytest.approx(answer["default"], abs=1e-4)


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_extra_args_choose_a_profile_and_isolate_the_prefix_cache(profiled_parent: Path, runner: str) -> None:
    answer = answer_of(run_engine(MIXED, profiled_parent, runner))
    alone = answer["alone"]
    for together, expected in zip(answer["together"], ["8", "4", "mix-depth", "8", "8", "2"], strict=True):
        assert together == pytest.approx(alone[expected], abs=1e-3)
    assert len({tuple(round(value, 2) for value in values) for values in alone.values()}) == len(alone)

    # An unknown precision ends that request alone, saying what there is; the one beside it is answered.
    (good_reason, _, good_tokens), (bad_reason, why, bad_tokens) = answer["refused"]
    assert (good_reason, good_tokens) == ("length", 8)
    assert (bad_reason, bad_tokens) == ("error", 0)
    assert "'5'" in why
    assert "2, 3, 4, 6, 8, mix-kind, mix-depth" in why
    assert answer["after"] == pytest.approx(alone["8"], abs=1e-3)

    first, second, third, other, default, default_by_name = answer["cached"]
    assert (first, other, default) == (0, 0, 0)
    assert second == third == default_by_name > 60


SHARDED = """
if __name__ == "__main__":
    ranks = {}
    for size in (1, 2):
        llm = engine(sys.argv[1], "mp", tensor_parallel_size=size, **PRECISION)
        ranks[size] = {
            "logprobs": [logprobs(output) for output in ask(llm, "8", "4", "3", "mix-kind")],
            "code_bytes": [report["code_bytes"] for report in llm.collective_rpc("matgptq_replica")],
        }
        del llm
    print(json.dumps(ranks))
"""


def test_two_ranks_hold_half_each_and_answer_as_one(profiled_parent: Path, tmp_path: Path) -> None:
    script = tmp_path / "sharded.py"  # Engines of several ranks start processes, which need a file to import.
    script.write_text(PREAMBLE + SHARDED)
    result = subprocess.run(
        [sys.executable, str(script), str(profiled_parent)],
        capture_output=True,
        text=True,
        env={**engine_environment("v1"), "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
        cwd=ROOT,
        timeout=300,
    )
    ranks = answer_of(result)
    for one, two in zip(ranks["1"]["logprobs"], ranks["2"]["logprobs"], strict=True):
        assert two == pytest.approx(one, abs=1e-3)
    (whole,) = ranks["1"]["code_bytes"]
    assert ranks["2"]["code_bytes"] == [whole // 2, whole // 2]


FOLLOWING = """
llm = engine(sys.argv[1], **PRECISION)
core = llm.llm_engine
prompt = "The old man looked at the sea and thought of the boat that his brother had built in the winter before the war. " * 2

def params(tokens, **extra):
    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, extra_args={"precision": "8", **extra})

def computed():
    return llm.collective_rpc("matgptq_replica")[0]["tokens"]

def finish(*names, told=None):
    done, steps = {}, 0
    while core.has_unfinished_requests():
        for output in core.step():
            if output.finished:
                done[output.request_id] = output
        steps += 1
        if steps == 3 and told:
            llm.collective_rpc("matgptq_follow", args=(told,))
    return [done[name] for name in names]

core.add_request("alone", prompt, params(12))
(alone,) = finish("alone")
before = computed()
core.add_request("follows", prompt, params(40, precision_group="g"))
core.add_request("named", prompt, params(12))
follows, named = finish("follows", "named", told={"g": "2"})
gained = {name: count - before[name] for name, count in computed().items()}
text = {"prompt_token_ids": [*follows.prompt_token_ids, *follows.outputs[0].token_ids, 5]}
print(json.dumps({
    "alone": list(alone.outputs[0].token_ids), "named": list(named.outputs[0].token_ids), "gained": gained,
    "follows": list(follows.outputs[0].token_ids), "prompt": len(alone.prompt_token_ids),
    "cached": [llm.generate([text], params(1), use_tqdm=False)[0].num_cached_tokens for _ in range(2)],
}))
"""


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_a_running_request_follows_its_group_and_nobody_else_notices(profiled_parent: Path, runner: str) -> None:
    found = answer_of(run_engine(FOLLOWING, profiled_parent, runner))
    assert found["named"] == found["alone"]
    # Told after a few tokens, it changes with the next step; its last token is computed by nobody.
    prompt, block = found["prompt"], 32
    changes_at = prompt + 2
    assert found["gained"]["2"] == prompt + 40 - 1 - changes_at
    assert found["follows"][:3] == found["alone"][:3]
    # Its prompt is in the cache for others at 8, what it wrote afterwards is not; the second time, all is.
    whole = (prompt + 40) // block * block
    assert block <= prompt < prompt + 12 < 2 * block
    assert found["cached"] == [prompt // block * block, whole]
