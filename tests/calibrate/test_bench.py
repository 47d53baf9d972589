import json

import torch
from transformers import LlamaConfig

from calibrate import bench
from calibrate.model import skeleton


def test_the_benchmark_times_the_phases_of_every_block(tmp_path, capsys):
    out = tmp_path / "report.json"
    arguments = "--shape tiny --blocks 2 --num-samples 3 --seq-len 16 --streams 3 --sweeps 0 --device cpu"
    bench.main([*arguments.split(), "--out", str(out)])
    report = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out) == report
    assert (report["tokens"], report["streams"], report["compute_dtype"]) == (48, [3], "float32")
    assert len(report["blocks"]) == 2
    for block in report["blocks"]:
        assert set(block["phases"]) == {"forward", "hessian", "rounding", "other"}
        assert all(seconds > 0 for seconds in block["phases"].values())
        assert sum(block["phases"].values()) < report["seconds"]
        assert len(block["errors"]) == 7
    assert report["peak_host_bytes"] > 0


def test_random_weights_are_the_same_for_the_same_name():

    model = skeleton(
        LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    )
    source = bench.RandomWeights(model, torch.device("cpu"))
    name = "model.layers.0.mlp.up_proj.weight"
    assert source.read(name).shape == (48, 32)
    assert torch.equal(source.read(name), source.read(name))
    assert not torch.equal(source.read(name), source.read(name.replace("up", "gate")))
    assert torch.equal(source.read("model.norm.weight"), torch.ones(32, dtype=torch.bfloat16))
