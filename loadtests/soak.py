"""Does an engine leak? ``python -m loadtests.soak PARENT --text FILE --minutes 10``.

Random traffic on an engine in this process: mixed precisions, some unknown, several samples, shared prefixes, lengths and
priorities at random, cancellations at every stage. Once per interval it notes memory; in the end it drains the engine and
checks what must then hold: every request ended, every KV block is free, nobody is remembered, and memory has stopped growing
after the first third. Options of the engine follow as ``--engine name=JSON``, such as ``--engine num_gpu_blocks_override=64``.
"""

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from loadtests.tables import aligned

PAGE = os.sysconf("SC_PAGE_SIZE")
MIB = 2**20
UNKNOWN = "5"
"""A precision that no parent has."""


@dataclass(frozen=True)
class Traffic:
    """What is asked, at random."""

    precisions: tuple[str, ...]
    words: tuple[str, ...]
    in_flight: int
    max_prompt_words: int
    max_tokens: int
    cancelled: float
    """Share of requests that are cancelled, at a random step."""

    def prompt(self, rng: random.Random) -> str:
        """Some begin as others do, so that they share blocks."""
        length = rng.randint(1, self.max_prompt_words)
        start = rng.choice((0, self.max_prompt_words, rng.randrange(len(self.words) - self.max_prompt_words)))
        return " ".join(self.words[start : start + length])

    def parameters(self, rng: random.Random) -> dict[str, Any]:
        """Arguments of vLLM's SamplingParams."""
        precision = UNKNOWN if rng.random() < 0.01 else rng.choice((*self.precisions, None))
        samples = rng.choice((1, 1, 1, 3))
        return {
            "max_tokens": rng.randint(1, self.max_tokens),
            "temperature": rng.choice((0.0, 1.0)) if samples == 1 else 1.0,
            "n": samples,
            "logprobs": rng.choice((None, None, 2)),
            "ignore_eos": True,
            "extra_args": None if precision is None else {"precision": precision},
        }


@dataclass
class Tally:
    """What happened."""

    finished: int = 0
    cancelled: int = 0
    refused: int = 0
    preemptions: int = 0
    tokens: int = 0
    seconds: list[float] = field(default_factory=list)
    host_mib: list[float] = field(default_factory=list)
    device_mib: list[float] = field(default_factory=list)
    """Memory at each of ``seconds``: resident in this process, and taken on the device."""

    def note_memory(self, seconds: float, shared_device: bool) -> None:
        """Add a line to the three lists; of a shared device, what this process's allocator has."""
        self.seconds.append(seconds)
        self.host_mib.append(int(Path("/proc/self/statm").read_text().split()[1]) * PAGE / MIB)
        self.device_mib.append(_device_mib(shared_device))


