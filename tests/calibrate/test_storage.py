from calibrate.run import run_calibration
from calibrate.storage import plane_bytes, profile_bytes, scale_bytes
from matgptq_vllm.core.checkpoint import ParentReader


def stored_bytes(reader: ParentReader, part: str) -> int:
    return sum(tensor.nbytes for name, tensor in reader.tensors() if name.endswith(f".{part}"))


def test_bytes_are_those_of_the_tensors_on_disk(tiny_options):
    reader = ParentReader(run_calibration(tiny_options()))
    assert plane_bytes(reader) == [stored_bytes(reader, f"plane{plane}") for plane in range(5)]
    assert scale_bytes(reader) == stored_bytes(reader, "scales")
    assert profile_bytes(reader, reader.profile("8")) == sum(plane_bytes(reader)) + scale_bytes(reader)


def test_a_narrow_slice_counts_the_planes_that_it_reads(tiny_options):
    nested = ParentReader(run_calibration(tiny_options()))
    assert profile_bytes(nested, nested.profile("2")) == plane_bytes(nested)[0] + scale_bytes(nested)
    rounding = ParentReader(run_calibration(tiny_options(slice_rule="round", overwrite=True)))
    assert profile_bytes(rounding, rounding.profile("2")) == sum(plane_bytes(rounding)[:2]) + scale_bytes(rounding)
