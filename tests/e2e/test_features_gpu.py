"""On a GPU, with the kernels and CUDA graphs: options of vLLM at several precisions in one batch answer as one precision does.

tests/e2e/test_features and its neighbours ask the same in float32, which the kernels do not multiply. Here answers are in
float16, so that kernels for other batch sizes round otherwise: answers may part, where two candidates are close.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from matgptq_vllm.core.replica import ReplicaOptions

from .greedy import READ, agree
from .replica_server import ROOT, engine_environment
from .test_features import COMMON
from .test_llm_api import answer_of
from .test_lora_and_drafts import adapters as adapters

pytestmark = [pytest.mark.engine, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

OPTIONS: dict[str, tuple[str, dict]] = {
    # vLLM's attention of 8 bits answers in bfloat16 only.
    "fp8 keys and values": ("v2", {"kv_cache_dtype": "fp8", "dtype": "bfloat16"}),
    "n-gram drafts": ("v1", {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}}),
    "short of blocks": ("v2", {"num_gpu_blocks_override": 48, "max_num_seqs": 40}),
    "chunked prompts": ("v2", {"max_num_batched_tokens": 64, "max_num_seqs": 16}),
    "graphs by width": ("v2", {"additional_config": ReplicaOptions(graph_widths=(2, 3, 4, 6, 8)).to_additional_config()}),
    "adapters": ("v2", {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8}),
}
"""What is asked: the model runner, and more arguments of the engine."""

SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

if __name__ == "__main__":
    options = json.loads(sys.argv[2])
    llm = LLM(sys.argv[1], **{"dtype": "float16", "max_model_len": 256, "max_num_seqs": 64,
              "gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 1 << 30,
              "worker_cls": "matgptq_vllm.compat.worker.MatGPTQWorker",
              "scheduler_cls": "matgptq_vllm.compat.scheduler.MatGPTQScheduler", **options})
    # What is said twice is easy to draft.
    some = [" ".join([prompt] * 2) for prompt in prompts(40, 20)]
    adapters = [None] + [LoRARequest(Path(folder).name, i + 1, folder) for i, folder in enumerate(sys.argv[3:])]
    adapter_of = (lambda i: {"lora_request": adapters[i % 3]}) if options.get("enable_lora") else (lambda i: {})
    print(json.dumps(mixed_and_single(llm, some, adapter_of, greedy_answers, max_tokens=24, logprobs=2)))
"""


@pytest.mark.parametrize("name", OPTIONS)
def test_mixed_batches_answer_as_batches_of_one_precision(
    profiled_parent: Path, adapters: list[Path], tmp_path: Path, name: str
) -> None:
    # Engines of several processes start from a file.
    script = tmp_path / "features.py"
    script.write_text(COMMON + READ + SCRIPT)
    runner, options = OPTIONS[name]
    command = [sys.executable, str(script), str(profiled_parent), json.dumps(options), *map(str, adapters)]
    environment = {**engine_environment(runner), "VLLM_LOGGING_LEVEL": "ERROR"}
    found = answer_of(subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=500))
    pairs = zip(found["single"], found["mixed"], strict=True)
    tolerance = 0.13 if "kv_cache_dtype" in options else 0.05
    parted = [number for number, (one, other) in enumerate(pairs) if not agree(one, other, tolerance)]
    # Logits of bfloat16 are multiples of 1/16, and a last bit's difference of a key can be a step of a sixteenth in 8 bits.
    assert len(parted) <= (4 if "kv_cache_dtype" in options else 0), parted
