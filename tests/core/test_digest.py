"""core.digest: what a digest covers."""

import hashlib

import torch

from matgptq_vllm.core.digest import digest

TENSORS = [
    torch.arange(10, dtype=torch.uint8).view(5, 2),
    torch.arange(10, dtype=torch.uint8).view(2, 5),
    torch.arange(10, dtype=torch.uint8),
    torch.arange(10, dtype=torch.int8),
    torch.zeros(2, dtype=torch.float16),
    torch.zeros(2, dtype=torch.bfloat16),
    torch.zeros(1),
    torch.tensor(0.0),
    torch.zeros(0),
    torch.zeros((0, 3)),
    torch.tensor([True, False]),
]


def test_a_digest_is_that_of_the_documented_text_and_bytes() -> None:
    assert digest(TENSORS[0]) == hashlib.sha256(b"uint8[5, 2]\n" + bytes(range(10))).hexdigest()
    one = torch.tensor(1.0, dtype=torch.bfloat16)
    assert digest(one) == hashlib.sha256(b"bfloat16[]\n\x80\x3f").hexdigest()


def test_type_shape_and_every_byte_matter() -> None:
    assert len({digest(tensor) for tensor in TENSORS}) == len(TENSORS)
    base = torch.zeros(5, 2, dtype=torch.uint8)
    changed = {digest(base)}
    for position in range(10):
        copy = base.clone()
        copy.view(-1)[position] = 1
        changed.add(digest(copy))
    assert len(changed) == 11


def test_how_a_tensor_lies_in_memory_does_not_matter() -> None:
    whole = torch.arange(60, dtype=torch.float32).view(6, 10)
    for view in (whole.t(), whole[::2], whole[:, 3:7], whole[1:2].expand(4, 10)):
        assert digest(view) == digest(view.clone(memory_format=torch.contiguous_format))
