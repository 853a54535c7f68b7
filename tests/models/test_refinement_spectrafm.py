# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""The fit that refines predictions, against the emulator and the Cramer-Rao bound; and its flags."""

import copy

import numpy as np
import pytest
import torch
from transformers import pipeline

from spectrafm_hf.checkpoints import save_checkpoint
from spectrafm_hf.models import SpectraFMConfig, SpectraFMForPrediction, SpectraFMTokenizer
from spectrafm_hf.models.basis_spectrafm import SpectrumBasis
from spectrafm_hf.models.flags_spectrafm import FLAGS, QUALITY, star_flags
from spectrafm_hf.models.gate_spectrafm import SPEED_OF_LIGHT, air_to_vacuum
from spectrafm_hf.statistics import robust_scatter
from spectrafm_hf.synthesis.bases import fill_star_model, hband_rung
from spectrafm_hf.synthesis.bounds import cramer_rao, held_out_labels, observe, pixel_errors
from spectrafm_hf.synthesis.instruments import Instrument
from spectrafm_hf.synthesis.synthetic import ALPHA_ELEMENTS, SyntheticStars


N_STARS = 64
START = np.r_[40.0, 0.08, 0.03, np.full(11, 0.06)]  # how far from the truth fits begin


class Stars:
    """Held-out stars as APOGEE sees them, and a model with a star model for them."""

    def __init__(self):
        self.basis = SpectrumBasis([hband_rung(0)])
        source = SyntheticStars("apogee-apstar")
        self.emulator = source._stars.emulator
        emulated = self.emulator.config
        config = SpectraFMConfig(
            token_embedding="basis",
            num_intervals=self.basis.n_intervals,
            num_coefficients=self.basis.n_coefficients,
            rung_intervals=[[0, self.basis.n_intervals]],
            rung_components=[16],
            num_members=2,
            hidden_size=32,
            encoder_ffn_dim=[32],
            label_names=["teff", "logg", "fe_h", "alpha_m", "mg_fe"],
            label_units=["K", "dex", "dex", "dex", "dex"],
            label_centers=[4700.0, 2.5, -0.2, 0.05, 0.05],
            label_scales=[550.0, 1.3, 0.3, 0.1, 0.1],
            network_labels=["teff", "logg", "fe_h", "alpha_m"],
            star_labels=list(emulated.label_names),
            star_combinations={"alpha_m": list(ALPHA_ELEMENTS)},
            star_components=list(emulated.component_groups),
            star_intervals=[0, self.basis.n_intervals],
            num_stars=emulated.num_stars,
        )
        torch.manual_seed(0)
        self.model = SpectraFMForPrediction(config).eval()
        self.star_model = self.model.refinement.star_model
        fill_star_model(self.star_model, self.basis.rungs[0], source)
        self.tokenizer = SpectraFMTokenizer(config.label_names, basis=self.basis)
        self.instrument = Instrument.load("apogee")
        self.wavelength = self.instrument.wavelength
        self.truth = held_out_labels(self.emulator, N_STARS, 3, {"teff": (4000.0, 6000.0), "fe_h": (-1.0, 1.0)})
        observed = observe(self.instrument, self.emulator, self.truth, np.random.default_rng(0))
        self.clean, self.jacobian, self.prior = observed.flux, observed.jacobian, observed.prior

    def noisy(self, snr):
        error = pixel_errors(self.instrument, self.clean, snr)
        return self.clean + error * np.random.default_rng(1).standard_normal(self.clean.shape, np.float32), error

    def bound(self, error):
        covariance = cramer_rao(self.jacobian, error.astype(float) ** -2.0, self.prior)
        return np.sqrt(np.diagonal(covariance, axis1=1, axis2=2))

    def fit(self, flux, error, mask=None, wavelength=None):
        weight = np.where(False if mask is None else mask, 0.0, error.astype(float) ** -2.0)
        found = self.basis.evidence(self.wavelength if wavelength is None else wavelength, flux, weight)
        start = self.truth + START * np.random.default_rng(2).standard_normal(self.truth.shape)
        tensors = (found.estimate, found.information, found.pull, found.intervals)
        return self.model.refinement(
            self.star_model.standardise(torch.from_numpy(start)),
            *map(torch.from_numpy, tensors),
            torch.from_numpy(found.reliability[..., 0] > 0).any(dim=1),
            torch.from_numpy(found.misfit),
        )

    def answer(self, flux, error, wavelength=None, start_at_truth=True):
        """Answers and flags of the whole model, whose first estimate is as far from the truth as in `fit`."""
        inputs = self.tokenizer(
            np.broadcast_to(self.wavelength if wavelength is None else wavelength, flux.shape),
            flux,
            error,
            return_quality=True,
        )
        quality = {name: inputs.pop(name) for name in QUALITY}
        start = self.truth + START * np.random.default_rng(2).standard_normal(self.truth.shape)
        wanted = self.star_model.standardise(torch.from_numpy(start))
        handle = self.model.start.register_forward_hook(lambda module, args, output: wanted[:, None])
        with torch.no_grad():
            outputs = self.model(**inputs)
        handle.remove()
        return outputs, star_flags(self.model, inputs, outputs, quality, list(self.model.config.label_names))


