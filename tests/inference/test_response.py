"""Derivatives of predictions by the flux of each pixel, against finite differences from flux to label."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

import spectrafm_hf
from spectrafm_hf import load_checkpoint
from spectrafm_hf.data.readers import read_spectra
from spectrafm_hf.inference.prediction import schema_tokenizer, tokenize_rows
from spectrafm_hf.inference.response import pixel_responses
from spectrafm_hf.models.flags_spectrafm import QUALITY
from spectrafm_hf.synthesis.synthetic import SyntheticStars


DEMO_STARS = Path(spectrafm_hf.__file__).parent / "resources/gaia_xp_demo.parquet"


@pytest.fixture(scope="module")
def base():
    model, tokenizer = load_checkpoint("spectrafm-base")
    return model, schema_tokenizer(tokenizer)


def tokens(tokenizer, rows, names):
    ((inputs, members),) = tokenize_rows(tokenizer, rows, names, [""] * len(rows))
    assert members.tolist() == list(range(len(rows)))
    return {name: value for name, value in inputs.items() if name not in QUALITY}


def responses(base, rows, names):
    model, tokenizer = base
    (found,) = pixel_responses(model, tokenizer, rows, tokens(tokenizer, rows, names))
    return found


def answers(base, rows, names):
    model, tokenizer = base
    with torch.no_grad():
        return model(**tokens(tokenizer, rows, names)).predictions.double().numpy()


def by_differences(base, row, pixels, sigmas, names):
    """Derivatives (pixels, labels), from so much more and less in each pixel."""
    rows = []
    for pixel, sigma in zip(pixels, sigmas, strict=True):
        for step in (sigma, -sigma):
            flux = np.array(row["flux"], np.float64)
            flux[pixel] += step
            rows.append({**row, "flux": flux})
    model, tokenizer = base
    inputs = tokens(tokenizer, rows, names)
    # How well things are known counts as given.
    reliability = tokens(tokenizer, [row], names)["reliability"]
    with torch.no_grad():
        values = model(**{**inputs, "reliability": reliability.expand_as(inputs["reliability"])}).predictions
    found = values.double().numpy().reshape(len(pixels), 2, -1)
    return (found[:, 0] - found[:, 1]) / (2 * np.asarray(sigmas)[:, None])


def assert_near(base, row, names, within, step=1.0):
    """At the pixels that move each label most, and some others; as a share of what the first move it."""
    row = {**row, "flux": np.asarray(row["flux"], np.float64)}
    found = responses(base, [row], names)
    np.testing.assert_allclose(found.wavelength, row["wavelength"])
    np.testing.assert_allclose(found.values, answers(base, [row], names), rtol=1e-5)
    response, sigma = found.response[0], np.sqrt(found.variance[0])
    strongest = np.abs(response * sigma).argmax(axis=1)
    others = np.random.default_rng(0).choice(np.flatnonzero(sigma), 6, replace=False)
    pixels = np.unique([*strongest, *others])
    expected = by_differences(base, row, pixels, step * sigma[pixels], names)
    most = np.abs(response * sigma).max(axis=1)
    off = np.abs((response[:, pixels].T - expected) * sigma[pixels, None]) / most
    assert off.max() < within
    assert most.min() > 0


@pytest.mark.parametrize("part", ["optical", "H band"])
def test_the_response_of_a_network_is_its_finite_difference(tiny_evidence, stars, part):
    row = {**stars[1], "flux_error": np.full(57, 0.1)}  # as they scatter: none is clipped
    if part == "H band":
        wavelength = np.exp(np.log(15_000.0) + 2e-5 * np.arange(900))
        flux = 1.0 + 0.05 * np.sin(np.arange(900) / 11.0)
        row = {**row, "wavelength": wavelength, "flux": flux, "flux_error": np.full(900, 0.01)}
        row["mask"] = np.arange(900) % 17 == 5
    assert_near((tiny_evidence[0], schema_tokenizer(tiny_evidence[1])), row, ["teff", "logg", "fe_h"], 0.03, 0.5)


@pytest.mark.parametrize("star", [0, 20, 40])
def test_the_response_of_an_observed_star_is_its_finite_difference(base, star):
    row = list(read_spectra([DEMO_STARS]))[star]
    # The prior's pull changes with the level of an interval, which counts as given.
    assert_near(base, row, ["teff", "logg", "fe_h", "alpha_m"], 0.06)


def test_the_response_of_a_fit_is_its_finite_difference(base):
    """Of a fit that ends at the peak of the likelihood; its hyper-parameters count as given."""
    ranges = {"teff": (4200.0, 5800.0), "fe_h": (-0.8, 0.5)}
    for row in islice(SyntheticStars("apogee", seed=8, label_ranges=ranges), 2):
        assert_near(base, row, ["teff", "fe_h", "mg_fe", "al_fe", "ca_fe", "ni_fe", "alpha_m"], 0.06)


def test_errors_follow_from_the_response(base):
    """Of a fit with hardly a prior, the errors of the flux give those of the labels."""
    names = ["teff", "logg", "fe_h", "mg_fe"]
    ranges = {"teff": (4200.0, 5800.0), "fe_h": (-0.8, 0.5)}
    rows = list(islice(SyntheticStars("apogee", seed=8, label_ranges=ranges), 6))
    found = responses(base, rows, names)
    with torch.no_grad():
        errors = base[0](**tokens(base[1], rows, names)).prediction_errors.numpy()
    ratio = np.sqrt((found.response**2 * found.variance[:, None]).sum(axis=2)) / errors
    assert np.abs(np.median(ratio, axis=0) - 1).max() < 0.15
    shares = found.information()
    np.testing.assert_allclose(shares.sum(axis=2), 1.0)
    assert shares.min() >= 0


def test_pixels_that_do_not_count_have_no_response(base):
    row = dict(list(read_spectra([DEMO_STARS]))[3])
    row["mask"] = np.asarray(row["mask"]) | (np.arange(343) % 5 == 0)
    row["flux"] = np.array(row["flux"])
    row["flux"][101] *= 3.0  # which no star could have
    found = responses(base, [row], ["teff"])
    assert not found.response[0][:, row["mask"]].any() and not found.variance[0][row["mask"]].any()
    assert not found.valid[0][row["mask"]].any() and found.valid[0][101]
    assert found.variance[0][101] == 0 and found.variance[0][102] > 0


def test_derivatives_leave_no_gradients_in_the_model(base):
    """Predictions are the same with and without."""
    row = next(iter(SyntheticStars("apogee", seed=8)))
    inputs = tokens(base[1], [row], ["teff", "mg_fe"])
    with torch.no_grad():
        expected = base[0](**inputs)
    found = base[0](**{**inputs, "pull": inputs["pull"].clone().requires_grad_()})
    torch.testing.assert_close(found.predictions, expected.predictions, rtol=0, atol=0)
    assert expected.refined.slope is None and found.refined.slope.shape[:2] == (1, 14)
