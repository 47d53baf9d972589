"""Do two servers, or two ways of asking one, answer alike? ``python -m loadtests.agreement record`` and ``compare``.

``record`` asks a running server for greedy continuations of the same prompts at every precision, and keeps tokens and
logprobs. ``compare`` sets two such records side by side: a GPU's against a CPU's, CUDA graphs against eager mode, mixed
batches (``--concurrency 40``) against one request at a time (``--concurrency 1``). Greedy answers may part where two
candidates are as good as each other; then the first one's logprobs of both, at that place, differ by less than the tolerance.
"""

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx

CANDIDATES = 5
"""Most likely tokens kept of every step."""


@dataclass(frozen=True)
class Answer:
    """One greedy continuation."""

    precision: str
    prompt: str
    tokens: list[str]
    candidates: list[dict[str, float]]
    """Logprobs of the most likely tokens of every step, the chosen one among them."""


@dataclass(frozen=True)
class Comparison:
    """What ``compare`` found."""

    equal: int
    """Answers with the same tokens."""
    parted: tuple[float, ...]
    """Of all others: by how much the first record preferred its own token where they part; infinite if it did not even
    consider the other's."""
    largest_difference: float
    """Of the logprobs of the same token after the same tokens."""

    def beyond(self, tolerance: float) -> int:
        """Answers that part where the first record was sure."""
        return sum(gap >= tolerance for gap in self.parted)

    def text(self, tolerance: float) -> str:
        """The result in one line."""
        total = self.equal + len(self.parted)
        gaps = f", by at most {max(self.parted):.4f}" if self.parted else ""
        return (
            f"{self.equal} of {total} answers are equal; {len(self.parted)} part{gaps}; {self.beyond(tolerance)} of these by "
            f"{tolerance} or more; logprobs of the same token differ by at most {self.largest_difference:.4f}"
        )


def compare(first: Sequence[Answer], second: Sequence[Answer]) -> Comparison:
    """Both records must be of the same prompts and precisions, in the same order; ValueError if not."""
    if [(answer.precision, answer.prompt) for answer in first] != [(answer.precision, answer.prompt) for answer in second]:
        raise ValueError("the records are not of the same prompts and precisions; record both with the same options")
    equal, parted, largest = 0, [], 0.0
    for one, other in zip(first, second, strict=True):
        steps = zip(one.tokens, other.tokens, one.candidates, other.candidates, strict=False)
        for token, other_token, candidates, other_candidates in steps:
            if token != other_token:
                parted.append(candidates[token] - candidates.get(other_token, -float("inf")))
                break
            largest = max(largest, abs(candidates[token] - other_candidates[token]))
        else:
            equal += 1
    return Comparison(equal, tuple(parted), largest)


def prompts_of(text: str, count: int, words: int) -> list[str]:
    """``count`` passages of ``words`` words, evenly spread over a text; ValueError if it is too short."""
    all_words = text.split()
    if len(all_words) < count * words:
        raise ValueError(f"the text has {len(all_words)} words; {count} prompts of {words} need {count * words}")
    stride = len(all_words) // count
    return [" ".join(all_words[start : start + words]) for start in range(0, count * stride, stride)]


async def record(
    url: str, prompts: Sequence[str], precisions: Sequence[str], max_tokens: int, concurrency: int, api_key: str | None
) -> list[Answer]:
    """Ask for every prompt at every precision, in turn, so that requests in flight have different precisions."""
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=600) as client:
        models = (await client.get("/v1/models")).raise_for_status().json()
        model = models["data"][0]["id"]
        free = asyncio.Semaphore(concurrency)

        async def ask(prompt: str, precision: str) -> Answer:
            body = {
                "model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True,
                "logprobs": CANDIDATES,
            }  # fmt: skip
            async with free:
                answer = await client.post("/v1/completions", json=body, headers={"X-Precision": precision})
            if answer.is_error:
                raise ValueError(f"{url} answered {answer.status_code} at precision {precision}: {answer.text[:500]}")
            logprobs = answer.json()["choices"][0]["logprobs"]
            return Answer(precision, prompt, logprobs["tokens"], logprobs["top_logprobs"])

        return list(await asyncio.gather(*(ask(prompt, precision) for prompt in prompts for precision in precisions)))


def read(path: Path) -> list[Answer]:
    """A record from its file; ValueError if it is none."""
    try:
        return [Answer(**answer) for answer in json.loads(path.read_text(encoding="utf-8"))]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a record of this command: {error}") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 if more answers part beyond the tolerance than are allowed."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.agreement", description="Do two servers answer alike?")
    verbs = parser.add_subparsers(dest="verb", required=True)
    recording = verbs.add_parser("record", help="keep a server's greedy answers at every precision")
    recording.add_argument("url", help="the server, such as http://localhost:8000")
    recording.add_argument("--text", type=Path, required=True, help="UTF-8 text to take prompts from")
    recording.add_argument("--out", type=Path, required=True, help="JSON file to write")
    recording.add_argument("--precisions", default="2,3,4,6,8", help="comma-separated (default: %(default)s)")
    recording.add_argument("--num-prompts", type=int, default=8, help="prompts (default: %(default)s)")
    recording.add_argument("--prompt-words", type=int, default=40, help="words of each (default: %(default)s)")
    recording.add_argument("--max-tokens", type=int, default=24, help="tokens of each answer (default: %(default)s)")
    recording.add_argument("--concurrency", type=int, default=40, help="requests in flight (default: %(default)s)")
    recording.add_argument("--api-key", help="the server's key, if it has one")
    comparing = verbs.add_parser("compare", help="set two records side by side")
    comparing.add_argument("first", type=Path)
    comparing.add_argument("second", type=Path)
    comparing.add_argument(
        "--tolerance", type=float, default=0.05, help="of logprobs where answers part (default: %(default)s)"
    )
    comparing.add_argument("--allowed", type=float, default=0.0, help="share of answers beyond it (default: %(default)s)")
    given = parser.parse_args(arguments)
    try:
        if given.verb == "record":
            prompts = prompts_of(given.text.read_text(encoding="utf-8"), given.num_prompts, given.prompt_words)
            precisions = given.precisions.split(",")
            answers = asyncio.run(record(given.url, prompts, precisions, given.max_tokens, given.concurrency, given.api_key))
            given.out.write_text(json.dumps([asdict(answer) for answer in answers], indent=1) + "\n", encoding="utf-8")
            print(f"{len(answers)} answers in {given.out}")
            return 0
        first = read(given.first)
        result = compare(first, read(given.second))
    except (OSError, ValueError, httpx.HTTPError) as error:
        print(f"loadtests: {error}", file=sys.stderr)
        return 2
    print(result.text(given.tolerance))
    return int(result.beyond(given.tolerance) > given.allowed * len(first))


if __name__ == "__main__":
    sys.exit(main())
