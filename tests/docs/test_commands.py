"""Every command of the documentation is run, or checked against the program that it calls."""

import contextlib
import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from .pages import MODES, PAGES, ROOT, SHELL, Block, all_blocks, inline_commands, shell_lines, simple_commands

BLOCKS = all_blocks()
RUN = [block for block in BLOCKS if block.mode == "run"]
CHECKED = [block for block in BLOCKS if block.mode != "run" and shell_lines(block)]
NEEDS = {"promtool": "prometheus"}
"""Programs of `run` blocks that are not the project's, with Debian's package of each."""


def test_every_block_says_how_it_is_tested() -> None:
    assert len(RUN) >= 7
    assert len(BLOCKS) > 40
    for block in BLOCKS:
        assert block.mode in MODES, block.id
        assert (block.mode == "outside") == bool(block.reason), block.id
        if block.mode == "run":
            assert block.language in SHELL, block.id
        if block.mode == "client":
            assert block.language in (*SHELL, "python"), block.id


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_text: Path, tiny_parent: Path) -> Path:
    """A folder with what the pages call MODEL, PARENT, calibration.txt and evaluation.txt, and the command matgptq."""
    folder = tmp_path_factory.mktemp("place")
    shutil.copytree(tiny_model, folder / "MODEL")
    shutil.copytree(tiny_parent, folder / "PARENT")
    for name in ("calibration.txt", "evaluation.txt"):
        shutil.copy(tiny_text, folder / name)
    return folder


def environment(place: Path) -> dict[str, str]:
    programs = place / "bin"
    programs.mkdir(exist_ok=True)
    command = programs / "matgptq"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m matgptq_vllm.cli "$@"\n')
    command.chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "REPOSITORY": str(ROOT),
        "HF_HUB_OFFLINE": "1",
    }


@pytest.mark.parametrize("block", RUN, ids=lambda block: block.id)
def test_a_block_runs_as_it_stands(block: Block, place: Path) -> None:
    for program, package in NEEDS.items():
        if program in block.text and shutil.which(program) is None:
            pytest.skip(f"Debian's package {package} is not installed")
    text = block.text
    if "calibrate" in text:
        shutil.rmtree(place / "PARENT")
    for command in ("calibrate", "search", "evaluate"):
        text = re.sub(rf"^matgptq {command}\b", f"matgptq {command} {SMALLER[command]}", text, flags=re.MULTILINE)
    run = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text], cwd=place, env=environment(place), capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stdout + run.stderr


SMALLER = {
    "calibrate": "--num-samples 8 --seq-len 32 --group-size 32 --sweeps 0",
    "search": "--num-samples 4 --seq-len 32 --held-out-samples 4 --held-out-seq-len 32 --generations 1 --offspring 2 "
    "--sensitivity-samples 1",
    "evaluate": "--seq-len 32 --limit-windows 16",
}
"""Options for a model of a few thousand weights; they come before those of the page, which decide."""


@cache
def help_of(*command: str) -> str:
    """What `python -m COMMAND` prints, in this process: importing torch for each of them again would take minutes."""
    printed = io.StringIO()
    before = sys.argv
    sys.argv = [*command]
    try:
        with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as ended:
            runpy.run_module(command[0], run_name="__main__", alter_sys=True)
    finally:
        sys.argv = before
    assert ended.value.code == 0, command
    return printed.getvalue()


@cache
def options_of_vllm_serve() -> set[str]:
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    verb = ServeSubcommand().subparser_init(FlexibleArgumentParser().add_subparsers())
    return set(verb._option_string_actions)


def options(words: list[str]) -> set[str]:
    return {word.partition("=")[0].rstrip(",;.") for word in words if re.match(r"--[a-z]", word)}


