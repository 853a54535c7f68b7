"""Means of the weights of checkpoints."""

import importlib.util
from pathlib import Path

import pytest
import torch

from spectrafm_hf.checkpoints import load_checkpoint, save_checkpoint


SMALL = "spectrafm-gaia-xp-small"


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).parents[2] / "scripts" / "average_checkpoints.py"
    spec = importlib.util.spec_from_file_location("average_checkpoints", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_weights_are_the_weighted_mean_and_the_rest_is_that_of_the_first(script, tmp_path):
    model, tokenizer = load_checkpoint(SMALL)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(4.0)
    save_checkpoint(model, tokenizer, tmp_path / "other")
    assert script.main([str(tmp_path / "mean"), SMALL, "3", str(tmp_path / "other"), "1"]) == 0
    mean, mean_tokenizer = load_checkpoint(tmp_path / "mean")
    for (name, found), first in zip(mean.named_parameters(), load_checkpoint(SMALL)[0].parameters(), strict=True):
        torch.testing.assert_close(found, first + 1.0, rtol=1e-5, atol=1e-6, msg=name)
    assert mean_tokenizer.to_dict() == tokenizer.to_dict()
    assert (tmp_path / "mean" / "training_range.json").is_file()


def test_bad_input_is_one_line_and_exit_code_2(script, tmp_path, capsys):
    for parts, message in (
        ([SMALL], "parts: expected a weight after each checkpoint"),
        ([SMALL, "1", "spectrafm-base-synthetic", "1"], "checkpoint: expected checkpoints of one architecture"),
    ):
        assert script.main([str(tmp_path / "mean"), *parts]) == 2
        assert capsys.readouterr().err.startswith(f"average_checkpoints.py: {message}")
    assert not (tmp_path / "mean").exists()
