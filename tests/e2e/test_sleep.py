"""Weights that are discarded and read again, and vLLM's sleep mode, which does it on a GPU: the answers stay what they were."""

from pathlib import Path

import pytest
import torch

from .test_features import COMMON, WIDTHS
from .test_llm_api import answer_of, run_engine

pytestmark = pytest.mark.engine

RELOADED = """
llm = engine(sys.argv[1], max_model_len=256, kv_cache_dtype=sys.argv[2], **PRECISION)
some = prompts(10, 20)
found = {"first": mixed_and_single(llm, some)}

def discard(model):
    for parameter in model.parameters():
        parameter.data.zero_()

def asked():
    return tokens(llm.generate(some, [params(WIDTHS[i % 5]) for i in range(10)], use_tqdm=False))

llm.collective_rpc(lambda worker: discard(worker.model_runner.get_model()))
llm.reset_prefix_cache()
found["discarded"] = asked()
llm.collective_rpc("reload_weights")
llm.reset_prefix_cache()
found["reloaded"] = asked()
try:
    llm.collective_rpc("reload_weights", kwargs={"weights_path": "/elsewhere"})
except Exception as error:
    found["elsewhere"] = str(error)
llm.sleep(level=1)
llm.wake_up()
found["woken"] = asked()
print(json.dumps(found))
"""

ASLEEP = """
level = int(sys.argv[2])
llm = engine(sys.argv[1], max_model_len=256, enable_sleep_mode=True, dtype="bfloat16", enforce_eager=False, **PRECISION)
some = prompts(10, 20)

def asked():
    return tokens(llm.generate(some, [params(WIDTHS[i % 5]) for i in range(10)], use_tqdm=False))

def taken():
    import torch
    free, total = torch.cuda.mem_get_info()
    return total - free

before, awake = asked(), taken()
llm.sleep(level=level)
asleep = taken()
if level == 2:
    llm.wake_up(tags=["weights"])
    llm.collective_rpc("reload_weights")
    llm.wake_up(tags=["kv_cache"])
else:
    llm.wake_up()
print(json.dumps({"before": before, "after": asked(), "awake": awake, "asleep": asleep}))
"""


@pytest.fixture(scope="module", params=["v1", "v2"])
def found(request: pytest.FixtureRequest, profiled_parent: Path, wide_vectors: bool) -> dict:
    kv_cache_dtype = "fp8" if wide_vectors else "auto"
    return answer_of(run_engine(COMMON + RELOADED, profiled_parent, request.param, kv_cache_dtype))


def test_keys_and_values_of_eight_bits(found: dict, wide_vectors: bool) -> None:
    if not wide_vectors:
        pytest.skip("vLLM has FP8 keys and values on GPUs and on CPUs with AVX-512")
    assert len(found["first"]["mixed"]) == 10
    assert found["first"]["mixed"] == found["first"]["single"]


def test_weights_that_were_discarded_are_read_again(found: dict) -> None:
    assert found["discarded"] != found["first"]["mixed"]
    assert found["reloaded"] == found["woken"] == found["first"]["mixed"]


def test_a_running_replica_takes_no_other_parents_weights(found: dict) -> None:
    assert "a running replica keeps its parent" in found["elsewhere"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="vLLM sleeps on a GPU only; on a CPU it ignores the request")
@pytest.mark.parametrize("runner", ["v1", "v2"])
@pytest.mark.parametrize("level", ["1", "2"])
def test_an_engine_that_slept_answers_as_before(profiled_parent: Path, level: str, runner: str) -> None:
    answers = answer_of(run_engine(COMMON + ASLEEP, profiled_parent, runner, level))
    assert answers["after"] == answers["before"]
    assert len(answers["before"]) == 2 * len(WIDTHS)
    # The cache of keys and values, at least.
    assert answers["awake"] - answers["asleep"] >= 1 << 28