def known(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", text))


def check_matgptq(words: list[str]) -> None:
    verb = next((word for word in words[1:] if not word.startswith("-")), None)
    if verb is None or not re.fullmatch("[a-z-]+", verb):
        assert options(words) <= known(help_of("matgptq_vllm.cli", "--help")), words
        return
    allowed = known(help_of("matgptq_vllm.cli", verb, "--help"))
    asked = options(words)
    if verb == "serve" and not asked <= allowed:
        allowed |= options_of_vllm_serve()
    assert asked <= allowed, f"matgptq {verb} has no {sorted(asked - allowed)}"


def check_python(words: list[str]) -> None:
    if words[1] != "-m":
        assert (ROOT / words[1]).is_file(), words
        return
    if words[2] not in ("pytest", "pip", "venv"):
        sub = [word for word in words[3:4] if re.fullmatch("[a-z]+", word)]
        text = help_of(words[2], "--help")
        if sub and not options(words) <= known(text):
            text += help_of(words[2], *sub, "--help")
        assert options(words) <= known(text), f"python -m {words[2]} has no {sorted(options(words) - known(text))}"


PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/precisions", "/v1/slo", "/metrics", "/health", "/ready", "/playground")


def check_curl(words: list[str]) -> None:
    (url,) = (word for word in words if re.match(r"(https?://)?(localhost|server|127)", word))
    path = re.sub(r"^(https?://)?[^/]+", "", url)
    assert path in PATHS, url
    for flag, value in pairwise(words):
        if flag in ("-d", "--data"):
            json.loads(value)
        if flag == "-H":
            assert re.match(r"[A-Za-z-]+: \S", value), value


def check_make(words: list[str]) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(words[1:]) <= set(targets), words


def check_files(words: list[str]) -> None:
    """Files of the repository that the command names are there."""
    for word in words[1:]:
        if re.match(r"(deploy|examples|docs|tests)/", word):
            assert (ROOT / word).exists(), word
    for flag, value in pairwise(words):
        if words[0] == "docker" and words[1] == "compose" and flag == "-f":
            assert (ROOT / "deploy" / "compose" / value).is_file(), value


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "matgptq": check_matgptq,
    "python": check_python,
    "curl": check_curl,
    "make": check_make,
    "torchrun": lambda words: check_python(["python", *words[words.index("-m") :]]),
    **dict.fromkeys(
        ("docker", "buildah", "helm", "git", "openssl", "cd", "export", ".", "mv", "pre-commit", "promtool", "haproxy"),
        check_files,
    ),
}


def check(words: list[str]) -> None:
    if "/" in words[0]:
        program = ROOT / words[0]
        if words[0].startswith(".venv/bin/"):
            assert Path(sys.executable).with_name(program.name).exists(), words[0]
            return
        assert os.access(program, os.X_OK), words[0]
        check_files(words)
    else:
        assert words[0] in CHECKS, f"no check knows the program {words[0]!r}: {words}"
        CHECKS[words[0]](words)


@pytest.mark.parametrize("block", CHECKED, ids=lambda block: block.id)
def test_programs_options_and_files_of_a_block_exist(block: Block) -> None:
    commands = simple_commands(shell_lines(block))
    assert commands
    for words in commands:
        check(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_within_the_text_exist(page: Path) -> None:
    for text in inline_commands(page):
        if text.endswith("…"):
            continue
        for words in simple_commands(text.replace("…", "x").replace("...", "x")):
            check(words)


def test_shell_is_understood() -> None:
    text = """# a comment
A=1 matgptq serve DIR --x "a b" \\
    --y   # more
curl u -d '{"a":
  1}' | python -m json.tool && make test > out.txt
matgptq export P [--format a|b] [--text FILE [--seq-len 5]]
"""
    assert simple_commands(text) == [
        ["matgptq", "serve", "DIR", "--x", "a b", "--y"],
        ["curl", "u", "-d", '{"a":\n  1}'],
        ["python", "-m", "json.tool"],
        ["make", "test"],
        ["matgptq", "export", "P", "--format", "a", "--text", "FILE", "--seq-len", "5"],
    ]
    with pytest.raises(AssertionError, match="no check knows"):
        check(["rm", "-rf"])
    with pytest.raises(AssertionError, match="no-such-option"):
        check(["matgptq", "inspect", "P", "--no-such-option"])


PYTHON = [block for block in BLOCKS if block.language == "python"]
YAML = [block for block in BLOCKS if block.language == "yaml"]


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.id)
def test_python_is_python(block: Block) -> None:
    compile(block.text, block.id, "exec")


@pytest.mark.parametrize("block", YAML, ids=lambda block: block.id)
def test_yaml_is_yaml(block: Block) -> None:
    assert yaml.safe_load(block.text)
