"""kernels.ops: the operator as torch and torch.compile see it, and who computes."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from matgptq_vllm.core.planes import PlaneLayout
from matgptq_vllm.core.slicing import dequantize
from matgptq_vllm.kernels import dispatch, ops
from matgptq_vllm.kernels.resident import to_resident

LAYOUT = PlaneLayout()
N, K, GROUP = 12, 64, 32
PROFILE_WIDTHS = torch.tensor([3, 8, 2], dtype=torch.int32)
MAX_TOKENS = 7


@pytest.fixture(autouse=True)
def _registered() -> None:
    ops.register_ops()
    ops.register_ops()


@pytest.fixture
def codes() -> torch.Tensor:
    return torch.randint(0, 256, (N, K), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def scales() -> torch.Tensor:
    return torch.rand(N, K // GROUP, generator=torch.Generator().manual_seed(1)).bfloat16() * 0.02


def expected(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, widths: list[int]) -> torch.Tensor:
    weights = [dequantize(codes, scales, width, "nested", GROUP, torch.float64) for width in widths]
    return torch.stack([weight @ row.double() for weight, row in zip(weights, x, strict=True)])


def arguments(x: torch.Tensor, planes: list[torch.Tensor], scales: torch.Tensor, token_profiles: torch.Tensor) -> tuple:
    """The operator's, less the bias."""
    return (
        x, planes, scales, N, token_profiles, PROFILE_WIDTHS, torch.arange(MAX_TOKENS, dtype=torch.int32),
        torch.tensor([MAX_TOKENS, 0, 0], dtype=torch.int32), PROFILE_WIDTHS.clone(), torch.zeros(0, dtype=torch.int32),
        [2, 3, 8], list(LAYOUT.plane_widths), GROUP, "nested",
    )  # fmt: skip


def call(x: torch.Tensor, planes: list[torch.Tensor], scales: torch.Tensor, token_profiles: torch.Tensor, bias=None):
    return torch.ops.matgptq.sliced_linear(*arguments(x, planes, scales, token_profiles), bias)


def test_widths_are_looked_up_by_profile_index_and_the_bias_is_added(codes, scales) -> None:
    x, bias = torch.randn(5, K), torch.randn(N)
    # The buffer is longer than the step: what lies beyond its rows must not matter.
    token_profiles = torch.tensor([0, 2, 1, 1, 0, 2, 2], dtype=torch.int32)
    wanted = expected(x, codes, scales, [3, 2, 8, 8, 3])
    y = call(x, LAYOUT.split(codes), scales, token_profiles)
    torch.testing.assert_close(y.double(), wanted, rtol=1e-4, atol=1e-4)
    y = call(x, LAYOUT.split(codes), scales, token_profiles, bias)
    torch.testing.assert_close(y.double(), wanted + bias, rtol=1e-4, atol=1e-4)


def test_a_graph_of_one_profile_launches_the_kernels_of_its_width(codes, scales, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(dispatch, "sliced_linear", lambda x, *given: seen.append(given[9]) or x.new_zeros(x.shape[0], N))
    resident = to_resident(LAYOUT.split(codes), scales, LAYOUT, K, GROUP)
    profiles = torch.zeros(MAX_TOKENS, dtype=torch.int32)
    given = arguments(torch.zeros(3, K).bfloat16(), resident.planes, resident.scales, profiles)
    for profile in (-1, 1, 2):
        torch.ops.matgptq.sliced_linear(*given, None, torch.tensor([profile], dtype=torch.int32))
    assert seen == [[2, 3, 8], [8], [2]]


def test_a_compiled_graph_follows_the_buffer(codes, scales) -> None:
    x = torch.randn(2, K)
    token_profiles = torch.zeros(MAX_TOKENS, dtype=torch.int32)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for profiles, widths in (([0, 2], [3, 2]), ([1, 1], [8, 8]), ([2, 0], [2, 3])):
        token_profiles[:2] = torch.tensor(profiles)
        y = compiled(x, LAYOUT.split(codes), scales, token_profiles)
        torch.testing.assert_close(y.double(), expected(x, codes, scales, widths), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", [None, torch.ones(N)], ids=["plain", "bias"])
def test_the_operator_passes_torchs_own_checks(codes, scales, bias) -> None:
    given = arguments(torch.randn(3, K), LAYOUT.split(codes), scales, torch.zeros(MAX_TOKENS, dtype=torch.int32))
    torch.library.opcheck(torch.ops.matgptq.sliced_linear.default, (*given, bias))
    assert not torch.ops.matgptq.sliced_linear.default._schema.is_mutable


def test_the_shape_is_known_without_computing_in_either_layout(codes, scales) -> None:
    resident = to_resident(LAYOUT.split(codes), scales, LAYOUT, K, GROUP)
    for planes, held_scales in ((LAYOUT.split(codes), scales), (resident.planes, resident.scales)):
        given = arguments(torch.randn(5, K).half(), planes, held_scales, torch.zeros(MAX_TOKENS, dtype=torch.int32))
        on_meta = [_to_meta(argument) for argument in given]
        y = torch.ops.matgptq.sliced_linear(*on_meta)
        assert (y.shape, y.dtype, y.device.type) == ((5, N), torch.float16, "meta")


def _to_meta(argument):
    if isinstance(argument, list) and isinstance(argument[0], torch.Tensor):
        return [tensor.to("meta") for tensor in argument]
    return argument.to("meta") if isinstance(argument, torch.Tensor) else argument


@pytest.mark.parametrize(
    ("device", "capturing", "host_decides"), [("cpu", None, True), ("cuda", False, True), ("cuda", True, False)]
)
def test_the_kernel_layout_is_for_the_kernels_and_a_captured_graph_for_any_rows(
    codes, scales, monkeypatch, device, capturing, host_decides
) -> None:
    given: list = []
    monkeypatch.setattr(dispatch, "sliced_linear", lambda *arguments: given.extend(arguments))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    resident = to_resident(LAYOUT.split(codes), scales, LAYOUT, K, GROUP)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(5, K, device=device)
    ops.sliced_linear(*arguments(x, resident.planes, resident.scales, torch.zeros(MAX_TOKENS, dtype=torch.int32)))
    assert given[:3] == [x, resident.planes, resident.scales]
    assert given[-1] is host_decides


def test_more_rows_than_have_a_profile_are_refused(codes, scales) -> None:
    with pytest.raises(ValueError, match="8 rows, but profiles are known for 7"):
        call(torch.randn(8, K), LAYOUT.split(codes), scales, torch.zeros(MAX_TOKENS, dtype=torch.int32))
