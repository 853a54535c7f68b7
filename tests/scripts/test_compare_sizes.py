"""Models of several sizes, trained for the same time of the processor."""

import csv
import importlib.util
import sys
from pathlib import Path

import pytest
import yaml

from spectrafm_hf import training


SCRIPT = Path(__file__).parents[2] / "scripts" / "compare_sizes.py"
SPEC = importlib.util.spec_from_file_location("compare_sizes", SCRIPT)
compare_sizes = importlib.util.module_from_spec(SPEC)
sys.modules[SPEC.name] = compare_sizes
SPEC.loader.exec_module(compare_sizes)

RECIPE = {
    "sources": {"synthetic-gaia-xp": 1},
    "labels": ["teff", "fe_h"],
    "units": ["K", "dex"],
    "model": {
        "patch_size": 86,
        "hidden_size": 16,
        "num_filters": 8,
        "encoder_attention_heads": [2],
        "encoder_ffn_dim": [16],
        "decoder_attention_heads": [2],
        "decoder_ffn_dim": [16],
        "readout_dims": [8],
    },
    "output_dir": "unused",
    "per_device_train_batch_size": 64,
    "learning_rate": 1e-3,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(training, "VALIDATION_STARS", 60)
    monkeypatch.setattr(training, "MEASURED_STARS", 2000)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return tmp_path / "recipe.yaml"


@pytest.mark.slow
def test_larger_models_get_fewer_steps_and_a_second_run_adds_to_the_table(recipe, tmp_path, monkeypatch):
    table = tmp_path / "sizes.csv"
    arguments = [str(recipe), str(table), "--cpu-seconds", "1.5"]
    assert compare_sizes.main([*arguments, "patch_size=172,hidden_size=16"]) == 0
    before = table.read_text()
    assert (
        compare_sizes.main([*arguments, "patch_size=172,hidden_size=16", "patch_size=8,hidden_size=96,layers=6"]) == 0
    )
    assert table.read_text().startswith(before)
    small, large = csv.DictReader(table.read_text().splitlines())
    assert float(small["tokens_per_star"]) == 2 and float(large["tokens_per_star"]) == 43
    assert int(small["parameters"]) < int(large["parameters"])
    assert int(small["steps"]) > int(large["steps"]) >= 1
    assert float(small["synthetic-gaia-xp_fe_h"]) > 0


def test_a_variant_changes_the_recipe_and_leaves_the_first_as_it_was(recipe):
    given, _ = training.read_recipe(recipe)
    changed = compare_sizes.with_settings(given, "hidden_size=32,layers=3")
    assert changed.model["hidden_size"] == 32 and changed.model["encoder_ffn_dim"] == [16] * 3
    assert given.model["hidden_size"] == 16 and given.model["encoder_ffn_dim"] == [16]
