"""The ``vllm serve`` arguments of a replica."""

import importlib
import json

import pytest

from matgptq_vllm.core.errors import InputError
from matgptq_vllm.core.replica import ReplicaOptions
from serve import command
from serve.command import SCHEDULER_CLASS, WORKER_CLASS, vllm_arguments

PROFILES = ["2", "4", "mix-3.0"]
OPTIONS = ReplicaOptions(max_width=4, default_precision="mix-3.0")


def parsed(arguments: list[str]) -> dict[str, list[str]]:
    """Option -> values of our own part, which comes last."""
    found: dict[str, list[str]] = {}
    for argument in arguments[arguments.index("--served-model-name") :]:
        if argument.startswith("--"):
            values = found.setdefault(argument, [])
        else:
            values.append(argument)
    return found


def test_vllms_own_arguments_pass_in_order_and_ours_follow():
    given = [
        "--port",
        "80",
        "-tp",
        "2",
        "--api-key",
        "a",
        "b",
        "--enforce-eager",
        "--seed=-1",
        "--override-generation-config",
        '{"a": 1}',
    ]
    arguments = vllm_arguments("dir", given, OPTIONS, PROFILES)
    assert arguments[: 2 + len(given)] == ["serve", "dir", *given]
    ours = parsed(arguments)
    assert ours["--worker-cls"] == [WORKER_CLASS]
    assert ours["--scheduler-cls"] == [SCHEDULER_CLASS]
    assert ours["--served-model-name"] == ["dir", "dir@2", "dir@4", "dir@mix-3.0"]
    config = json.loads(ours["--additional-config"][0])
    assert ReplicaOptions.from_additional_config(config) == OPTIONS


@pytest.mark.parametrize("spelling", [["--served-model-name", "a", "b"], ["--served_model_name", "a", "b"]])
def test_served_names_are_kept_first_and_each_gets_its_aliases(spelling):
    arguments = vllm_arguments("dir", ["--port", "1", *spelling, "--seed", "2"], OPTIONS, PROFILES)
    assert arguments[:6] == ["serve", "dir", "--port", "1", "--seed", "2"]
    assert parsed(arguments)["--served-model-name"] == ["a", "b", "a@2", "a@4", "a@mix-3.0", "b@2", "b@4", "b@mix-3.0"]


def test_an_alias_that_the_operator_already_lists_is_not_listed_twice():
    names = parsed(vllm_arguments("dir", ["--served-model-name", "a", "a@4"], OPTIONS, PROFILES))["--served-model-name"]
    assert names.count("a@4") == 1
    assert len(set(names)) == len(names)


def test_the_operators_additional_config_is_kept():
    arguments = vllm_arguments("dir", ['--additional-config={"x": {"y": 1}}'], OPTIONS, PROFILES)
    config = json.loads(parsed(arguments)["--additional-config"][0])
    assert config == {"x": {"y": 1}, **OPTIONS.to_additional_config()}
    assert arguments.count("--additional-config") == 1


def test_a_repeated_decision_of_ours_is_accepted():
    given = ["--worker-cls", "auto", "--scheduler_cls", SCHEDULER_CLASS, "-q", "matgptq"]
    arguments = vllm_arguments("dir", given, OPTIONS, PROFILES)
    assert arguments.count("--worker-cls") == arguments.count("--scheduler-cls") == 1
    assert vllm_arguments("dir", [], OPTIONS, PROFILES) == arguments


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (["--worker-cls", "my.Worker"], "--worker-cls"),
        (["--worker_cls=my.Worker"], "--worker-cls"),
        (["--scheduler-cls", "my.Scheduler"], "--scheduler-cls"),
        (["--quantization", "fp8"], "--quantization"),
        (["-q", "fp8"], "--quantization"),
        (["-qfp8"], "--quantization"),
        (["--quant", "fp8"], "--quantization"),
        (["--worker-c", "my.Worker"], "--worker-cls"),
        (["--served-model", "x"], "--served-model-name"),
        (["--additional-config", "{"], "--additional-config"),
        (["--additional-config", "[]"], "--additional-config"),
        (["--additional-config", '{"matgptq": {}}'], "--max-width"),
        (["--additional-config.matgptq.max_width", "8"], "--additional-config"),
        (["--additional_config.x=1"], "--additional-config"),
        (["--config", "a.yaml"], "--config"),
        (["--config=a.yaml"], "--config"),
        (["--served-model-name"], "--served-model-name"),
    ],
)
def test_what_contradicts_or_hides_from_the_replica_is_refused(given, named):
    with pytest.raises(InputError, match=named):
        vllm_arguments("dir", given, OPTIONS, PROFILES)