@pytest.fixture(scope="module")
def stars():
    return Stars()


def errors_of(found):
    return torch.sqrt(found.covariance.diagonal(dim1=1, dim2=2)).numpy()


def test_derivatives_of_the_star_model_are_those_of_its_weights(stars):
    labels = stars.star_model.standardise(torch.from_numpy(stars.truth[:8]))
    slopes = stars.star_model.slopes(labels)
    step = 1e-2
    for label in range(labels.shape[1]):
        moved = torch.zeros_like(labels)
        moved[:, label] = step
        difference = stars.star_model.weights(labels + moved) - stars.star_model.weights(labels - moved)
        expected = difference[:, :-1] / (2 * step)
        assert torch.allclose(slopes[:, label], expected, atol=2e-2 * float(expected.abs().max()))


def test_the_cache_of_the_star_model_is_renewed(stars):
    star = copy.deepcopy(stars.star_model)
    labels = star.standardise(torch.from_numpy(stars.truth[:4]))
    before = star.weights(labels)
    with torch.inference_mode():
        assert star.weights(labels).equal(before)
    with torch.no_grad():
        star.groups[0].weight.mul_(2.0)
    size = star.groups[0].weight.shape[1]
    after = star.weights(labels)
    assert torch.allclose(after[:, :size], 2.0 * before[:, :size], rtol=1e-4)
    assert after[:, size:].equal(before[:, size:])


def test_physical_labels_come_back(stars):
    labels = torch.from_numpy(stars.truth)
    back, slope = stars.star_model.physical(stars.star_model.standardise(labels))
    assert torch.allclose(back, labels.float(), rtol=1e-4, atol=1e-4)
    assert (slope[:, 0] < 0).all() and (slope[:, 1:] > 0).all()


def test_without_noise_the_labels_of_the_emulator_are_found(stars):
    found = stars.fit(stars.clean, np.full_like(stars.clean, 1e-3))
    off = np.abs(found.labels.numpy() - stars.truth)
    assert np.median(off[:, 0]) < 2.0 and np.median(off[:, 1]) < 5e-3 and np.median(off[:, 2]) < 2e-3


@pytest.mark.parametrize("snr", [50, 200])
def test_answers_are_as_good_as_the_spectra_and_their_errors_right(stars, snr):
    flux, error = stars.noisy(snr)
    found = stars.fit(flux, error)
    assert found.converged.float().mean() > 0.9
    sigma = errors_of(found)
    assert (np.median(sigma / stars.bound(error)[:, :14], axis=0) < 1.2).all()
    assert 0.85 < robust_scatter(((found.labels.numpy() - stars.truth) / sigma).ravel()) < 1.15


def test_masked_pixels_cost_what_they_held_and_no_more(stars):
    flux, error = stars.noisy(100)
    mask = np.random.default_rng(5).random(flux.shape) < 0.3
    flux[mask] = 7.0
    found = stars.fit(flux, error, mask)
    sigma = errors_of(found)
    bound = stars.bound(np.where(mask, 1e6, error))[:, :14]
    assert (np.median(sigma / bound, axis=0) < 1.2).all()
    assert 0.85 < robust_scatter(((found.labels.numpy() - stars.truth) / sigma).ravel()) < 1.15


def test_errors_that_are_too_small_are_noticed(stars):
    flux, error = stars.noisy(100)
    right, wrong = stars.fit(flux, error), stars.fit(flux, error / 2)
    assert (right.error_factor < 1.2).all() and (wrong.error_factor > 1.8).all()
    assert np.allclose(np.median(errors_of(wrong) / errors_of(right), axis=0), 1.0, atol=0.1)


def test_a_residual_velocity_is_found_and_does_no_harm(stars):
    flux, error = stars.noisy(100)
    found = stars.fit(flux, error, wavelength=stars.wavelength * (1 + 1.0 / SPEED_OF_LIGHT))
    assert abs(float(found.velocity.median()) - 1.0) < 0.05
    assert robust_scatter(((found.labels.numpy() - stars.truth) / errors_of(found)).ravel()) < 1.2


