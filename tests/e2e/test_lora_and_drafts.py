"""LoRA adapters on top of slices, and drafts by n-grams or by another model: requests of all widths in one batch."""

import json
import shutil
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
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
# On runner V2 a kernel of vLLM's looks n-grams up, which Triton's interpreter cannot run.
drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3} if sys.argv[2] == "v1" else None
llm = engine(sys.argv[1], max_model_len=256, enable_lora=True, max_loras=3, max_lora_rank=8, disable_log_stats=False,
             speculative_config=drafts, **PRECISION)
adapters = [None] + [LoRARequest(Path(folder).name, i + 1, folder) for i, folder in enumerate(sys.argv[3:])]
# What is said three times is easy to guess.
asked = [(" ".join([prompt] * 3), width, adapter)
         for prompt in prompts(1, 8) for width in WIDTHS for adapter in adapters]
outputs = llm.generate([prompt for prompt, _, _ in asked], [params(width, max_tokens=12, logprobs=1) for _, width, _ in asked],
                       lora_request=[adapter for _, _, adapter in asked], use_tqdm=False)
print(json.dumps({
    "answers": [{"adapter": adapter and adapter.lora_name, "width": width, "prompt": output.prompt_token_ids,
                 "tokens": output.outputs[0].token_ids, "logprobs": logprobs(output)}
                for (_, width, adapter), output in zip(asked, outputs)],
    "drafted": drafts is not None,
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
    if torch.cuda.is_available():
        pytest.skip("on a GPU, vLLM adds adapters of 16-bit types only; test_features_gpu has them")
    return answer_of(run_engine(COMMON + SCRIPT, profiled_parent, request.param, request.param, *map(str, adapters)))


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
    assert (found["accepted"] > 0) == found["drafted"]


def test_adapters_and_widths_all_answer_differently(found: dict) -> None:
    texts = {json.dumps([round(value, 2) for value in answer["logprobs"]]) for answer in found["answers"]}
    assert len(texts) == len(found["answers"])


DRAFTED = """
llm = engine(sys.argv[1], max_model_len=256, disable_log_stats=False,
             speculative_config={"method": sys.argv[2], "model": sys.argv[3], "num_speculative_tokens": 2}, **PRECISION)
found = mixed_and_single(llm, prompts(10, 10))
found["prompts"] = [llm.get_tokenizer().encode(prompt) for prompt in prompts(10, 10)]
found["accepted"] = sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:spec_decode_num_accepted_tokens")
print(json.dumps(found))
"""


@pytest.fixture
def eagle_head(example_model: Path, tmp_path: Path) -> Path:
    """A head that is the example model's last layer on top of the hidden states: a poor guesser, but one."""
    tensors = load_file(example_model / "model.safetensors")
    config = json.loads((example_model / "config.json").read_text())
    last = f"model.layers.{config['num_hidden_layers'] - 1}."
    size = config["hidden_size"]
    head = {"fc.weight": torch.cat([torch.zeros(size, size), torch.eye(size)], dim=1).bfloat16()}
    for name, tensor in tensors.items():
        if name.startswith(last) and "input_layernorm" not in name:
            head[f"layers.0.{name.removeprefix(last)}"] = tensor
    folder = tmp_path / "head"
    folder.mkdir()
    save_file(head, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    for path in example_model.glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


@pytest.mark.parametrize(("method", "runner"), [("eagle", "v1"), ("draft_model", "v2")])
def test_another_models_drafts_are_verified_at_the_requests_own_width(
    profiled_parent: Path, example_model: Path, eagle_head: Path, method: str, runner: str
) -> None:
    if method == "draft_model" and Version(version("vllm")) < Version("0.32"):
        pytest.skip("before vLLM 0.32, model runner V2 knows no drafts of whole models")
    drafter = eagle_head if method == "eagle" else example_model
    found = answer_of(run_engine(COMMON + DRAFTED, profiled_parent, runner, method, str(drafter)))
    assert found["mixed"] == found["single"]
    assert found["accepted"] > 0
    for i, (prompt, (answer,)) in enumerate(zip(found["prompts"], found["mixed"], strict=True)):
        with torch.inference_mode():
            model = load_sliced_model(profiled_parent, WIDTHS[i % len(WIDTHS)])
            logprobs = model(torch.tensor([prompt + answer])).logits[0].float().log_softmax(-1)[len(prompt) - 1 : -1]
        chosen = [logprobs[j, token].item() for j, token in enumerate(answer)]
        assert chosen == pytest.approx(logprobs.max(-1).values.tolist(), abs=0.02)
