import sys

import pytest
import torch

from matgptq_vllm.core.errors import UnsupportedError
from matgptq_vllm.kernels.bench import peers
from matgptq_vllm.kernels.bench.competitors import BF16, MARLIN, Problem
from matgptq_vllm.kernels.bench.shapes import GemmShape


@pytest.mark.parametrize("bits", [4, 8])
def test_words_hold_codes_as_vllm_packs_them(bits: int):
    from vllm.model_executor.layers.quantization.utils.quant_utils import pack_quantized_values_into_int32
    from vllm.scalar_type import scalar_types

    codes = torch.randint(1 << bits, (64, 5), dtype=torch.int32)
    weight_type = scalar_types.uint4b8 if bits == 4 else scalar_types.uint8b128
    assert weight_type.bias == 1 << (bits - 1)
    words = pack_quantized_values_into_int32(codes, weight_type, packed_dim=0)
    assert words.dtype == torch.int32
    assert torch.equal(peers.codes_of_words(words, bits), codes)


def test_cublas_is_compared_with_its_own_weights(monkeypatch):
    monkeypatch.setattr(peers, "num_copies", lambda _: 2)
    problem = Problem(GemmShape("o", 24, 32), torch.randn(5, 32).bfloat16(), 128, "curved")
    workload = peers.build(BF16, problem)
    assert (len(workload.calls), workload.bytes_read) == (2, 2 * 24 * 32)
    torch.testing.assert_close(workload.calls[0](problem.x).float(), workload.reference, atol=0.05, rtol=0.02)
    assert not torch.equal(workload.calls[1](problem.x), workload.calls[0](problem.x))


def test_without_vllm_its_kernels_are_unsupported_and_the_reason_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    problem = Problem(GemmShape("o", 128, 128), torch.randn(1, 128).bfloat16(), 128, "curved")
    with pytest.raises(UnsupportedError, match="vLLM cannot be imported"):
        peers.build(MARLIN[4], problem)


def test_a_function_is_given_only_what_it_takes():
    def function(x: int, a: int, b: int = 5) -> tuple[int, int, int]:
        return x, a, b

    assert peers._accepting(function, {"a": 1, "perm": 2})(7) == (7, 1, 5)
