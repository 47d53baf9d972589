import json
from pathlib import Path

import pytest
import torch

from matgptq_vllm.kernels.bench.__main__ import main, save
from matgptq_vllm.kernels.bench.options import parse_options


@pytest.fixture
def no_gpu(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu_it_refuses_and_writes_nothing(tmp_path: Path, capsys):
    assert main(["--out", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert "error: no CUDA GPU is visible to torch" in captured.err
    assert captured.out == ""
    assert not (tmp_path / "out").exists()


def test_an_old_gpu_is_refused_by_its_capability(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    assert main([]) == 2
    assert "Tesla T4 has compute capability 7.5; the kernels need 8.0 or more" in capsys.readouterr().err


def test_a_wrong_option_is_an_error_before_the_gpu_is_looked_for(capsys):
    assert main(["--m", "-1"]) == 2
    assert "--m '-1' is not supported" in capsys.readouterr().err


def test_json_page_and_picture_are_saved(results_of, tmp_path: Path):
    options = parse_options(["--out", str(tmp_path)])
    save(results_of({("bf16", 1): 5.0, ("width-8", 1): 3.0}), options)
    assert len(json.loads((tmp_path / "results.json").read_text())["cells"]) == 8
    assert "![Time against M](llama-3.1-8b.png)" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "llama-3.1-8b.png").read_bytes().startswith(b"\x89PNG")


def test_without_a_plot_the_page_shows_none(results_of, tmp_path: Path):
    save(results_of({("bf16", 1): 5.0}), parse_options(["--out", str(tmp_path), "--no-plot"]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.md", "results.json"]
    assert "png" not in (tmp_path / "report.md").read_text()
