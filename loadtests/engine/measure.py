"""Measure one engine, in a process of its own: ``python -m loadtests.engine.measure PLAN.json RESULT.json``.

Times are differences of two runs that differ in length alone, so that neither prefill, nor the steps in which requests
arrive, nor the last steps are in a decode step's time.
"""

import json
import random
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, ClassVar, TextIO

from loadtests.engine import kernel_times
from loadtests.engine.variants import OURS_COMMON, PEERS, precisions
from matgptq_vllm.core.precision import XARGS_KEY, uniform_width
from matgptq_vllm.core.replica import ReplicaOptions


@dataclass(frozen=True)
class Plan:
    """What to measure of one engine."""

    variant: str
    folder: str
    batches: tuple[int, ...]
    widths: tuple[str, ...]
    """Names of ``variants.precisions``, ours only."""
    tokens: int
    """Generated tokens of each request that are timed."""
    prompt_len: int
    prefill_len: int
    prefill_prompts: int
    alone: tuple[int, ...]
    """Tokens of prompts that are computed one at a time, nothing else running."""
    max_model_len: int
    repeats: int
    eager: bool
    vocabulary: int
    kv_cache_gib: float | None
    """Memory of the KV cache; None: what vLLM finds free, which works for one engine at a time only."""
    profile: bool = False
    """Whether to see also what a decode step's time on the device goes to."""

    WARM_TOKENS: ClassVar[int] = 32
    """Tokens of the shorter run: enough that all requests of the largest batch have arrived before it ends."""

    @classmethod
    def read(cls, path: Path) -> "Plan":
        """The plan in a JSON file."""
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in document.items()}
        return cls(**fields)


SHARE_OF_ONE = 0.1
"""Of the GPU's memory, that must be free for an engine to start beside others; how much it takes, other options say."""

Generate = Callable[[int, int, int], float]
"""(requests, prompt tokens, generated tokens) -> seconds."""


def decode_ms(generate: Generate, plan: Plan, batch: int) -> float:
    """Milliseconds of a decode step of ``batch`` requests."""
    times = []
    for _ in range(plan.repeats):
        short = generate(batch, plan.prompt_len, plan.WARM_TOKENS)
        times.append(generate(batch, plan.prompt_len, plan.WARM_TOKENS + plan.tokens) - short)
    return 1e3 * median(times) / plan.tokens


def alone_ms(generate: Generate, plan: Plan, tokens: int) -> float:
    """Milliseconds until the first token of a prompt that has the engine for itself: the host's work is not hidden then."""
    generate(1, tokens, 1)
    return 1e3 * median(generate(1, tokens, 1) for _ in range(2 * plan.repeats + 1))


