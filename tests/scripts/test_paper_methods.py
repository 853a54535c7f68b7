"""Networks that see synthetic stars first: what each stage sees, and that nothing outside the window is looked at."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from spectrafm_hf.checkpoints import bundled, load_checkpoint
from spectrafm_hf.data.synthetic import SyntheticStars
from spectrafm_hf.instruments import Instrument


sys.path.append(str(Path(__file__).parents[2] / "scripts"))  # last, as one has the name of a library, evaluate
import paper_methods as methods


WINDOW, BLUE = (6400.0, 10200.0), (3360.0, 6399.0)


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """What the methods ask of a task, with synthetic stars in the place of observed ones."""

    stars: dict
    window: tuple = WINDOW
    stage_2: tuple | None = None
    by_depth: bool = False

    def instrument(self):
        return Instrument.load("gaia-xp")

    def read(self, split):
        return self.stars

    def parts(self, split, draw):
        hundred = {name: column[:100] for name, column in self.stars.items()}
        return methods.Parts(hundred, self.stars, hundred, self.stars)


@pytest.fixture(scope="module")
def stars() -> dict:
    columns = SyntheticStars("gaia-xp").draw(400, np.random.default_rng(3))
    columns["ak_targ"] = np.full(400, 0.1)
    names = [*methods.PIXELS, *methods.LABELS, "alpha_m", "alpha_m_err", "ak_targ"]
    return {name: columns[name] for name in [*names, *(f"{label}_err" for label in methods.LABELS)]}


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(methods, "POOL", 500)


def fit_predict(method, task, settings):
    return method.fit_predict(task, settings, task.parts("test", 0), 0)


def test_patches_of_a_window_start_where_they_do_in_a_whole_spectrum(stars):
    cut = methods.within(stars, WINDOW, 86)
    assert cut["flux"].shape == (400, 343 - 86)
    np.testing.assert_array_equal(cut["wavelength"][0], stars["wavelength"][0, 86:])
    seen = ~cut["mask"][0]
    assert cut["wavelength"][0][seen].min() == 6400 and cut["wavelength"][0][~seen].max() == 6380


def test_spectra_of_the_other_methods_are_the_same_pixels_over_their_median(stars):
    given = methods.spectra(stars, WINDOW, ["fe_h"])
    assert given.flux.shape == (400, 191)
    np.testing.assert_allclose(np.median(given.flux, axis=1), 1, rtol=1e-6)


@pytest.mark.parametrize("stage_3", ["calibrated", "alone", "everything"])
def test_pixels_outside_the_window_change_no_answer(stars, few, stage_3):
    method = methods.SpectraFM("", stage_2=False, stage_3=stage_3)
    other = {name: column.copy() for name, column in stars.items()}
    other["flux"][:, stars["wavelength"][0] < 6400] *= 3.0
    settings = {"max_steps": 2, "per_device_train_batch_size": 16}
    values, errors = fit_predict(method, Task(stars), settings)
    again, _ = fit_predict(method, Task(other), settings)
    np.testing.assert_allclose(values, again, atol=1e-5)
    assert np.isfinite(values).all() and (errors > 0).all()


def test_the_second_stage_sees_its_range_of_the_observed_stars(stars, few, monkeypatch):
    seen = []
    monkeypatch.setattr(methods, "fit", lambda recipe, arguments, *rest: seen.append(rest[:2]) or "folder")
    methods.second_stage.cache_clear()
    methods.second_stage(Path(bundled(methods.STAGE_1)), Task(stars, stage_2=BLUE), True)
    mixture, held_out = seen[0]
    observed = mixture.sources[0].draw(10, np.random.default_rng(0))
    for part in (observed, held_out):
        assert part["wavelength"][~part["mask"]].max() < 6400
    whole = mixture.sources[1].draw(10, np.random.default_rng(0))
    assert whole["wavelength"][~whole["mask"]].max() == 10200
    methods.second_stage.cache_clear()


def test_without_stage_1_the_model_has_the_measured_whitening_and_has_learned_nothing():
    trained, fresh = (load_checkpoint(str(path))[0] for path in (bundled(methods.STAGE_1), methods.untrained()))
    before, after = dict(trained.named_parameters()), dict(fresh.named_parameters())
    assert before.keys() == after.keys()
    assert not torch.equal(before["readout.mean.weight"], after["readout.mean.weight"])
    embeddings = [model.model.embeddings.patch_embedding for model in (trained, fresh)]
    assert torch.equal(embeddings[0].whitening, embeddings[1].whitening)


def test_a_whitened_checkpoint_sees_pixels_that_are_not_correlated(stars, tmp_path):
    cut = methods.within(stars, WINDOW, 86)
    methods.whitened(Path(bundled(methods.STAGE_1)), cut, tmp_path / "model")
    model, tokenizer = load_checkpoint(str(tmp_path / "model"))
    tokens = tokenizer(*(cut[name] for name in methods.PIXELS), requests=["fe_h"])
    embedding = model.model.embeddings.patch_embedding
    flux = torch.where(tokens["pixel_mask"], embedding.compress(tokens["flux"]), 0.0)
    white = embedding.whiten(flux, tokens["wavelength"][:1])
    spread = torch.linalg.eigvalsh(torch.cov(white[:, 1].T))
    # No direction is larger than one; those above the noise are one.
    assert spread[-1] < 1.05 and (spread > 0.5).sum() > 3


@pytest.mark.parametrize("calibrated", [False, True])
def test_the_mlp_learns_from_synthetic_stars(stars, few, calibrated):
    settings = {"pretraining": 100} | ({} if calibrated else {"epochs": 2})
    values, errors = fit_predict(methods.PretrainedMLP("", calibrated), Task(stars), settings)
    assert np.corrcoef(values, stars["fe_h"])[0, 1] > 0.3  # by chance 0.05
    assert np.isfinite(errors).all()
