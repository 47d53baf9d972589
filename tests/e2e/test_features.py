"""What else vLLM's users turn on, at several precisions in one batch: answers are those of a run at one precision.

One engine per group of features: a small KV cache shared by everything that needs no option of its own.
"""

import json
import re
from pathlib import Path

import pytest
import torch

from calibrate.evaluate.sliced_model import load_sliced_model

from .test_llm_api import answer_of, run_engine

pytestmark = pytest.mark.engine

WIDTHS = ("8", "6", "4", "3", "2")

COMMON = """
from pathlib import Path

WIDTHS = ("8", "6", "4", "3", "2")
WORDS = Path("examples/text/calibration.txt").read_text().split()

def prompts(count, words, start=0):
    return [" ".join(WORDS[first : first + words]) for first in range(start, start + 97 * count, 97)]

def params(precision, **options):
    options = {"temperature": 0, "max_tokens": 8, "ignore_eos": True, **options}
    return SamplingParams(extra_args={"precision": precision}, **options)

def tokens(outputs):
    return [[list(sample.token_ids) for sample in output.outputs] for output in outputs]

def mixed_and_single(llm, prompts, generate_options=lambda i: {}, read=tokens, **options):
    # Every prompt at one width: all in one batch, and those of each width in a batch of their own.
    widths = [WIDTHS[i % len(WIDTHS)] for i in range(len(prompts))]
    def ask(rows):
        arguments = {name: [generate_options(i)[name] for i in rows] for name in generate_options(0)}
        asked = [params(widths[i], **options) for i in rows]
        return read(llm.generate([prompts[i] for i in rows], asked, use_tqdm=False, **arguments))
    mixed = ask(range(len(prompts)))
    single = list(mixed)
    for width in WIDTHS:
        rows = [i for i, own in enumerate(widths) if own == width]
        for i, answer in zip(rows, ask(rows)):
            single[i] = answer
    return {"mixed": mixed, "single": single}
"""

SHARED = """
from vllm.sampling_params import BeamSearchParams, StructuredOutputsParams

v1 = sys.argv[2] == "v1"
llm = engine(sys.argv[1], max_model_len=256, max_num_seqs=64, num_gpu_blocks_override=128, scheduling_policy="priority",
             disable_log_stats=False, **PRECISION)
core = llm.llm_engine.engine_core.engine_core
pool = core.scheduler.kv_cache_manager.block_pool
free_blocks = pool.get_num_free_blocks
found = {"free": [free_blocks()]}
some = prompts(10, 20)

found["samples"] = mixed_and_single(llm, some, n=3, temperature=0.9, seed=5, max_tokens=8 if v1 else 4)

GUIDES = {"json": {"json": {"type": "object", "properties": {"age": {"type": "integer", "maximum": 99}}, "required": ["age"]}},
          "regex": {"regex": "[a-c]{3,7}x"}, "choice": {"choice": ["yes", "no", "perhaps"]}}
# On runner V2 a kernel of vLLM's applies the grammar, which Triton's interpreter cannot run.
for name, guide in GUIDES.items() if v1 else ():
    found[name] = mixed_and_single(
        llm, some, max_tokens=24, ignore_eos=False, structured_outputs=StructuredOutputsParams(**guide))
    found[name]["texts"] = [llm.get_tokenizer().decode(answer[0], skip_special_tokens=True) for answer in found[name]["mixed"]]

def of_prompt(output):
    steps = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:])
    return [candidates[token].logprob for token, candidates in steps]

asked = [params(width, prompt_logprobs=0) for width in WIDTHS]
found["prompt_logprobs"] = [of_prompt(output) for output in llm.generate(some[:5], asked, use_tqdm=False)]
found["prompt_token_ids"] = [output.prompt_token_ids for output in llm.generate(some[:5], asked, use_tqdm=False)]

def beams(widths, prompts, beam_width):
    named = [{"prompt": prompt, "cache_salt": f"precision={width}"} for prompt, width in zip(prompts, widths)]
    outputs = llm.beam_search(named, BeamSearchParams(beam_width=beam_width, max_tokens=6, ignore_eos=True))
    return [[sequence.tokens[-6:] for sequence in output.sequences] for output in outputs]

found["beams"] = {"mixed": beams(WIDTHS, some[:5], 3),
                  "single": [beams([width], [prompt], 3)[0] for width, prompt in zip(WIDTHS, some)]}
found["narrow beams"] = {"mixed": beams(WIDTHS, some[:5], 1),
                         "single": tokens(llm.generate(some[:5], [params(w, max_tokens=6) for w in WIDTHS], use_tqdm=False))}

def preemptions():
    return sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions")

# All but a few blocks are taken, so that few prompts are enough.
taken, kept = pool.get_new_blocks(free_blocks() - 12), preemptions()
found["pressure"] = mixed_and_single(llm, prompts(24, 15), lambda i: {"priority": i % 3}, max_tokens=20)
found["preemptions"] = preemptions() - kept
pool.free_blocks(taken)

engine_steps = llm.llm_engine
for i, prompt in enumerate(some):
    engine_steps.add_request(str(i), prompt, params(WIDTHS[i % 5]))
for _ in range(3):
    engine_steps.step()
engine_steps.abort_request([str(i) for i in range(0, 10, 2)])
left = {}
while engine_steps.has_unfinished_requests():
    left |= {output.request_id: list(output.outputs[0].token_ids) for output in engine_steps.step() if output.finished}
found["left"] = left
found["beside"] = tokens(llm.generate(some, [params(WIDTHS[i % 5]) for i in range(10)], use_tqdm=False))

llm.reset_prefix_cache()
heads = prompts(6, 60, start=20_000)
def cached(output):
    return output.num_cached_tokens
first = []
for width in WIDTHS:
    outputs = llm.generate(heads, [params(width, max_tokens=1)] * len(heads), use_tqdm=False)
    first += [cached(output) for output in outputs]
found["first"] = first
count = 2000 if v1 else 60
asked = [(heads[i % 6] + " " + WORDS[i % 50], WIDTHS[i % 5]) for i in range(count)]
outputs = llm.generate([prompt for prompt, _ in asked], [params(w, max_tokens=1) for _, w in asked], use_tqdm=False)
found["cached"] = [cached(output) for output in outputs]
given = {}
for question, output in zip(asked, outputs):
    given.setdefault(question, set()).add(output.outputs[0].token_ids[0])
llm.reset_prefix_cache()
questions = sorted(given)[::10]
fresh = [llm.generate([prompt], params(width, max_tokens=1), use_tqdm=False)[0] for prompt, width in questions]
found["given"] = [sorted(given[question]) for question in questions]
found["fresh"] = [[output.outputs[0].token_ids[0]] for output in fresh]

engine_steps.step()
found["free"].append(free_blocks())
found["known"] = llm.collective_rpc(lambda worker: worker.precision_state.num_requests)[0]
print(json.dumps(found))
"""