def test_stars_that_differ_from_the_model_get_larger_errors(stars):
    flux, error = stars.noisy(300)
    lines = 1.0 + 0.15 * np.random.default_rng(6).standard_normal((N_STARS, 60)).astype(np.float32)
    depth = np.repeat(lines, -(-flux.shape[1] // 60), axis=1)[:, : flux.shape[1]]
    strange = stars.fit(1.0 - depth * (1.0 - flux), error)
    same = stars.fit(flux, error)
    assert np.median(strange.mismatch) > 0.1 > 3 * np.median(same.mismatch)
    assert np.median(errors_of(strange) / errors_of(same)) > 2.0
    assert robust_scatter(((strange.labels.numpy() - stars.truth) / errors_of(strange)).ravel()) < 1.6


def test_the_model_predicts_the_fit_and_derived_labels(stars):
    flux, error = stars.noisy(100)
    outputs, flags = stars.answer(flux, error)
    found = outputs.refined
    known = found.converged.numpy()
    assert known.mean() > 0.9
    names = list(stars.model.config.star_labels)
    alpha = [names.index(name) for name in ALPHA_ELEMENTS]
    expected = np.stack(
        [found.labels[:, 0], found.labels[:, 1], found.labels[:, 2], found.labels[:, alpha].mean(dim=1)], axis=1
    )
    assert np.allclose(outputs.predictions[known][:, :4], expected[known], rtol=1e-4, atol=1e-3)
    total = found.covariance[:, alpha][:, :, alpha].sum(dim=(1, 2)).sqrt() / len(alpha)
    assert np.allclose(outputs.prediction_errors[known][:, 3], total[known], rtol=1e-3)
    assert np.mean([bool(flag) for flag in flags]) < 0.1


@pytest.mark.parametrize(
    ("flag", "wavelength"),
    [
        ("velocity", lambda wavelength: wavelength / (1 + 30.0 / SPEED_OF_LIGHT)),
        ("velocity", lambda wavelength: wavelength / (1 - 60.0 / SPEED_OF_LIGHT)),
        ("medium", lambda wavelength: wavelength - (air_to_vacuum(wavelength) - wavelength)),
    ],
)
def test_lines_that_are_not_at_rest_are_flagged(stars, flag, wavelength):
    flux, error = stars.noisy(100)
    _, flags = stars.answer(flux, error, wavelength(stars.wavelength))
    assert np.mean([flag in star for star in flags]) > 0.95


def test_wild_pixels_and_other_things_than_stars_are_flagged(stars):
    flux, error = stars.noisy(100)
    wild = np.random.default_rng(7).random(flux.shape) < 0.02
    _, flags = stars.answer(np.where(wild, 3.0, flux).astype(np.float32), error)
    assert np.mean(["bad_pixels" in star for star in flags]) > 0.95
    waves = (1.0 + 0.1 * np.sin(stars.wavelength / 3.0) * np.ones_like(flux)).astype(np.float32)
    _, flags = stars.answer(waves, error)
    assert np.mean([bool({"unlike_training", "bad_pixels", "other_errors"} & set(star)) for star in flags]) > 0.95


def test_labels_that_the_network_was_not_trained_for_are_nan(stars):
    """Without an interval of the star model, as in Gaia XP."""
    inputs = stars.tokenizer(stars.wavelength, *(array[0] for array in stars.noisy(100)))
    outside = {name: inputs[name] for name in ("coefficients", "reliability", "interval_ids", "attention_mask")}
    with torch.no_grad():
        values = stars.model(**outside).predictions[0]
    assert torch.isfinite(values[:4]).all() and torch.isnan(values[4])


def test_the_fit_stays_in_full_precision(stars, tmp_path):
    stars.model.save_pretrained(tmp_path)
    half = SpectraFMForPrediction.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.model.rungs[0].blocks[0].fc1.weight.dtype == torch.bfloat16
    assert half.means[0].weight.dtype == torch.float32
    assert half.to(torch.bfloat16).refinement.star_model.components.dtype == torch.float32


def test_every_flag_has_a_meaning_and_an_action():
    assert all(len(text) == 2 and all(part.endswith((".", "?")) for part in text) for text in FLAGS.values())


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_pipeline_returns_flags_and_only_requested_labels(stars, batch_size, tmp_path):
    save_checkpoint(stars.model, stars.tokenizer, tmp_path / "checkpoint")
    predict = pipeline("stellar-labels", model=str(tmp_path / "checkpoint"))
    flux, error = (array[:3] for array in stars.noisy(100))
    moved = stars.wavelength / (1 + 30.0 / SPEED_OF_LIGHT)
    spectra = [(stars.wavelength, flux[0], error[0]), (moved, flux[1], error[1]), (stars.wavelength, flux[2], error[2])]
    answers = predict(spectra, flags=True, batch_size=batch_size)
    assert "velocity" in answers[1]["flags"]
    assert not {"velocity", "medium", "bad_pixels"} & {*answers[0]["flags"], *answers[2]["flags"]}
    assert all("flags" not in star for star in predict(spectra[:1]))


def test_flags_are_only_there_where_there_is_evidence(tiny_model, tiny_tokenizer):
    predict = pipeline("stellar-labels", model=tiny_model, tokenizer=tiny_tokenizer, device="cpu")
    with pytest.raises(ValueError, match="flags: expected a model on evidence"):
        predict((np.arange(5000.0, 5100.0, 2.0), np.ones(50)), flags=True)
