"""Graph mode against eager mode on a GPU: graphs of any mix, and graphs of one width, answer as no graph does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .greedy import READ, agree
from .replica_server import ROOT, engine_environment

pytestmark = [pytest.mark.engine, pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")]

SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams
from matgptq_vllm.core.replica import ReplicaOptions

def answers(graph_widths, **options):
    llm = LLM(sys.argv[1], dtype="bfloat16", max_model_len=256, max_num_seqs=64,
              gpu_memory_utilization=0.1, kv_cache_memory_bytes=1 << 30,
              worker_cls="matgptq_vllm.compat.worker.MatGPTQWorker",
              scheduler_cls="matgptq_vllm.compat.scheduler.MatGPTQScheduler",
              additional_config=ReplicaOptions(graph_widths=graph_widths).to_additional_config(), **options)
    found = []
    for precisions in (["8"], ["2"] * 5, ["4"] * 64, ["8", "2", "4", "mix-depth"] * 8):
        params = [SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=2,
                                 extra_args={"precision": precision}) for precision in precisions]
        prompts = [f"Chapter {number}. The old man looked at the sea and" for number in range(len(params))]
        found += greedy_answers(llm.generate(prompts, params, use_tqdm=False))
    return found

if __name__ == "__main__":
    print(json.dumps(answers(json.loads(sys.argv[2]), **json.loads(sys.argv[3]))))
"""


@pytest.mark.parametrize("graph_widths", [[], [2, 4, 8]], ids=["any mix", "by width"])
def test_graphs_answer_as_eager_mode_does(profiled_parent: Path, tmp_path: Path, graph_widths: list[int]) -> None:
    script = tmp_path / "answers.py"
    script.write_text(READ + SCRIPT)

    def run(widths: list[int], **options: object) -> list[dict]:
        command = [sys.executable, str(script), str(profiled_parent), json.dumps(widths), json.dumps(options)]
        environment = engine_environment("v2") | {"VLLM_LOGGING_LEVEL": "ERROR"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        answers: list[dict] = json.loads(done.stdout.splitlines()[-1])
        return answers

    eager, captured = run([], enforce_eager=True), run(graph_widths)
    parted = sum(not agree(one, other) for one, other in zip(eager, captured, strict=True))
    assert parted <= 0.02 * len(eager)
