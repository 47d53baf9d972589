"""``matgptq serve``: what it executes, what it refuses at once, what importing it brings."""

import argparse
import json
import os
import shlex
import subprocess
import sys

import pytest

from matgptq_vllm.core.errors import FormatError, InputError, MatGPTQError
from serve import cli
from serve.environment import CPU_CACHE, CPU_CACHE_GIB
from serve.settings import Settings


def run(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="matgptq")
    cli.add_verbs(parser.add_subparsers())
    namespace = parser.parse_args(["serve", *arguments])
    return namespace.run(namespace)


@pytest.fixture
def executed(monkeypatch):
    calls = []
    monkeypatch.setattr(os, "execve", lambda *call: calls.append(call))
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    return calls


@pytest.mark.parametrize("own_first", [True, False])
def test_it_becomes_vllms_server(parent_folder, executed, own_first):
    own = ["--max-width", "4", "--default-precision=mix-3.0", "--max-body-bytes", "1000"]
    directory = str(parent_folder)
    run([*own, directory, "--port", "80"] if own_first else [directory, "--port", "80", *own])
    [(path, command, environment)] = executed
    assert path == command[0]
    arguments = command[command.index("serve") :]
    assert arguments[:5] == ["serve", directory, "--port", "80", "--served-model-name"]
    assert arguments[5:10] == [directory, f"{directory}@2", f"{directory}@3", f"{directory}@4", f"{directory}@mix-3.0"]
    assert '{"matgptq": {"max_width": 4, "default_precision": "mix-3.0"}}' in arguments
    assert {"matgptq", "matgptq_endpoints", "matgptq_stats"} <= set(environment["VLLM_PLUGINS"].split(","))
    assert environment["MATGPTQ_MAX_BODY_BYTES"] == "1000"


def test_a_memory_budget_decides_which_profiles_are_offered(parent_folder, executed, monkeypatch):
    index = {"weight_map": {"norm.weight": "model.safetensors"}}
    (parent_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    header = json.dumps({"norm.weight": {"dtype": "BF16", "shape": [64], "data_offsets": [0, 128]}}).encode()
    (parent_folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(128))
    # 24 x 128 weights, a scale of 2 bytes for every row, 128 bytes that are not quantized; on a CPU nothing is padded.
    monkeypatch.setattr(cli, "engine_layout", lambda _: (False, None))
    needed = 24 * 128 // 2 + 24 * 2 + 128
    for budget, widths in ((needed, ["2", "3", "4", "mix-3.0"]), (needed - 1, ["2", "3"])):
        run([str(parent_folder), "--memory-budget", str(budget)])
        names = executed[-1][1][executed[-1][1].index("--served-model-name") + 2 :]
        assert [name.rpartition("@")[2] for name in names[: len(widths)]] == widths
        assert f'{{"matgptq": {{"memory_budget": {budget}}}}}' in names
    with pytest.raises(InputError, match="memory budget 100 bytes is too small"):
        run([str(parent_folder), "--memory-budget", "100"])


def test_what_auto_aims_at_reaches_the_server(parent_folder, executed, tmp_path):
    tenants = tmp_path / "tenants.yaml"
    tenants.write_text("tenants:\n  anonymous:\n    default_precision: auto\n")
    given = ["--tpot-slo-ms", "30", "--ttft-slo-ms=500", "--auto-floor", "3", "--default-precision", "auto", "--request-log"]
    run([str(parent_folder), *given, "--sweep-seconds", "2", "--tenants", str(tenants)])
    [(_, command, environment)] = executed
    assert '{"matgptq": {}}' in command
    found = Settings.from_env(environment)
    assert (found.tpot_slo_ms, found.ttft_slo_ms, found.auto_floor, found.default_auto) == (30, 500, "3", True)
    assert (found.sweep_seconds, found.request_log, found.tenants_file) == (2, True, str(tenants))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--auto-floor", "5"], "'5' is not held"),
        (["--tpot-slo-ms", "-1"], "milliseconds above 0"),
        (["--tenants", "{tenants}", "--api-key", "x"], "--api-key and --tenants exclude each other"),
        (["--tenants", "{tenants}", "--api-server-count=2"], "--api-server-count and --tenants exclude each other"),
        (["--tenants", "{wrong}"], r"wrong.yaml:3:24: .*'7'"),
    ],
)
def test_what_auto_cannot_aim_at_is_refused_before_anything_starts(parent_folder, executed, tmp_path, arguments, told):
    right, wrong = tmp_path / "tenants.yaml", tmp_path / "wrong.yaml"
    right.write_text("tenants:\n  anonymous:\n    default_precision: auto\n")
    wrong.write_text("tenants:\n  anonymous:\n    default_precision: 7\n")
    with pytest.raises(MatGPTQError, match=told):
        run([str(parent_folder), *(argument.format(tenants=right, wrong=wrong) for argument in arguments)])
    assert executed == []


def test_dry_run_prints_a_command_for_a_shell_and_runs_nothing(parent_folder, executed, capsys, monkeypatch):
    monkeypatch.setattr(cli, "needs_cache_bound", lambda _: True)
    monkeypatch.delenv(CPU_CACHE, raising=False)
    assert run([str(parent_folder), "--dry-run", "--served-model-name", "my model"]) == 0
    assert executed == []
    words = shlex.split(capsys.readouterr().out)
    assert words[0].startswith("VLLM_PLUGINS=")
    assert words[1] == f"{CPU_CACHE}={CPU_CACHE_GIB}"
    assert "my model@mix-6.0" in words
    assert "--dry-run" not in words


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_teaches_the_three_ways_to_ask(option, capsys):
    with pytest.raises(SystemExit) as caught:
        run([option])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for word in ("X-Precision", '"precision"', "NAME@4", "--max-width", "--default-precision"):
        assert word in text


@pytest.mark.parametrize("arguments", [[], ["--port", "80"], ["--port", "80", "DIR"], ["--max-width", "4"]])
def test_the_folder_comes_before_vllms_arguments(parent_folder, executed, arguments):
    with pytest.raises(InputError, match="matgptq serve DIR"):
        run([argument.replace("DIR", str(parent_folder)) for argument in arguments])
    assert executed == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["--max-width", "4", "--default-precision", "8"],
        ["--default-precision", "mix-9"],
        ["--default-precision", "a b"],
        ["--max-width", "4", "--default-precision", "mix-6.0"],
        ["--max-body-bytes", "0"],
        ["--worker-cls", "my.Worker"],
    ],
)
def test_wrong_options_are_refused_before_anything_starts(parent_folder, executed, arguments):
    with pytest.raises(InputError):
        run([str(parent_folder), *arguments])
    assert executed == []


def test_a_folder_that_is_no_parent_is_refused_before_anything_starts(tmp_path, executed):
    with pytest.raises(FormatError, match=r"matgptq_manifest\.json"):
        run([str(tmp_path)])
    assert executed == []


def test_importing_the_command_or_the_endpoints_brings_neither_torch_nor_vllm():
    code = """
import sys
import serve.cli, serve.endpoints, serve.middleware, serve.metrics
heavy = {"torch", "vllm", "numpy", "triton", "transformers"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_importing_the_command_alone_brings_no_web_framework():
    code = (
        "import sys, serve.cli; sys.exit(str({'fastapi', 'starlette'} & set(sys.modules)) if 'fastapi' in sys.modules else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
