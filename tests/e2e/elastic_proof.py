"""Drop planes of a running engine and read them again: python tests/e2e/elastic_proof.py PARENT [--max-width 4] [--eager]

Prints, as JSON, the used memory of the GPU (of a CPU: of this process) before, without and with the planes, and how long both
changes took; fails unless the memory of the dropped planes returns, and greedy tokens are the same before and after.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from vllm import LLM, SamplingParams

PROMPTS = ("The old man looked at the sea and", "It was a dark night, and the wind", "He")
WIDTHS = ("2", "3", "4", "6", "8")


def used_bytes() -> int:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        return total - free
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def tokens(llm: LLM, precisions: tuple[str, ...]) -> dict[str, list[list[int]]]:
    """Greedy tokens of all prompts at all precisions, in one batch."""
    asked = [(prompt, precision) for precision in precisions for prompt in PROMPTS]
    parameters = [
        SamplingParams(temperature=0, max_tokens=32, ignore_eos=True, extra_args={"precision": precision})
        for _, precision in asked
    ]
    outputs = llm.generate([prompt for prompt, _ in asked], parameters, use_tqdm=False)
    found: dict[str, list[list[int]]] = {precision: [] for precision in precisions}
    for (_, precision), output in zip(asked, outputs, strict=True):
        found[precision].append(list(output.outputs[0].token_ids))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parent")
    parser.add_argument("--max-width", type=int, default=4)
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs")
    parser.add_argument("--kv-cache-gib", type=float, default=1.0)
    options = parser.parse_args()
    llm = LLM(
        options.parent,
        worker_cls="matgptq_vllm.compat.worker.MatGPTQWorker",
        scheduler_cls="matgptq_vllm.compat.scheduler.MatGPTQScheduler",
        enforce_eager=options.eager,
        max_model_len=512,
        gpu_memory_utilization=0.1,
        kv_cache_memory_bytes=int(options.kv_cache_gib * 2**30),
    )
    narrow = tuple(width for width in WIDTHS if int(width) <= options.max_width)
    before = tokens(llm, WIDTHS)
    whole = llm.collective_rpc("matgptq_replica")
    shown = {"used_whole": used_bytes(), "code_bytes_whole": sum(report["code_bytes"] for report in whole)}
    started = time.monotonic()
    dropped = llm.collective_rpc("matgptq_shrink", args=(options.max_width,))
    shown |= {"drop_s": time.monotonic() - started, "used_narrow": used_bytes()}
    shown["code_bytes_narrow"] = sum(report["code_bytes"] for report in dropped)
    without = tokens(llm, narrow)
    started = time.monotonic()
    llm.collective_rpc("matgptq_grow", args=(8,))
    while any(report["growing"] for report in llm.collective_rpc("matgptq_replica")):
        time.sleep(0.005)
    shown |= {"reload_s": time.monotonic() - started, "used_again": used_bytes()}
    again = tokens(llm, WIDTHS)
    shown["tokens_equal"] = again == before and without == {width: before[width] for width in narrow}
    shown["freed"] = shown["used_whole"] - shown["used_narrow"]
    print("elastic:", json.dumps(shown))
    assert shown["tokens_equal"]
    dropped_bytes = shown["code_bytes_whole"] - shown["code_bytes_narrow"]
    assert dropped_bytes > 0
    assert shown["freed"] >= 0.95 * dropped_bytes


if __name__ == "__main__":
    main()
