"""calibrate.evaluate.switching: prefixes and continuations at different profiles."""

import math

import pytest
import torch

from calibrate.evaluate import switching
from calibrate.evaluate.resident_parent import ResidentParent
from calibrate.evaluate.sliced_model import load_profile_model
from calibrate.evaluate.switching import measure_switching
from calibrate.run import run_calibration


def test_without_a_change_it_is_the_perplexity_of_the_second_part_and_each_part_matters(tiny_options):
    reader = ResidentParent(run_calibration(tiny_options()))
    profiles = [reader.profile(name) for name in ("2", "8")]
    windows = torch.arange(48).view(4, 12) % 40
    found = measure_switching(reader, profiles, windows, 5)
    for profile in profiles:
        logits = load_profile_model(reader, profile)(windows).logits[:, 5:-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 6:].flatten())
        assert found[profile.name, profile.name] == pytest.approx(math.exp(loss), rel=1e-4)
    assert len(set(found.values())) == 4


def test_the_command_prints_a_table_and_refuses_what_leaves_nothing_to_score(tiny_options, text_file, capsys):
    parent = run_calibration(tiny_options())
    arguments = [str(parent), "--text", str(text_file), "--profiles", "3,8", "--seq-len", "16", "--limit-windows", "2"]
    assert switching.main(arguments) == 0
    heading, _, *rows = capsys.readouterr().out.splitlines()
    assert "continuation at 8" in heading
    assert [row.split()[1] for row in rows] == ["3", "8"]
    with pytest.raises(SystemExit, match="2"):
        switching.main([*arguments, "--prefix", "15"])
    assert switching.main([*arguments[:4], "7", *arguments[5:]]) == 1
