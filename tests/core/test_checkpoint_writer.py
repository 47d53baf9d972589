"""core.checkpoint_writer: a folder of a parent's name is whole, or it is not there."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from matgptq_vllm.core.checkpoint import ParentReader
from matgptq_vllm.core.checkpoint_writer import ParentWriter, write_profiles
from matgptq_vllm.core.errors import FormatError, InputError
from matgptq_vllm.core.folder_swap import partial_directory
from matgptq_vllm.core.manifest import CONFIG_FILE, INDEX_FILE, MANIFEST_FILE
from matgptq_vllm.core.parent import ParentSpec
from matgptq_vllm.core.profile import PROFILES_FILE, Profile

from .conftest import ParentContent


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@contextmanager
def full_disk() -> Iterator[None]:
    """No file may grow beyond 4 KiB: what a full disk looks like to a writer."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_a_parent_has_the_documented_files_and_nothing_else(content: ParentContent, tmp_path: Path) -> None:
    content.write(tmp_path / "p", shard_bytes=150)
    tables = {CONFIG_FILE, INDEX_FILE, MANIFEST_FILE, PROFILES_FILE}
    index = json.loads((tmp_path / "p" / INDEX_FILE).read_text())
    assert contents(tmp_path / "p").keys() == tables | set(index["weight_map"].values())
    assert os.listdir(tmp_path) == ["p"]


