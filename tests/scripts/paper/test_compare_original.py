"""The published architecture, trained as long as ours and read in windows."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from script_loader import load_script

from spectrafm_hf import SpectraFMConfig, SpectraFMForPrediction


SCRIPT = Path(__file__).parents[3] / "scripts" / "paper" / "compare_original.py"
compare_original = load_script("paper/compare_original")
RECIPE = SCRIPT.parents[1] / "recipes" / "original-synthetic.yaml"
TINY = {
    "hidden_size": 16,
    "encoder_attention_heads": [2],
    "encoder_ffn_dim": [16],
    "decoder_attention_heads": [2],
    "decoder_ffn_dim": [16],
    "readout_dims": [8],
}


def test_the_recipe_is_the_published_architecture_but_for_dropout_of_attention():
    settings = yaml.safe_load(RECIPE.read_text())["model"]
    published = SpectraFMConfig.original().to_dict()
    differing = {name for name, value in settings.items() if published[name] != value}
    assert differing == {"attention_dropout"}
    assert SpectraFMConfig(**settings).to_dict().keys() == published.keys()


def test_weights_begin_as_those_of_the_published_program_whose_attention_is_that_of_torch():
    torch.manual_seed(0)
    model = SpectraFMForPrediction(SpectraFMConfig.original())
    compare_original.initialise(model)
    table = model.model.embeddings.value_embedding.weight.weight
    assert not table[0].any() and table.min() >= 0 and 0.9 < table.max() <= 1
    layer = model.model.encoder.layers[0]
    theirs = torch.nn.MultiheadAttention(256, 16, add_bias_kv=True)
    for ours, published in (
        (layer.attention.q_proj.weight, theirs.in_proj_weight),
        (layer.attention.o_proj.weight, theirs.out_proj.weight),
        (layer.attention.extra_key, theirs.bias_k),
    ):
        assert float((ours.std() / published.std()).detach()) == pytest.approx(1, abs=0.2)
    assert float(layer.mlp.fc1.weight.detach().std()) == pytest.approx((2 / 256) ** 0.5, rel=0.02)


def test_windows_hold_each_pixel_of_a_star_once_and_the_first_ones_fill_the_last_window():
    columns = {"wavelength": np.arange(14.0)[None], "flux": 2 * np.arange(14.0)[None]}
    columns |= {"flux_error": np.ones((1, 14)), "mask": np.zeros((1, 14), bool)}
    (star,) = compare_original.windows(columns, 4)
    pixels = np.concatenate([row["wavelength"] for row in star])
    assert [len(row["flux"]) for row in star] == [4] * 4
    assert sorted(pixels[:14]) == list(range(14)) and list(pixels[14:]) == list(pixels[:2])
    assert np.array_equal(np.concatenate([row["flux"] for row in star]), 2 * pixels)


def test_the_table_has_steps_and_time_and_a_second_run_does_not_train(tmp_path, monkeypatch):
    monkeypatch.setattr("spectrafm_hf.training.recipe.VALIDATION_STARS", 20)
    monkeypatch.setattr("spectrafm_hf.training.trainer.MEASURED_STARS", 500)
    settings = yaml.safe_load(RECIPE.read_text())
    settings["model"] |= TINY
    settings |= {"output_dir": str(tmp_path / "run"), "max_steps": 4, "save_steps": 2, "logging_steps": 1}
    settings |= {"disable_tqdm": True, "dataloader_pin_memory": False}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    arguments = [str(tmp_path / "recipe.yaml"), str(tmp_path / "table.csv"), "--stars", "10"]
    assert compare_original.main(arguments) == 0
    before = (tmp_path / "table.csv").read_text()
    mean, one, ours, median = csv.DictReader(before.splitlines())
    assert mean["model"].endswith("mean of 15 windows") and mean["steps"] == "4" and mean["stars_seen"] == "32"
    assert float(mean["cpu_seconds"]) > 0 and mean["teff"] != one["teff"]
    # That the bundled model is better than the median star says that labels and stars are in step.
    assert float(ours["teff"]) < 0.5 * float(median["teff"])

    monkeypatch.setattr(compare_original, "train", None)
    assert compare_original.main(arguments) == 0
    assert (tmp_path / "table.csv").read_text() == before
