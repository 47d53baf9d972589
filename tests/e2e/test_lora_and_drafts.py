"""LoRA adapters on top of slices, and drafts by n-grams: an adapter and a precision per request in one batch."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from calibrate.evaluate.sliced_model import load_sliced_model

from .test_features import COMMON, WIDTHS
from .test_llm_api import answer_of, run_engine

pytestmark = pytest.mark.engine

ADAPTERS = ("first", "second")

SCRIPT = """
from vllm.lora.request import LoRARequest

# On a CPU, vLLM 0.32 gives a request without an adapter the one in the last slot, if any request beside it has one; of three
# slots, the last stays empty.
llm = engine(sys.argv[1], max_model_len=256, enable_lora=True, max_loras=3, max_lora_rank=8, disable_log_stats=False,
             speculative_config={"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}, **PRECISION)
adapters = [None] + [LoRARequest(Path(folder).name, i + 1, folder) for i, folder in enumerate(sys.argv[2:])]
# What is said three times is easy to guess.
asked = [(" ".join([prompt] * 3), width, adapter)
         for prompt in prompts(1, 8) for width in WIDTHS for adapter in adapters]
outputs = llm.generate([prompt for prompt, _, _ in asked], [params(width, max_tokens=12, logprobs=1) for _, width, _ in asked],
                       lora_request=[adapter for _, _, adapter in asked], use_tqdm=False)
print(json.dumps({
    "answers": [{"adapter": adapter and adapter.lora_name, "width": width, "prompt": output.prompt_token_ids,
                 "tokens": output.outputs[0].token_ids, "logprobs": logprobs(output)}
                for (_, width, adapter), output in zip(asked, outputs)],
    "accepted": sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:spec_decode_num_accepted_tokens"),
}))
"""


@pytest.fixture(scope="module")
def adapters(example_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Random adapters of every linear layer, large enough to change what is answered."""
    folders = []
    for seed, name in enumerate(ADAPTERS):
        torch.manual_seed(seed)
        config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(example_model, dtype=torch.float32), config)
        folders.append(tmp_path_factory.mktemp("adapters") / name)
        model.save_pretrained(folders[-1])
    return folders


@pytest.fixture(scope="module", params=["v1", "v2"])
def found(request: pytest.FixtureRequest, profiled_parent: Path, adapters: list[Path]) -> dict:
    return answer_of(run_engine(COMMON + SCRIPT, profiled_parent, request.param, *map(str, adapters)))


def test_an_adapter_is_added_to_the_slice_that_the_request_asked_for(
    found: dict, profiled_parent: Path, adapters: list[Path]
) -> None:
    folder_of = {path.name: path for path in adapters}
    assert len(found["answers"]) == len(WIDTHS) * (1 + len(ADAPTERS))
    for answer in found["answers"]:
        model = load_sliced_model(profiled_parent, answer["width"]).float()
        if answer["adapter"] is not None:
            model = PeftModel.from_pretrained(model, folder_of[answer["adapter"]])
        ids = torch.tensor([answer["prompt"] + answer["tokens"]])
        with torch.inference_mode():
            expected = model(ids).logits[0].float().log_softmax(-1)
        start = len(answer["prompt"])
        wanted = [expected[start + i - 1, token].item() for i, token in enumerate(answer["tokens"])]
        assert answer["logprobs"] == pytest.approx(wanted, abs=0.02), (answer["width"], answer["adapter"])
        # Greedy: a draft is accepted only where it is what the slice itself would have said.
        best = expected[start - 1 : -1].max(-1).values.tolist()
        assert wanted == pytest.approx(best, abs=0.02)


def test_drafts_were_accepted(found: dict) -> None:
    assert found["accepted"] > 0


def test_adapters_and_widths_all_answer_differently(found: dict) -> None:
    texts = {json.dumps([round(value, 2) for value in answer["logprobs"]]) for answer in found["answers"]}
    assert len(texts) == len(found["answers"])