def prefill_tokens_per_s(generate: Generate, plan: Plan) -> float:
    """Prompt tokens per second when many long prompts wait."""
    few = max(1, plan.prefill_prompts // 4)
    times = []
    for _ in range(plan.repeats):
        short = generate(few, plan.prefill_len, 1)
        times.append(generate(plan.prefill_prompts, plan.prefill_len, 1) - short)
    return (plan.prefill_prompts - few) * plan.prefill_len / median(times)


def measure(plan: Plan, wait: Callable[[], None]) -> dict[str, Any]:
    """Start the engine of a plan and measure it; RuntimeError if it computes with other kernels than planned, or nonsense.

    Args:
        wait: called when the engine has started; returns when its turn has come.
    """
    import torch
    import vllm
    from vllm import LLM, SamplingParams

    started = time.perf_counter()
    engine: Any = LLM(**engine_options(plan))
    held = engine.collective_rpc("fill_integer_weights")[0]
    result: dict[str, Any] = {
        "plan": asdict(plan), "start_s": time.perf_counter() - started, "vllm": vllm.__version__, "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU", **held, "rows": [],
    }  # fmt: skip
    expected = PEERS[plan.variant].kernel if plan.variant in PEERS else None
    if expected is not None and held["kernels"] != [expected]:
        raise RuntimeError(f"{plan.variant} must run {expected}, vLLM chose {held['kernels']}")

    wait()
    chance = random.Random(0)

    def run(count: int, prompt_len: int, tokens: int, names: list[str] | None, logprobs: int | None = None) -> Any:
        # Prompts never repeat, so that none is found in the prefix cache.
        prompts = [{"prompt_token_ids": chance.choices(range(plan.vocabulary), k=prompt_len)} for _ in range(count)]
        params = [
            SamplingParams(
                temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False, logprobs=logprobs,
                extra_args=None if names is None else {XARGS_KEY: names[index % len(names)]},
            )
            for index in range(count)
        ]  # fmt: skip
        begin = time.perf_counter()
        outputs = engine.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - begin, outputs

    for name in ("",) if plan.variant in PEERS else plan.widths:
        names = precisions(name) if name else None

        def generate(count: int, prompt_len: int, tokens: int, names: list[str] | None = names) -> float:
            seconds: float = run(count, prompt_len, tokens, names)[0]
            return seconds

        _, outputs = run(2, plan.prompt_len, 4, names, logprobs=1)
        found = [token.logprob for output in outputs for step in output.outputs[0].logprobs for token in step.values()]
        if not all(-1e4 < logprob <= 0 for logprob in found):
            raise RuntimeError(f"{plan.variant} {name}: logprobs {found[:8]} are not those of probabilities")
        # The first call of a kind compiles kernels, outside of CUDA graphs.
        generate(max(plan.batches), plan.prompt_len, 2)
        generate(2, plan.prefill_len, 1)
        batches = [batch for batch in plan.batches if batch >= len(names or [""])]
        row = {
            "name": f"{plan.variant} {name}" if name else plan.variant,
            "decode_ms": {str(batch): decode_ms(generate, plan, batch) for batch in batches},
            "prefill_tokens_per_s": prefill_tokens_per_s(generate, plan),
            "alone_ms": {str(tokens): alone_ms(generate, plan, tokens) for tokens in plan.alone},
        }
        if plan.profile:
            row["kernels"] = {str(batch): _kernels_per_step(engine, generate, plan, batch) for batch in batches}
        result["rows"].append(row)
        print(f"measured: {json.dumps(row)}", flush=True)
    return result


def _kernels_per_step(engine: Any, generate: Generate, plan: Plan, batch: int) -> kernel_times.Times:
    """What a decode step of ``batch`` requests runs on the device."""
    runs = []
    for tokens in (plan.WARM_TOKENS, plan.WARM_TOKENS + plan.tokens):
        engine.collective_rpc("begin_profile")
        generate(batch, plan.prompt_len, tokens)
        runs.append(engine.collective_rpc("end_profile")[0])
    return kernel_times.per_step(runs[0], runs[1], plan.tokens)


def engine_options(plan: Plan) -> dict[str, Any]:
    """Arguments of ``vllm.LLM``: vLLM's defaults, the same for all, except what makes the engine ours."""
    options: dict[str, Any] = {
        "model": plan.folder, "load_format": "dummy", "skip_tokenizer_init": True, "dtype": "bfloat16",
        "max_model_len": plan.max_model_len, "max_num_seqs": max(plan.batches), "enforce_eager": plan.eager,
        "worker_extension_cls": "loadtests.engine.worker.MeasuredWorker",
    }  # fmt: skip
    if plan.kv_cache_gib is not None:
        options |= {"kv_cache_memory_bytes": int(plan.kv_cache_gib * 2**30), "gpu_memory_utilization": SHARE_OF_ONE}
    if not plan.eager:
        # Graphs of the batches that are measured: capturing all sizes that vLLM would takes a good part of the start-up.
        options["compilation_config"] = {"cudagraph_capture_sizes": sorted(plan.batches)}
    if plan.variant not in PEERS:
        named = [uniform_width(name) for mixed in plan.widths for name in precisions(mixed)]
        widths = sorted({width for width in named if width is not None})
        replica = ReplicaOptions(max_width=widths[-1], graph_widths=() if plan.variant == OURS_COMMON else None)
        options |= {
            "worker_cls": "matgptq_vllm.compat.worker.MatGPTQWorker",
            "scheduler_cls": "matgptq_vllm.compat.scheduler.MatGPTQScheduler",
            "additional_config": replica.to_additional_config(),
        }
    return options


def ready_file(target: Path) -> Path:
    """Says that the engine that will write ``target`` has started."""
    return target.with_suffix(".ready")


def wait_for_turn(lines: TextIO) -> None:
    """Wait for a line; SystemExit if none can come any more: who started this engine is gone, and others may run meanwhile."""
    if not lines.readline():
        raise SystemExit("the process that started this engine has ended; nothing is measured")


def main() -> int:
    """Measure by the plan and write the result. With ``--wait``, a line on standard input says when to begin."""
    source, target = map(Path, sys.argv[1:3])

    def wait() -> None:
        if "--wait" in sys.argv[3:]:
            ready_file(target).touch()
            wait_for_turn(sys.stdin)

    result = measure(Plan.read(source), wait)
    target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