def test_options_that_merely_begin_alike_pass():
    given = ["--worker-extension-cls", "my.Extension", "--scheduling-policy", "fcfs", "--quantization-param-path", "x"]
    assert vllm_arguments("dir", given, OPTIONS, PROFILES)[2:8] == given


def test_drafting_by_a_narrow_slice_is_vllms_speculative_decoding_with_our_class() -> None:
    options = ReplicaOptions(draft_width=3)
    ours = parsed(vllm_arguments("dir", [], options, PROFILES, draft_tokens=2))
    (text,) = ours["--speculative-config"]
    config = json.loads(text)
    assert (config["method"], config["num_speculative_tokens"]) == ("custom_class", 2)
    module, _, name = config["model"].rpartition(".")
    assert hasattr(importlib.import_module(module), name)
    assert json.loads(ours["--additional-config"][0])["matgptq"]["draft_width"] == 3


def test_the_operators_own_speculative_decoding_passes_through() -> None:
    given = '{"method": "ngram", "num_speculative_tokens": 2}'
    assert parsed(vllm_arguments("dir", ["--speculative-config", given], OPTIONS, PROFILES))["--speculative-config"] == [given]


@pytest.mark.parametrize(
    ("given", "draft_width", "draft_tokens", "said"),
    [
        (["--speculative-config", "{}"], 3, None, "exclude each other"),
        (["--speculative-config.method", "ngram"], 3, None, "exclude each other"),
        (["-sc", "{}"], 3, None, "exclude each other"),
        ([], None, 2, "add --draft-width"),
        ([], 3, 0, "1 token or more"),
    ],
)
def test_contradictions_about_drafting_are_refused(
    given: list[str], draft_width: int | None, draft_tokens: int | None, said: str
) -> None:
    with pytest.raises(InputError, match=said):
        vllm_arguments("dir", given, ReplicaOptions(draft_width=draft_width), PROFILES, draft_tokens)


@pytest.mark.parametrize(
    ("installed", "arguments", "layout"),
    [
        ("0.32.0+cpu", [], (False, None)),
        ("0.32.0+cpu", ["--dtype", "float32"], (False, 4)),
        ("0.26.0", [], (True, None)),
        ("0.26.0", ["--dtype=half"], (True, 2)),
        ("0.26.0", ["--dtype", "float"], (False, 4)),
        (None, ["--port", "80"], (True, None)),
    ],
)
def test_how_weights_are_held_follows_from_the_platform_and_the_type(monkeypatch, installed, arguments, layout):
    def version(name: str) -> str:
        assert name == "vllm"
        if installed is None:
            raise command.PackageNotFoundError
        return installed

    monkeypatch.setattr(command, "version", version)
    assert command.engine_layout(arguments) == layout


@pytest.mark.parametrize(
    ("installed", "arguments", "needed"),
    [
        ("0.32.0+cpu", ["--port", "80"], True),
        ("0.32.0+cpu", ["--gpu_memory_utilization=0.5"], False),
        ("0.32.0+cpu", ["--kv-cache-memory-bytes", "1000"], False),
        ("0.26.0", [], False),
    ],
)
def test_the_cache_is_bounded_on_a_cpu_of_which_nothing_is_said(monkeypatch, installed, arguments, needed):
    monkeypatch.setattr(command, "version", lambda _: installed)
    assert command.needs_cache_bound(arguments) == needed


def test_steps_of_some_hundred_tokens_get_graphs_unless_the_operator_decides_about_graphs() -> None:
    assert parsed(vllm_arguments("dir", ["--max-num-seqs", "64"], OPTIONS, PROFILES))["--max-cudagraph-capture-size"] == ["512"]


@pytest.mark.parametrize(
    "given",
    [
        ["--enforce-eager"], ["--enforce_eager"], ["-O0"], ["-O", "1"], ["-cc.mode=0"], ["--compilation-config", "{}"],
        ["--max-cudagraph-capture-size", "8"], ["--cudagraph-capture-sizes", "1", "8"],
    ],
)  # fmt: skip
def test_an_operators_word_about_graphs_stands(given: list[str]) -> None:
    arguments = vllm_arguments("dir", given, OPTIONS, PROFILES)
    assert arguments.count("--max-cudagraph-capture-size") == given.count("--max-cudagraph-capture-size")
    assert "512" not in arguments
