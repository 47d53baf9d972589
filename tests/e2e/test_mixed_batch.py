"""Requests of different precisions in one batch are answered as if each were alone, and as transformers answers."""

import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import httpx
import pytest
import torch
from transformers import PreTrainedModel

from calibrate.evaluate.sliced_model import load_sliced_model

from .replica_server import MODEL_NAME, ReplicaServer

pytestmark = pytest.mark.engine

PROFILES = ("2", "3", "4", "6", "8", "mix-kind", "mix-depth")
NUM_REQUESTS = 40
MAX_TOKENS = 8
LOGPROB_TOLERANCE = 0.02
TIE_LOGPROB = 0.001

PROMPTS = (
    "The old man looked at the sea and",
    "It was a dark night, and the wind",
    '"I cannot tell you," said the lady,',
    "In the spring of that year the regiment marched from the city towards the mountains. There",
    "He",
    "When the watch was found at last, the captain turned to the boy who had found it and asked him, very quietly,",
)


@dataclass(frozen=True)
class Answer:
    """What a server gave for one request."""

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    runner_up_gap: tuple[float, ...]
    """Per token, how far the second candidate lay behind, in logprob."""


def ask(client: httpx.Client, prompt: str, precision: str) -> Answer:
    body = {
        "model": MODEL_NAME,
        "prompt": prompt,
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
        "logprobs": 2,
        "return_token_ids": True,
        "ignore_eos": True,
    }
    response = client.post("/v1/completions", json=body, headers={"X-Precision": precision})
    assert response.status_code == 200, response.text
    assert response.headers["x-precision"] == precision
    choice = response.json()["choices"][0]
    gaps = tuple(_gap(candidates.values()) for candidates in choice["logprobs"]["top_logprobs"])
    return Answer(
        tuple(choice["prompt_token_ids"]), tuple(choice["token_ids"]), tuple(choice["logprobs"]["token_logprobs"]), gaps
    )


def _gap(candidates) -> float:
    first, second, *_ = sorted(candidates, reverse=True)
    return first - second


def reference_logprobs(model: PreTrainedModel, answer: Answer) -> list[float]:
    """What plain transformers gives to the tokens of ``answer``."""
    ids = torch.tensor([answer.prompt_ids + answer.token_ids])
    with torch.inference_mode():
        logprobs = model(ids).logits[0].float().log_softmax(-1)
    start = len(answer.prompt_ids)
    return [logprobs[start + i - 1, token].item() for i, token in enumerate(answer.token_ids)]


@pytest.fixture(scope="module")
def sliced_model(profiled_parent: Path):
    return cache(lambda profile: load_sliced_model(profiled_parent, profile))


def test_forty_mixed_requests_answer_like_each_alone_and_like_transformers(server: ReplicaServer, sliced_model) -> None:
    rng = random.Random(0)
    requests = [(rng.choice(PROMPTS), profile) for profile in PROFILES for _ in range(2)]
    requests += [(rng.choice(PROMPTS), rng.choice(PROFILES)) for _ in range(NUM_REQUESTS - len(requests))]
    rng.shuffle(requests)

    with server.client() as client:
        steps_before = client.get("/v1/precisions").json()
        assert steps_before["workers"][0]["runner"] == server.runner
        with ThreadPoolExecutor(NUM_REQUESTS) as pool:
            together = list(pool.map(lambda request: ask(client, *request), requests))
        alone = {request: ask(client, *request) for request in set(requests)}
        steps_after = client.get("/v1/precisions").json()

    # They really shared batches: forty requests took far fewer steps than one after the other would have.
    num_steps = steps_after["workers"][0]["steps"] - steps_before["workers"][0]["steps"]
    assert num_steps < (len(alone) + NUM_REQUESTS / 2) * MAX_TOKENS

    for request, answer in zip(requests, together, strict=True):
        _assert_same_greedy_tokens(answer, alone[request])

    differences = {}
    for (_, profile), answer in zip(requests, together, strict=True):
        expected = reference_logprobs(sliced_model(profile), answer)
        difference = max(abs(a - b) for a, b in zip(answer.logprobs, expected, strict=True))
        differences[profile] = max(difference, differences.get(profile, 0.0))
    assert max(differences.values()) <= LOGPROB_TOLERANCE, differences

    # The check above can fail: the answers of a profile do not fit the weights of any other.
    for profile in PROFILES:
        answers = [answer for (_, asked), answer in zip(requests, together, strict=True) if asked == profile]
        for other in set(PROFILES) - {profile}:
            swapped = [
                abs(a - b)
                for answer in answers
                for a, b in zip(answer.logprobs, reference_logprobs(sliced_model(other), answer), strict=True)
            ]
            assert max(swapped) > LOGPROB_TOLERANCE, f"{profile} cannot be told from {other}"


def _assert_same_greedy_tokens(together: Answer, alone: Answer) -> None:
    """Equal, or first different where the two best candidates were as good as tied."""
    for index, (a, b) in enumerate(zip(together.token_ids, alone.token_ids, strict=True)):
        if a != b:
            assert min(together.runner_up_gap[index], alone.runner_up_gap[index]) <= TIE_LOGPROB, (index, together, alone)
            return
