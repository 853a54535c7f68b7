# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""The bundled `spectrafm-base`: predictions do not depend on the grid or on missing pixels, and errors are right."""

from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from scipy.ndimage import gaussian_filter1d
from transformers import pipeline

import spectrafm_hf
from spectrafm_hf import SpectraFMForPrediction, bundled, load_checkpoint
from spectrafm_hf.inference.prediction import NO_ANSWER, answered_labels, batches_of, predict_batches
from spectrafm_hf.statistics import robust_scatter
from spectrafm_hf.synthesis.synthetic import SyntheticStars, load_emulator


NETWORK = ["teff", "logg", "fe_h", "alpha_m"]


@pytest.fixture(scope="module")
def base():
    return load_checkpoint("spectrafm-base")


@pytest.fixture(scope="module")
def xp():
    table = pq.read_table(Path(spectrafm_hf.__file__).parent / "resources/gaia_xp_demo.parquet")
    rows = table.to_pylist()
    for row in rows:
        for name in ("wavelength", "flux", "flux_error", "mask"):
            row[name] = np.array(row[name])
    return rows


@pytest.fixture(scope="module")
def h_band():
    ranges = {"teff": (4200.0, 5800.0), "fe_h": (-0.8, 0.5)}
    return list(islice(SyntheticStars("apogee", seed=8, label_ranges=ranges), 40))


@pytest.fixture(scope="module")
def optical():
    ranges = {"teff": (4300.0, 6500.0), "fe_h": (-1.0, 0.5)}
    stars = islice(SyntheticStars("lamost-lrs", seed=8, label_ranges=ranges), 40)
    return [{**star, "resolving_power": 1_800.0} for star in stars]


def predict(base, rows, names=NETWORK):
    model, tokenizer = base
    parts = list(predict_batches(model, tokenizer, batches_of(rows, tokenizer), names))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def changed(rows, change, seed=0):
    """Rows with other spectra: `change` of wavelength, flux, error, mask and a generator."""
    generator = np.random.default_rng(seed)
    names = ("wavelength", "flux", "flux_error", "mask")
    spectra = [change(*(row[name] for name in names), generator) for row in rows]
    return [{**row, **dict(zip(names, spectrum, strict=True))} for row, spectrum in zip(rows, spectra, strict=True)]


def masked(share):
    return lambda w, f, e, m, g: (w, np.where((chosen := g.random(len(w)) < share), 1e3 * f, f), e, m | chosen)


def absent(w, f, e, m, g):
    kept = np.sort(g.permutation(len(w))[5:])
    return w[kept], f[kept], e[kept], m[kept]


def in_twos(w, f, e, m, g):
    n = len(w) // 2 * 2
    two = lambda x: x[:n].reshape(-1, 2).mean(axis=1)  # noqa: E731
    return two(w), two(f), two(e), m[:n].reshape(-1, 2).any(axis=1)


def test_observed_stars_of_gaia_xp_get_labels_with_right_errors(base, xp):
    found = predict(base, xp)
    for name, most in (("teff", 90.0), ("logg", 0.25), ("fe_h", 0.16)):
        truth = np.array([row[name] for row in xp], float)
        cool = np.array([3500 < row["teff"] < 6500 for row in xp]) & np.isfinite(truth)
        residual = (found[name] - truth)[cool]
        assert robust_scatter(residual) < most
        assert 0.6 < robust_scatter(residual / found[f"{name}_err"][cool]) < 1.6
    assert np.mean(found["flags"] == "") > 0.9


@pytest.mark.parametrize(
    ("change", "most"),
    [(masked(0.01), 0.35), (masked(0.1), 0.7), (absent, 0.35), (in_twos, 0.7)],
    ids=["1 % masked", "10 % masked", "five absent", "rebinned"],
)
def test_another_grid_and_missing_pixels_change_answers_by_less_than_their_errors(base, xp, change, most):
    whole, other = predict(base, xp), predict(base, changed(xp, change))
    for name in NETWORK:
        moved = (other[name] - whole[name]) / whole[f"{name}_err"]
        assert robust_scatter(moved) < most, name
    assert (other["reason"] == "").all()


def test_h_band_predictions_are_noise_limited_with_all_abundances(base, h_band):
    model, tokenizer = base
    names = answered_labels(model, tokenizer, h_band[0])
    assert {"mg_fe", "ni_fe", "vmicro", "alpha_m"} <= set(names)
    found = predict(base, h_band, names)
    known = [name for name in names if name in h_band[0]]
    off = [(found[name] - np.array([row[name] for row in h_band])) / found[f"{name}_err"] for name in known]
    assert len(known) >= 10 and 0.85 < robust_scatter(np.concatenate(off)) < 1.2
    assert np.median(found["teff_err"]) < 25 and np.median(found["logg_err"]) < 0.04
    assert np.mean(found["flags"] == "") > 0.9


