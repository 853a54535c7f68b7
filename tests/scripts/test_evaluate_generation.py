"""Flux, labels and neighbours from a checkpoint are measured as the tables say."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict

from spectrafm_hf import SpectraFMConfig, SpectraFMForPrediction, SpectraFMTokenizer
from spectrafm_hf.checkpoints import save_checkpoint
from spectrafm_hf.data.synthetic import SyntheticStars


SCRIPT = Path(__file__).parents[2] / "scripts" / "evaluate_generation.py"
LABELS = ["teff", "logg", "fe_h", "alpha_m", "mg_fe", "o_fe"]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("evaluate_generation", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["evaluate_generation"] = module
    spec.loader.exec_module(module)
    module.FITTED = 700  # for the 231 products of 20 components
    yield module
    del sys.modules["evaluate_generation"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    config = SpectraFMConfig(
        patch_size=200, hidden_size=16, num_filters=4, num_frequencies=8, encoder_attention_heads=[2],
        encoder_ffn_dim=[16], decoder_attention_heads=[2], decoder_ffn_dim=[16], readout_dims=[8], label_names=LABELS,
        label_units=[""] * 6, label_centers=[5000.0, 3.0, -0.3, 0.1, 0.1, 0.1], label_scales=[800.0, 1.5, *[0.4] * 4],
    )  # fmt: skip
    tokenizer = SpectraFMTokenizer(label_names=LABELS, patch_size=200, continuum="median", standardize_scale=0.3)
    save_checkpoint(SpectraFMForPrediction(config), tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def observed(tmp_path_factory) -> Path:
    """A data set of 60 synthetic stars in the place of observed ones."""
    stars = SyntheticStars("gaia-xp").draw(60, np.random.default_rng(0))
    names = [
        "wavelength",
        "flux",
        "flux_error",
        "mask",
        *(f"{label}{end}" for label in LABELS[:4] for end in ("", "_err")),
    ]
    data = Dataset.from_dict({"object_id": [f"s{i}" for i in range(60)], **{name: stars[name] for name in names}})
    folder = tmp_path_factory.mktemp("data")
    for split, part in DatasetDict(test=data, validation=data).items():
        part.to_parquet(folder / f"{split}.parquet")
    return folder


def test_the_command_writes_figures_and_pictures(script, checkpoint, observed, tmp_path, capsys):
    command = [str(checkpoint), "--output", str(tmp_path / "out"), "--stars", "10", "--data", str(observed)]
    assert script.main(command) == 0
    assert capsys.readouterr().out == (tmp_path / "out" / "generation.md").read_text()
    report = json.loads((tmp_path / "out" / "generation.json").read_text())
    assert report["command"].endswith(f"--stars 10 --data {observed}") and report["split"] == "test"
    assert len(report["flux"]) == 7
    for title in ("APOGEE from labels", "synthetic XP, red from blue", "APOGEE, third detector from first"):
        # Synthetic stars are fitted well by a function that is fitted to such stars, not by random weights.
        figures = {name: figure["rms"] for name, figure in report["flux"][title]["figures"].items()}
        assert figures["quadratic fit"] < min(figures["median spectrum"], figures["model"]), title
    assert report["flux"]["observed XP, red from blue"]["figures"]["errors of the observed flux"]["rms"] < 0.1
    assert set(report["labels"]["figures"]) == {"alpha_m"}, "of the rest, what is given is not among the labels"
    assert report["labels"]["figures"]["alpha_m"]["quadratic fit"] < report["labels"]["figures"]["alpha_m"]["scatter"]
    assert report["embeddings"]["observed XP, test"]["labels"] == ["teff", "logg", "fe_h", "alpha_m"]
    for picture in ("labels-to-spectrum.png", "spectrum-to-spectrum.png"):
        assert (tmp_path / "out" / picture).stat().st_size > 20_000


def test_answers_do_not_depend_on_how_they_are_asked_for(script, checkpoint, monkeypatch):
    model = script.Model(*script.load_checkpoint(str(checkpoint)))
    model.model.eval()
    stars = script.draw(SyntheticStars("gaia-xp"), 5, 0)
    given = script.within(stars, (3000, 6400))
    wavelength = np.array([4000.0, 6500.0, 9000.0])
    answers = model.flux(wavelength, spectra=given)
    monkeypatch.setattr(script, "BATCH", 2)
    monkeypatch.setattr(script, "REQUESTS", 2)
    np.testing.assert_allclose(model.flux(wavelength, spectra=given), answers, rtol=1e-4)
    # In the unit of the spectrum.
    twice = {**given, "flux": 2 * given["flux"], "flux_error": 2 * given["flux_error"]}
    np.testing.assert_allclose(model.flux(wavelength, spectra=twice), 2 * answers, rtol=1e-4)


def test_a_window_holds_its_pixels_and_no_other(script):
    stars = script.draw(SyntheticStars("gaia-xp"), 2, 0)
    blue, red = (script.within(stars, half) for half in script.XP_HALVES)
    assert blue["wavelength"][0].tolist() == list(range(3360, 6400, 20))
    assert red["wavelength"][0].tolist() == list(range(6400, 10_220, 20))
    assert blue["flux"].shape == blue["mask"].shape == (2, 152)
    np.testing.assert_array_equal(script.within(stars, (0, 5000), "clean")["flux"], stars["clean"][:, :82])


def test_errors_are_relative_to_the_flux_that_is_asked_for_and_leave_out_bad_pixels(script):
    truth = {"flux": np.array([[2.0, 2, 2, 99], [4, 4, 4, 4]]), "mask": np.array([[0, 0, 0, 1], [0, 0, 0, 0]], bool)}
    answer = np.array([[2.2, 1.8, 2.2, 0], [4, 4, 4, 4]])
    figures = script.errors(answer, truth)
    assert figures["rms"] == pytest.approx(0.1 * np.sqrt(3 / 7))
    assert figures["median_star_rms"] == pytest.approx(0.05)


def test_a_quadratic_function_is_fitted_exactly(script):
    x = np.random.default_rng(0).normal(3, 2, (200, 3))
    y = np.stack([1 + x[:, 0] - x[:, 1] * x[:, 2], x[:, 2] ** 2], axis=1)
    np.testing.assert_allclose(script.Quadratic(x, y)(x[:5]), y[:5], atol=1e-9)
    mixed = x @ np.random.default_rng(1).normal(size=(3, 6))
    np.testing.assert_allclose(script.Quadratic(mixed, y, n_components=3)(mixed[:5]), y[:5], atol=1e-9)
    assert np.abs(script.Quadratic(x, y, n_components=1)(x) - y).max() > 1


def test_bad_arguments_are_one_line(script, checkpoint, tmp_path, capsys):
    assert script.main([str(checkpoint), "--output", str(tmp_path), "--stars", "3"]) == 2
    assert capsys.readouterr().err == "evaluate_generation.py: stars: expected at least 10, got 3\n"
