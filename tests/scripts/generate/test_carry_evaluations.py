"""Evaluations of one rung stay valid after a training of another, and only then."""

import json

import pytest
import torch
from script_loader import load_script

from spectrafm_hf import bundled, load_checkpoint
from spectrafm_hf.checkpoints import save_checkpoint
from spectrafm_hf.hub.cards import checksums


@pytest.fixture(scope="module")
def script():
    return load_script("generate/carry_evaluations")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint with other weights and errors of its third rung."""
    model, tokenizer = load_checkpoint("spectrafm-base")
    with torch.no_grad():
        model.model.rungs[2].layer_norm.weight.add_(0.5)
        model.means[2].bias.add_(0.1)
    model.config.rung_error_floors = [{}, {}, {"teff": 50.0}, {}]
    folder = tmp_path_factory.mktemp("new") / "checkpoint"
    save_checkpoint(model, tokenizer, folder)
    return folder


def test_evaluations_of_other_rungs_are_of_the_new_checkpoint(script, trained, tmp_path):
    old, new = (checksums(*load_checkpoint(path)) for path in (bundled("spectrafm-base"), trained))
    assert old["model_sha256"] != new["model_sha256"]
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps({"model": {"name": "spectrafm-base", **old}, "results": [1.5]}))
    command = [bundled("spectrafm-base"), str(trained)]
    assert script.main([*command, "--rung", "0", str(path)]) == 0
    assert json.loads(path.read_text()) == {"model": {"name": "spectrafm-base", **new}, "results": [1.5]}
    with pytest.raises(ValueError, match="expected an evaluation with the model_sha256"):
        script.main([*command, "--rung", "1", str(path)])


def test_where_anything_differs_nothing_is_written(script, trained, tmp_path, capsys):
    path = tmp_path / "evaluation.json"
    path.write_text("{}")
    assert script.main([bundled("spectrafm-base"), str(trained), "--rung", "2", str(path)]) == 2
    assert "model.rungs.2.layer_norm.weight" in capsys.readouterr().out and path.read_text() == "{}"


def test_another_basis_makes_another_checksum_of_the_settings(trained, tmp_path):
    model, tokenizer = load_checkpoint(trained)
    before = checksums(model, tokenizer)
    tokenizer.basis.rungs[0].directions[0, 0, 0] += 0.5
    save_checkpoint(model, tokenizer, tmp_path / "changed")
    after = checksums(*load_checkpoint(tmp_path / "changed"))
    assert {name for name in before if before[name] != after[name]} == {"settings_sha256"}