def test_detectors_alone_and_flux_that_is_not_normalised_agree_with_the_whole(base, h_band):
    whole = predict(base, h_band)
    for change in (
        lambda w, f, e, m, g: (w, f, e, m | (w > 15_900)),
        lambda w, f, e, m, g: (w, 3e-14 * f * (w / 16_000), 3e-14 * e * (w / 16_000), m),
    ):
        rows = [{**row, "normalised": None} for row in changed(h_band, change)]
        other = predict(base, rows)
        for name in NETWORK:
            sigma = np.hypot(other[f"{name}_err"], whole[f"{name}_err"])
            assert robust_scatter((other[name] - whole[name]) / sigma) < 1.2, name


def test_labels_that_a_spectrum_does_not_constrain_are_empty_with_a_reason(base, xp):
    model, tokenizer = base
    assert answered_labels(model, tokenizer, xp[0]) == NETWORK
    found = predict(base, xp[:3], ["teff", "mg_fe"])
    assert np.isfinite(found["teff"]).all() and np.isnan(found["mg_fe"]).all()
    assert found["reason"].tolist() == [f"{NO_ANSWER}: mg_fe"] * 3


def test_wavelengths_that_are_not_finite_give_no_warning(base):
    for wavelength in (np.zeros(50), np.full(50, np.nan), np.full(50, 5000.0)):
        row = {"wavelength": wavelength, "flux": np.ones(50), "flux_error": np.ones(50), "mask": np.zeros(50, bool)}
        assert answered_labels(*base, row) == NETWORK


def test_a_prism_spectrum_far_into_the_infrared_is_not_taken_for_gaia(base, xp):
    far = np.arange(10_250.0, 25_500.0, 50.0)
    rows = [
        {
            **row,
            "wavelength": np.concatenate([row["wavelength"], far]),
            "flux": np.concatenate([row["flux"], row["flux"][-1] * (far[0] / far) ** 3]),
            "flux_error": np.concatenate([row["flux_error"], np.full(len(far), row["flux_error"][-1])]),
            "mask": np.concatenate([row["mask"], np.zeros(len(far), bool)]),
        }
        for row in xp[:20]
    ]
    flags, known = (predict(base, stars)["flags"] for stars in (rows, xp[:20]))
    assert all("unlike_training" in flag for flag in flags)
    assert sum("unlike_training" in flag for flag in known) <= 1


def test_noise_is_flagged_as_unlike_a_star(base, xp):
    noise = changed(xp, lambda w, f, e, m, g: (w, np.abs(g.normal(1.0, 0.3, len(w))).astype("f4"), e, m))
    assert np.mean([bool(flags) for flags in predict(base, noise)["flags"]]) > 0.95


def test_telluric_bands_are_not_used_in_the_optical(base, optical):
    def absorbed(w, f, e, m, g):
        bands = ((6_868, 6_960), (7_165, 7_345), (7_594, 7_715), (8_120, 8_370), (8_930, 9_860))
        inside = np.any([(w > low) & (w < high) for low, high in bands], axis=0)
        return w, np.where(inside, 0.6 * f, f), e, m

    whole, other = predict(base, optical), predict(base, changed(optical, absorbed))
    for name in NETWORK:
        assert np.abs(other[name] - whole[name]).max() < 0.05 * np.median(whole[f"{name}_err"]), name


def test_a_resolving_power_that_is_wrong_by_a_fifth_moves_answers_within_their_errors(base, optical):
    right = predict(base, optical)
    for power in (1_500.0, 2_150.0):
        wrong = predict(base, [{**row, "resolving_power": power} for row in optical])
        for name in NETWORK[:3]:
            assert np.median(np.abs(wrong[name] - right[name]) / right[f"{name}_err"]) < 0.7, name


def test_optical_spectra_without_stellar_lines_are_flagged_and_stars_are_not(base, optical):
    found = predict(base, optical)["flags"]
    assert np.mean(["edge" in flags or "unlike_training" in flags for flags in found]) < 0.05
    generator = np.random.default_rng(0)
    wavelength = 10.0 ** np.arange(np.log10(3_700.0), np.log10(9_090.0), 1e-4)
    waves = [1.0 + 0.1 * np.sin(wavelength / period) for period in (30.0, 100.0, 300.0, 1_000.0)]
    lines = [4_341.7, 4_862.7, 6_564.6]
    dwarfs = [1.0 - sum(0.5 / (1.0 + ((wavelength - line) / width) ** 2) for line in lines) for width in (20.0, 50.0)]
    strange = [
        {
            "object_id": str(i),
            "wavelength": wavelength,
            "flux": (flux + 0.02 * generator.standard_normal(len(wavelength))).astype(np.float32),
            "flux_error": np.full(len(wavelength), 0.02, np.float32),
            "mask": np.zeros(len(wavelength), bool),
            "resolving_power": 1_800.0,
        }
        for i, flux in enumerate([np.ones(len(wavelength)), *waves, *dwarfs])
    ]
    assert all("edge" in flags or "unlike_training" in flags for flags in predict(base, strange)["flags"])