def growth(values: Sequence[float]) -> float:
    """By how much the last third lies above the middle one (medians); what the first one is still making does not count."""
    third = max(len(values) // 3, 1)
    return median(values[-third:]) - median(values[-2 * third : -third] or values[:1])


def run(
    engine: Any, sampling_params: Any, traffic: Traffic, minutes: float, seed: int, interval: float, shared_device: bool
) -> Tally:
    """Put ``traffic`` on vLLM's ``LLMEngine`` for so long, then let it drain."""
    rng, tally = random.Random(seed), Tally()
    begun = time.monotonic()
    waiting: dict[str, int] = {}  # request -> steps until it is cancelled; -1: never
    number, noted = 0, -interval
    while (passed := time.monotonic() - begun) < 60 * minutes or waiting:
        if passed < 60 * minutes:
            while len(waiting) < traffic.in_flight * rng.random():
                name = f"soak-{number}"
                number += 1
                asked = sampling_params(**traffic.parameters(rng))
                engine.add_request(name, traffic.prompt(rng), asked, priority=rng.randrange(3))
                waiting[name] = rng.randrange(traffic.max_tokens) if rng.random() < traffic.cancelled else -1
        if passed - noted >= interval:
            noted = passed
            tally.note_memory(passed, shared_device)
        due = [name for name, steps in waiting.items() if steps == 0]
        engine.abort_request(due)
        tally.cancelled += len(due)
        waiting = {name: steps - 1 for name, steps in waiting.items() if steps != 0}
        for output in engine.step():
            if output.finished and waiting.pop(output.request_id, None) is not None:
                refused = output.outputs[0].finish_reason == "error"
                tally.refused += refused
                tally.finished += not refused
                tally.tokens += sum(len(sample.token_ids) for sample in output.outputs)
    while engine.has_unfinished_requests():
        engine.step()
    tally.note_memory(time.monotonic() - begun, shared_device)
    return tally


def leaks(llm: Any, sampling_params: Any, free_before: int, tally: Tally, max_growth_mib: float) -> list[str]:
    """What an idle engine must not hold, and holds; nothing if all is well."""
    # One more step tells the runner of the requests that ended last; this one is forgotten by the step after it.
    for _ in range(2):
        llm.generate(["x"], sampling_params(max_tokens=2), use_tqdm=False)
    found = []
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    free = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    if free != free_before:
        found.append(f"{free_before - free} KV blocks are not free")
    if scheduler.requests:
        found.append(f"the scheduler remembers {len(scheduler.requests)} requests")
    for known in llm.collective_rpc(_known_requests):
        if known > 1:
            found.append(f"a worker remembers the precision of {known} requests")
    for name, values in (("host", tally.host_mib), ("device", tally.device_mib)):
        if growth(values) > max_growth_mib:
            found.append(f"{name} memory grew by {growth(values):.0f} MiB; {max_growth_mib:.0f} may be chance")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 if something leaks."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.soak", description="Does an engine leak under mixed traffic?")
    parser.add_argument("parent", help="folder of a parent")
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text to take prompts from")
    parser.add_argument("--minutes", type=float, default=10, help="(default: %(default)s)")
    parser.add_argument("--precisions", default="2,3,4,6,8", help="comma-separated (default: %(default)s)")
    parser.add_argument("--in-flight", type=int, default=64, help="at most (default: %(default)s)")
    parser.add_argument("--max-prompt-words", type=int, default=80, help="(default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=64, help="of an answer (default: %(default)s)")
    parser.add_argument("--cancelled", type=float, default=0.3, help="share of requests (default: %(default)s)")
    parser.add_argument("--interval", type=float, default=5, help="seconds between looks at memory (default: %(default)s)")
    parser.add_argument("--max-growth-mib", type=float, default=64, help="of memory (default: %(default)s)")
    parser.add_argument("--shared-device", action="store_true", help="others use the GPU too: what they take does not count")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument(
        "--engine", action="append", default=[], metavar="NAME=JSON", help="option of vllm.LLM; may be repeated"
    )
    parser.add_argument("--out", type=Path, help="JSON file to write")
    given = parser.parse_args(arguments)
    # The engine core in this process, so that its scheduler can be looked at.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import RequestOutputKind

    options = dict(option.split("=", 1) for option in given.engine)
    llm: Any = LLM(
        given.parent,
        worker_cls="matgptq_vllm.compat.worker.MatGPTQWorker",
        scheduler_cls="matgptq_vllm.compat.scheduler.MatGPTQScheduler",
        distributed_executor_backend="uni",
        disable_log_stats=False,
        **{"scheduling_policy": "priority", **{name: json.loads(value) for name, value in options.items()}},
    )
    words = tuple(given.text.read_text(encoding="utf-8").split())
    traffic = Traffic(
        tuple(given.precisions.split(",")), words, given.in_flight, given.max_prompt_words, given.max_tokens, given.cancelled
    )
    free_before = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    whole = partial(SamplingParams, output_kind=RequestOutputKind.FINAL_ONLY)
    tally = run(llm.llm_engine, whole, traffic, given.minutes, given.seed, given.interval, given.shared_device)
    tally.preemptions = sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions")
    problems = leaks(llm, SamplingParams, free_before, tally, given.max_growth_mib)
    if given.out is not None:
        given.out.write_text(json.dumps({**asdict(tally), "problems": problems}, indent=1) + "\n", encoding="utf-8")
    counts = {name: str(getattr(tally, name)) for name in ("finished", "cancelled", "refused", "preemptions", "tokens")}
    for name, values in (("host MiB", tally.host_mib), ("device MiB", tally.device_mib)):
        counts[name] = f"{values[0]:.0f} -> {values[-1]:.0f}"
    print(aligned([list(counts), list(counts.values())]))
    for problem in problems:
        print(f"loadtests: {problem}", file=sys.stderr)
    return int(bool(problems))


def _known_requests(worker: Any) -> int:
    known: int = worker.precision_state.num_requests
    return known


def _device_mib(shared: bool) -> float:
    import torch

    if not torch.cuda.is_available():
        return 0.0
    if shared:
        return torch.cuda.memory_reserved() / MIB
    free, total = torch.cuda.mem_get_info()
    return (total - free) / MIB


if __name__ == "__main__":
    sys.exit(main())
