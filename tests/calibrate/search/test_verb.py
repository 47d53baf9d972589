"""The verb ``search`` on the command line."""

import argparse
import json

import pytest

from calibrate.cli import add_verbs


def run(*arguments):
    parser = argparse.ArgumentParser()
    add_verbs(parser.add_subparsers(required=True))
    namespace = parser.parse_args([str(argument) for argument in arguments])
    return namespace.run(namespace)


@pytest.fixture
def short(search_options):
    options = search_options()
    return [
        "search", options.model, "--text", options.text, "--num-samples", 8, "--seq-len", 16, "--generations", 1,
        "--offspring", 2, "--sensitivity-samples", 2, "--held-out", 0.2, "--held-out-samples", 2, "--held-out-seq-len", 16,
        "--device", "cpu",
    ]  # fmt: skip


def test_the_verb_prints_a_plan_a_table_and_json(short, capsys):
    assert run(*short, "--budget", "3.0", "--dry-run") == 0
    assert "would search mix-3.0" in capsys.readouterr().out
    assert run(*short, "--budget", "3.0") == 0
    assert "| mix-3.0 |" in " ".join(capsys.readouterr().out.split())
    assert run(*short, "--budget", "2.5", "--name", "small", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["widths"].keys() == {"small"}
    assert [row["name"] for row in report["rows"]] == ["2", "small", "3"]