def test_halves_of_two_stars_disagree_and_those_of_one_do_not(base, optical):
    order = np.argsort([row["teff"] for row in optical])
    cool, hot = ([optical[i] for i in part] for part in (order[:12], order[-12:]))
    # The flux is over its median.
    both = [
        {**one, **{name: np.where(one["wavelength"] < 5_400.0, one[name], other[name]) for name in ("flux", "mask")}}
        for one, other in zip(cool, hot, strict=True)
    ]
    one, two = ([("disagree" in flags) for flags in predict(base, rows)["flags"]] for rows in (optical, both))
    assert sum(one) <= 1 and np.mean(two) > 0.6
    # A window that no two parts can be made of is not asked.
    window = changed(both, lambda w, f, e, m, g: (w, f, e, m | (w < 5_300.0) | (w > 5_480.0)))
    assert not any("disagree" in flags for flags in predict(base, window)["flags"])
    lone = changed(both, lambda w, f, e, m, g: (w, f, e, m | (w < 5_200.0) | (w > 5_300.0)))
    assert not any("disagree" in flags for flags in predict(base, lone)["flags"])


def test_predictions_of_sharp_and_smoothed_optical_spectra_agree(base):
    wavelength = np.exp(np.arange(np.log(4_500.0), np.log(6_800.0), 1.0 / 20_000.0 / 2.5))
    emulator = load_emulator("emulator-optical").eval()
    labels = {name: np.full(12, 0.0) for name in emulator.config.label_names}
    labels |= {"teff": np.linspace(4_600, 6_300, 12), "logg": np.linspace(2.0, 4.4, 12), "fe_h": np.full(12, -0.3)}
    labels |= {"vmicro": np.full(12, 1.4), "li_fe": np.full(12, -1.2)}
    native, flux = emulator.synthesize(normalized=True, **labels)
    native, generator = np.asarray(native), np.random.default_rng(0)
    step = np.median(np.diff(np.log(native)))

    def seen(power, wild):
        rows = []
        for star in np.asarray(flux, float):
            smooth = gaussian_filter1d(star, 1.0 / power / 2.3548 / step)
            values = np.interp(wavelength, native, smooth) + 0.01 * generator.standard_normal(len(wavelength))
            values[generator.random(len(wavelength)) < wild] = 5.0
            columns = {"wavelength": wavelength, "flux": values.astype(np.float32)}
            columns |= {
                "flux_error": np.full(len(wavelength), 0.01, np.float32),
                "mask": np.zeros(len(wavelength), bool),
            }
            rows.append({"object_id": "a", "resolving_power": power, **columns})
        return predict(base, rows)

    smooth, sharp, spoilt = seen(2_200.0, 0.0), seen(20_000.0, 0.0), seen(20_000.0, 2e-3)
    for name in NETWORK[:3]:
        for other, most in ((sharp, 0.7), (spoilt, 1.0)):
            z = np.abs(other[name] - smooth[name]) / np.hypot(other[f"{name}_err"], smooth[f"{name}_err"])
            assert np.median(z) < most, name


def test_the_pipeline_predicts_both_instruments(xp, h_band):
    labels = pipeline("stellar-labels", model=bundled("spectrafm-base"))
    names = ("wavelength", "flux", "flux_error", "mask")
    of_xp, of_h = (labels(tuple(row[name] for name in names), flags=True) for row in (xp[0], h_band[0]))
    assert list(of_xp) == [*(key for name in NETWORK for key in (name, f"{name}_err")), "flags"]
    assert "vmicro" in of_h and abs(of_h["teff"] - h_band[0]["teff"]) < 5 * of_h["teff_err"]


def test_a_batch_of_refused_spectra_gives_only_reasons(base, xp):
    refused = [{**row, "refused": "object_class: expected a star, got QSO"} for row in xp[:3]]
    found = predict(base, refused)
    assert set(found["reason"]) == {"object_class: expected a star, got QSO"} and np.isnan(found["teff"]).all()


@pytest.mark.parametrize("how", ["bfloat16", "float16", "autocast", "converted"])
def test_half_precision_changes_answers_by_less_than_a_tenth_of_their_errors(base, xp, h_band, how):
    model, tokenizer = base
    half = model
    if how in ("bfloat16", "float16"):
        half = SpectraFMForPrediction.from_pretrained(bundled("spectrafm-base"), dtype=getattr(torch, how)).eval()
    elif how == "converted":
        half = SpectraFMForPrediction.from_pretrained(bundled("spectrafm-base")).eval().to(torch.bfloat16)
    for rows, names in ((xp, NETWORK), (h_band, [*NETWORK, "mg_fe", "o_fe"])):
        inputs = tokenizer(rows, requests=names)
        with torch.no_grad():
            expected = model(**inputs)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
                got = half(**inputs)
        assert not torch.equal(got.predictions, expected.predictions)
        assert ((got.predictions - expected.predictions) / expected.prediction_errors).abs().max() < 0.1
        assert (got.prediction_errors / expected.prediction_errors - 1.0).abs().max() < 0.05