def test_shards_are_numbered_and_none_is_larger_than_asked_unless_one_tensor_is(content: ParentContent, tmp_path: Path) -> None:
    content.write(tmp_path / "p", shard_bytes=150)
    weight_map = json.loads((tmp_path / "p" / INDEX_FILE).read_text())["weight_map"]
    sizes = {name: tensor.nbytes for name, tensor in ParentReader(tmp_path / "p").tensors()}
    for file_set in {file.split("-")[0] for file in weight_map.values()}:
        files = sorted({file for file in weight_map.values() if file.startswith(f"{file_set}-")})
        assert files == [f"{file_set}-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
        for file in files:
            held = [sizes[name] for name, where in weight_map.items() if where == file]
            assert sum(held) <= 150 or len(held) == 1


def test_the_index_states_the_size_of_all_tensors(content: ParentContent, tmp_path: Path) -> None:
    content.write(tmp_path / "p")
    sizes = [tensor.nbytes for _, tensor in ParentReader(tmp_path / "p").tensors()]
    assert json.loads((tmp_path / "p" / INDEX_FILE).read_text())["metadata"] == {"total_size": sum(sizes)}


def test_writing_the_same_parent_twice_gives_the_same_bytes(content: ParentContent, tmp_path: Path) -> None:
    assert contents(content.write(tmp_path / "a")) == contents(content.write(tmp_path / "b"))


@pytest.mark.parametrize("moment", ["at once", "after some layers", "before the end"])
@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_nothing_behind(
    content: ParentContent, tmp_path: Path, moment: str, kind: type[BaseException]
) -> None:
    def write() -> None:
        with ParentWriter(tmp_path / "p", content.spec, shard_bytes=100) as writer:
            if moment == "after some layers":
                writer.add_layer("h.0.o_proj", *content.layers["h.0.o_proj"])
            elif moment == "before the end":
                content.fill(writer)
            raise kind

    with pytest.raises(kind):
        write()
    assert os.listdir(tmp_path) == []


def test_leaving_without_finish_leaves_nothing_behind(content: ParentContent, tmp_path: Path) -> None:
    with ParentWriter(tmp_path / "p", content.spec) as writer:
        content.fill(writer)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("shard_bytes", [1 << 10, 1 << 20])
def test_a_full_disk_is_an_os_error_and_leaves_the_old_parent(
    new_content: Callable[..., ParentContent], tmp_path: Path, shard_bytes: int
) -> None:
    old = contents(new_content(1).write(tmp_path / "p"))
    spec = ParentSpec()

    def write() -> None:
        with full_disk(), ParentWriter(tmp_path / "p", spec, overwrite=True, shard_bytes=shard_bytes) as writer:
            writer.add_tensor("small", torch.zeros(8))
            writer.add_tensor("big", torch.zeros(4096))
            writer.finish()

    with pytest.raises(OSError, match=r"model-0000\d\.pending: cannot be written"):
        write()
    assert os.listdir(tmp_path) == ["p"]
    assert contents(tmp_path / "p") == old


def test_an_existing_target_is_refused_and_kept(new_content: Callable[..., ParentContent], tmp_path: Path) -> None:
    old = contents(new_content(1).write(tmp_path / "p"))
    with pytest.raises(InputError, match=r"p exists; .*--overwrite"):
        new_content(2).write(tmp_path / "p")
    assert contents(tmp_path / "p") == old
    assert os.listdir(tmp_path) == ["p"]


def test_overwrite_keeps_the_old_parent_until_the_new_one_is_whole(
    new_content: Callable[..., ParentContent], tmp_path: Path
) -> None:
    old, new = new_content(1), new_content(2)
    before = contents(old.write(tmp_path / "p"))
    with ParentWriter(tmp_path / "p", new.spec, overwrite=True, shard_bytes=100) as writer:
        new.fill(writer)
        assert contents(tmp_path / "p") == before
        writer.finish(new.profiles)
    assert os.listdir(tmp_path) == ["p"]
    codes, _ = ParentReader(tmp_path / "p").layer("h.0.o_proj")
    assert torch.equal(codes, new.layers["h.0.o_proj"][0])


def test_a_failed_overwrite_keeps_the_old_parent(new_content: Callable[..., ParentContent], tmp_path: Path) -> None:
    before = contents(new_content(1).write(tmp_path / "p"))
    new = new_content(2)

    def write() -> None:
        with ParentWriter(tmp_path / "p", new.spec, overwrite=True, shard_bytes=100) as writer:
            new.fill(writer)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write()
    assert contents(tmp_path / "p") == before
    assert os.listdir(tmp_path) == ["p"]


def test_an_old_parent_comes_back_if_the_new_one_cannot_take_its_name(
    new_content: Callable[..., ParentContent], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(new_content(1).write(tmp_path / "p"))
    rename = Path.rename

    def fail_for_the_new_parent(self: Path, target: Path) -> Path:
        if self == partial_directory(tmp_path / "p"):
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_for_the_new_parent)
    with pytest.raises(OSError, match="no"):
        new_content(2).write(tmp_path / "p", overwrite=True)
    assert contents(tmp_path / "p") == before
    assert os.listdir(tmp_path) == ["p"]


def test_a_run_killed_between_the_renames_loses_no_parent(new_content: Callable[..., ParentContent], tmp_path: Path) -> None:
    old = contents(new_content(1).write(tmp_path / "p"))
    (tmp_path / "p").rename(tmp_path / ".p.replaced")
    with pytest.raises(InputError, match="p exists"):
        ParentWriter(tmp_path / "p", ParentSpec())
    assert contents(tmp_path / "p") == old
    assert os.listdir(tmp_path) == ["p"]


KILLED_RUN = """
import sys, time, torch
from pathlib import Path
from matgptq_vllm.core.checkpoint_writer import ParentWriter
from matgptq_vllm.core.parent import ParentSpec
with ParentWriter(sys.argv[1], ParentSpec(group_size=32), overwrite=True, shard_bytes=10) as writer:
    writer.add_tensor("a", torch.zeros(64))
    writer.add_layer("b", torch.zeros((4, 32), dtype=torch.uint8), torch.ones(4, 1))
    writer.add_tensor("c", torch.zeros(64))
    Path(sys.argv[1] + ".ready").touch()
    time.sleep(60)
"""


@pytest.mark.parametrize("old", [False, True])
def test_what_a_killed_run_leaves_is_never_read_and_the_next_run_removes_it(
    new_content: Callable[..., ParentContent], tmp_path: Path, old: bool
) -> None:
    target, ready = tmp_path / "p", tmp_path / "p.ready"
    before = contents(new_content(1).write(target)) if old else {}
    run = subprocess.Popen([sys.executable, "-c", KILLED_RUN, str(target)])
    deadline = time.monotonic() + 60
    while not ready.exists() and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    ready.unlink()

    left = partial_directory(target)
    assert any(left.glob("*.pending"))
    assert not list(left.rglob("*.safetensors"))
    with pytest.raises(FormatError, match=MANIFEST_FILE):
        ParentReader(left)
    assert target.exists() == old
    if old:
        assert contents(target) == before

    new = new_content(2)
    new.write(target, overwrite=old)
    assert os.listdir(tmp_path) == ["p"]
    assert torch.equal(ParentReader(target).layer("h.0.q_proj")[0], new.layers["h.0.q_proj"][0])


def test_a_folder_without_its_manifest_is_refused_at_every_step_of_finish(
    content: ParentContent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever file the run dies on, nothing that can be read lies under the target's name."""
    seen = []

    def observe(self: Path, *args: object, **kwargs: object) -> object:
        if self.parent == partial_directory(tmp_path / "p") and "w" in str(args):
            seen.append(self.name)
            with pytest.raises(FormatError):
                ParentReader(self.parent)
            assert not (tmp_path / "p").exists()
        return path_open(self, *args, **kwargs)  # type: ignore[arg-type]

    path_open = Path.open
    monkeypatch.setattr(Path, "open", observe)
    content.write(tmp_path / "p")
    assert [name for name in seen if name != CONFIG_FILE] == [INDEX_FILE, PROFILES_FILE, MANIFEST_FILE]
    ParentReader(tmp_path / "p")


def test_tied_and_reused_buffers_are_stored_as_they_were_when_added(tmp_path: Path, content: ParentContent) -> None:
    buffer = torch.ones(4, 6)
    with ParentWriter(tmp_path / "p", content.spec) as writer:
        content.fill(writer)
        writer.add_tensor("tied.a", buffer)
        writer.add_tensor("tied.b", buffer)
        writer.add_tensor("turned", buffer.t()[1:])
        buffer.zero_()
        writer.finish()
    read = dict(ParentReader(tmp_path / "p").unquantized())
    for name, shape in (("tied.a", (4, 6)), ("tied.b", (4, 6)), ("turned", (5, 4))):
        assert torch.equal(read[name], torch.ones(shape))


def test_a_name_that_was_already_added_is_refused(content: ParentContent, tmp_path: Path) -> None:
    with ParentWriter(tmp_path / "p", content.spec, shard_bytes=10) as writer:
        content.fill(writer)
        with pytest.raises(ValueError, match=r"'norm\.weight' was already added"):
            writer.add_tensor("norm.weight", torch.zeros(6))
        with pytest.raises(ValueError, match=r"'h\.0\.o_proj\.scales' was already added"):
            writer.add_layer("h.0.o_proj", *content.layers["h.0.o_proj"])


@pytest.mark.parametrize(
    ("codes", "scales"),
    [
        (torch.zeros((4, 33), dtype=torch.uint8), torch.ones(4, 1)),
        (torch.zeros((4, 33), dtype=torch.uint8), torch.ones(2, 4)),
        (torch.zeros((4, 33), dtype=torch.uint8), torch.ones(4)),
        (torch.zeros((4, 33), dtype=torch.int32), torch.ones(4, 2)),
        (torch.zeros((4, 33)), torch.ones(4, 2)),
    ],
)
def test_codes_and_scales_that_do_not_fit_are_refused(tmp_path: Path, codes: torch.Tensor, scales: torch.Tensor) -> None:
    with (
        ParentWriter(tmp_path / "p", ParentSpec(group_size=32)) as writer,
        pytest.raises(ValueError, match=r"layer: .* need scales \[4, 2\]"),
    ):
        writer.add_layer("layer", codes, scales)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_scales_are_stored_in_the_type_of_the_spec(tmp_path: Path, dtype: str) -> None:
    spec = ParentSpec(group_size=-1, scale_dtype=dtype)
    with ParentWriter(tmp_path / "p", spec) as writer:
        (writer.directory / CONFIG_FILE).write_text(json.dumps({"quantization_config": spec.to_dict()}))
        writer.add_layer("a", torch.zeros((2, 8), dtype=torch.uint8), torch.tensor([[0.5], [3.0]], dtype=torch.float64))
        writer.finish()
    scales = ParentReader(tmp_path / "p").layer("a")[1]
    assert scales.dtype == getattr(torch, dtype)
    assert scales.tolist() == [[0.5], [3.0]]


def test_the_profile_table_is_replaced_in_one_step(
    parent: Path, content: ParentContent, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = contents(parent)
    old = others.pop(PROFILES_FILE)
    new = Profile("other", dict(content.profiles[0].widths))
    replace = Path.replace

    def observe(self: Path, target: Path) -> Path:
        # Until the one step, the old table is whole; the new one is already whole beside it.
        assert (parent / PROFILES_FILE).read_bytes() == old
        assert b"other" in self.read_bytes()
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", observe)
    write_profiles(parent, [new])
    assert ParentReader(parent).stored_profiles() == [new]
    after = contents(parent)
    assert after.pop(PROFILES_FILE) != old
    assert after == others


def test_a_profile_table_that_cannot_be_written_leaves_the_old_one(parent: Path, content: ParentContent) -> None:
    before = contents(parent)
    with pytest.raises(InputError, match="twice"):
        write_profiles(parent, content.profiles * 2)
    assert contents(parent) == before


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_files_have_the_permissions_that_the_process_gives(
    content: ParentContent, tmp_path: Path, umask: int, mode: int
) -> None:
    old = os.umask(umask)
    try:
        content.write(tmp_path / "p")
    finally:
        os.umask(old)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "p").rglob("*") if path.is_file()} == {mode}
