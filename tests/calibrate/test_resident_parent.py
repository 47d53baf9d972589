import pytest
import torch

from calibrate.evaluate.resident_parent import ResidentParent
from calibrate.evaluate.sliced_model import layer_values
from calibrate.run import run_calibration
from matgptq_vllm.core import checkpoint
from matgptq_vllm.core.checkpoint import ParentReader
from matgptq_vllm.core.errors import FormatError
from matgptq_vllm.core.precision import WIDTHS
from matgptq_vllm.core.slicing import SLICE_RULES


@pytest.fixture(params=SLICE_RULES)
def parent(request, tiny_options):
    return run_calibration(tiny_options(method="rtn", slice_rule=request.param))


def test_values_are_those_of_a_plain_reader_and_every_tensor_is_hashed_once(parent, monkeypatch):
    hashed = []
    digest = checkpoint.digest
    monkeypatch.setattr(checkpoint, "digest", lambda tensor: hashed.append(tensor.shape) or digest(tensor))
    resident = ResidentParent(parent)
    values = {(name, width): layer_values(resident, name, width) for name in resident.layers for width in WIDTHS}
    assert len(hashed) == len(resident._sha256)
    reader = ParentReader(parent)
    for (name, width), value in values.items():
        assert torch.equal(value, layer_values(reader, name, width))


@pytest.mark.parametrize("max_width", [2, 4])
def test_planes_beyond_the_widest_width_are_not_needed(parent, max_width):
    resident = ResidentParent(parent, max_width)
    needed = set(resident.files(max_width))
    for file in set(resident.files()) - needed:
        (parent / file).unlink()
    for name in resident.layers:
        assert layer_values(resident, name, max_width).shape == resident.layers[name]


def test_a_damaged_tensor_is_refused_when_it_is_first_needed(parent):
    path = parent / "planes/plane0-00001-of-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    resident = ResidentParent(parent)
    with pytest.raises(FormatError, match="is not what calibration wrote"):
        layer_values(resident, next(iter(resident.layers)), 2)
