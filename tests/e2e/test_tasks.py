"""lm-eval tasks from a local file, with the precision as an argument: in one process, and through a real server."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from calibrate.evaluate.server import ask_server
from matgptq_vllm.core.errors import InputError

from .replica_server import MODEL_NAME, ROOT, ReplicaServer

pytestmark = pytest.mark.engine

PRECISIONS = "2,mix-kind"
NUM_EXAMPLES = 4

HEAD = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
"""

TASKS = {
    "choice": """\
output_type: multiple_choice
doc_to_text: "{{start}}"
doc_to_choice: "{{[true_end, other_end]}}"
doc_to_target: 0
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
""",
    "rolling": """\
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{start}} {{true_end}}"
metric_list:
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
""",
    "continuation": """\
output_type: loglikelihood
doc_to_text: "{{start}}"
doc_to_target: " {{true_end}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
""",
    "generation": """\
output_type: generate_until
doc_to_text: "{{start}}"
doc_to_target: " the"
generation_kwargs: {until: ["."], max_gen_toks: 4}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
""",
}


@pytest.fixture(scope="module")
def task_files(tmp_path_factory: pytest.TempPathFactory, evaluation_text: Path) -> str:
    """A task file of every kind of request, over beginnings and ends of sentences of the evaluation text."""
    directory = tmp_path_factory.mktemp("tasks")
    sentences = [" ".join(part.split()) for part in evaluation_text.read_text(encoding="utf-8").split(". ")]
    halves = [sentence.split() for sentence in sentences if 80 < len(sentence) < 160][: 2 * NUM_EXAMPLES]
    data = directory / "examples.jsonl"
    with data.open("w", encoding="utf-8") as file:
        for words, others in zip(halves[:NUM_EXAMPLES], halves[NUM_EXAMPLES:], strict=True):
            example = {"start": words[:-2], "true_end": words[-2:], "other_end": others[-2:]}
            file.write(json.dumps({name: " ".join(part) for name, part in example.items()}) + "\n")
    paths = []
    for name, body in TASKS.items():
        paths.append(directory / f"{name}.yaml")
        paths[-1].write_text(HEAD.format(name=f"local_{name}", data=data) + body, encoding="utf-8")
    return ",".join(map(str, paths))


def evaluate(home: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """``matgptq evaluate`` where nothing can be downloaded."""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(home),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "matgptq_vllm.cli", "evaluate", *map(str, arguments)]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def metrics(run: subprocess.CompletedProcess[str]) -> dict[tuple[str, str, str], Any]:
    assert run.returncode == 0, run.stderr[-4000:]
    return {(row["precision"], row["task"], row["metric"]): row["value"] for row in json.loads(run.stdout)["tasks"]}


def test_both_ways_to_run_a_task_find_the_same(
    v1_server: ReplicaServer, profiled_parent: Path, task_files: str, tmp_path: Path
):
    common = (profiled_parent, "--tasks", task_files, "--precision", PRECISIONS, "--json")
    with ThreadPoolExecutor(2) as pool:
        direct_run = pool.submit(evaluate, tmp_path / "direct", *common)
        server_run = pool.submit(evaluate, tmp_path / "server", *common, "--url", v1_server.url)
    directly, through_server = metrics(direct_run.result()), metrics(server_run.result())
    assert len(directly) == 2 * len(TASKS)
    assert through_server == pytest.approx(directly, rel=1e-3)
    bits_per_byte = [directly[precision, "local_rolling", "bits_per_byte"] for precision in PRECISIONS.split(",")]
    assert bits_per_byte[0] > 1.05 * bits_per_byte[1]


def test_a_precision_that_the_server_lacks_is_refused_with_what_it_holds(v1_server: ReplicaServer):
    server = ask_server(f"{v1_server.url}/v1")
    assert (server.model, server.context) == (MODEL_NAME, 1024)
    server.check_precision("auto")
    with pytest.raises(InputError, match=r"'5' is not held by the server at .*2, 3, 4, 6, 8, mix-kind, mix-depth, auto"):
        server.check_precision("5")
