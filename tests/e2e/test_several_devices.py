"""One parent on two GPUs: tensor, pipeline and data parallel engines answer as an engine on one does."""

import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from calibrate.evaluate.sliced_model import load_sliced_model

from .replica_server import ROOT, ReplicaServer, engine_environment
from .test_features import COMMON, WIDTHS
from .test_llm_api import PREAMBLE, answer_of
from .test_mixed_batch import LOGPROB_TOLERANCE, PROMPTS, ask, reference_logprobs

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs; two ranks of a CPU are in test_llm_api"),
]

SCRIPT = """
if __name__ == "__main__":
    kind, dtype = sys.argv[2:]
    llm = engine(sys.argv[1], "mp", dtype=dtype, max_model_len=256, **({} if kind == "one" else {kind: 2}), **PRECISION)
    asked = [params(WIDTHS[i % 5], prompt_logprobs=0, max_tokens=16) for i in range(20)]
    outputs = llm.generate(prompts(20, 40), asked, use_tqdm=False)
    print(json.dumps({
        "tokens": tokens(outputs),
        "prompts": [[step[token].logprob for step, token in zip(output.prompt_logprobs[1:], output.prompt_token_ids[1:])]
                    for output in outputs],
        "code_bytes": [report["code_bytes"] for report in llm.collective_rpc("matgptq_replica")],
    }))
"""


def run(script: Path, parent: Path, kind: str, dtype: str) -> dict:
    script.write_text(PREAMBLE + COMMON + SCRIPT)  # Engines of several ranks start processes, which need a file to import.
    environment = {**engine_environment("v2"), "VLLM_LOGGING_LEVEL": "ERROR"}
    command = [sys.executable, str(script), str(parent), kind, dtype]
    return answer_of(subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=500))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("bfloat16", 0.15)])
@pytest.mark.parametrize("kind", ["tensor_parallel_size", "pipeline_parallel_size"])
def test_two_ranks_answer_as_one(profiled_parent: Path, tmp_path: Path, kind: str, dtype: str, tolerance: float) -> None:
    one, two = (run(tmp_path / "ranks.py", profiled_parent, name, dtype) for name in ("one", kind))
    for first, second in zip(one["prompts"], two["prompts"], strict=True):
        assert second == pytest.approx(first, abs=tolerance)
    if dtype == "float32":
        assert two["tokens"] == one["tokens"]
    assert sum(two["code_bytes"]) == sum(one["code_bytes"])
    assert max(two["code_bytes"]) == sum(one["code_bytes"]) // 2


def test_two_replicas_behind_one_address_answer_at_every_width(profiled_parent: Path, tmp_path: Path) -> None:
    rng = random.Random(0)
    requests = [(rng.choice(PROMPTS), WIDTHS[i % 5]) for i in range(30)]
    replicas = ReplicaServer(profiled_parent, tmp_path / "server.log", ["--data-parallel-size", "2"], runner="v2")
    with replicas as server, server.client() as client, ThreadPoolExecutor(len(requests)) as pool:
        answers = list(pool.map(lambda request: ask(client, *request), requests))
    models = {width: load_sliced_model(profiled_parent, width) for width in WIDTHS}
    for (_, width), answer in zip(requests, answers, strict=True):
        expected = reference_logprobs(models[width], answer)
        assert max(abs(a - b) for a, b in zip(answer.logprobs, expected, strict=True)) <= LOGPROB_TOLERANCE