@pytest.fixture(scope="module", params=["v1", "v2"])
def found(request: pytest.FixtureRequest, profiled_parent: Path) -> dict:
    return answer_of(run_engine(COMMON + SHARED, profiled_parent, request.param, request.param))


def equal(answers: dict, count: int) -> None:
    """The mixed batch answered as those of one precision did, and there were ``count`` answers."""
    assert len(answers["mixed"]) == count
    assert answers["mixed"] == answers["single"]


def test_samples_of_one_prompt(found: dict) -> None:
    equal(found["samples"], 10)
    assert all(len({tuple(sample) for sample in samples}) == 3 for samples in found["samples"]["mixed"])


@pytest.mark.parametrize(("guide", "pattern"), [("regex", r"[a-c]{3,7}x"), ("choice", "yes|no|perhaps"), ("json", r"\{.*")])
def test_structured_output(found: dict, guide: str, pattern: str) -> None:
    if guide not in found:
        pytest.skip("runner V2 applies grammars in a kernel that Triton's interpreter cannot run")
    equal(found[guide], 10)
    texts = found[guide]["texts"]
    assert [text for text in texts if not re.fullmatch(pattern, text, re.DOTALL)] == []
    # An object may be cut off by the limit of tokens; those that end are what was asked for.
    whole = [json.loads(text) for text in texts if guide == "json" and text.rstrip().endswith("}")]
    assert all(answer["age"] <= 99 for answer in whole)


def test_logprobs_of_the_prompt(found: dict, profiled_parent: Path) -> None:
    for width, ids, logprobs in zip(WIDTHS, found["prompt_token_ids"], found["prompt_logprobs"], strict=True):
        with torch.inference_mode():
            expected = load_sliced_model(profiled_parent, width)(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        wanted = [expected[i, token].item() for i, token in enumerate(ids[1:])]
        assert logprobs == pytest.approx(wanted, abs=0.02)


def test_beam_search_at_the_precision_that_the_salt_names(found: dict) -> None:
    equal(found["beams"], 5)
    # A beam of one is greedy decoding at that precision.
    equal(found["narrow beams"], 5)
    assert all(len(beams) == 3 for beams in found["beams"]["mixed"])


def test_preempted_requests_go_on_at_their_own_precision(found: dict) -> None:
    assert found["preemptions"] > 10
    assert found["pressure"]["mixed"] == found["pressure"]["single"]


def test_aborted_requests_leave_the_others_alone(found: dict) -> None:
    wanted = {str(i): found["beside"][i][0] for i in range(1, 10, 2)}
    assert found["left"] == wanted


def test_prefixes_are_found_within_a_profile_only(found: dict) -> None:
    assert set(found["first"]) == {0}
    assert min(found["cached"]) >= 64
    assert found["given"] == found["fresh"]


def test_nothing_is_kept_of_requests_that_ended(found: dict) -> None:
    before, after = found["free"]
    assert after == before > 100
    assert found["known"] <= 1  # the last one is forgotten by the step after it
