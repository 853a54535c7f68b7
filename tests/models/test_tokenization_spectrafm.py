# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
import copy
import json

import astropy.units as u
import datasets
import numpy as np
import pytest
import torch
from astropy.nddata import InverseVariance, StdDevUncertainty, UnknownUncertainty, VarianceUncertainty
from astropy.table import MaskedColumn, Table
from astropy.utils.masked import Masked
from conftest import make_tiny_evidence
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from specutils import Spectrum
from specutils.utils.wcs_utils import vac_to_air

from spectrafm_hf.models import (
    SpectraFMConfig,
    SpectraFMForPrediction,
    SpectraFMTokenizer,
    air_to_vacuum,
    vacuum_to_air,
)


pytestmark = pytest.mark.filterwarnings("error")

#: Flux per wavelength: other densities are converted, which changes the numbers.
FLAM, MILLI = u.Unit("W m-2 nm-1"), u.Unit("mW m-2 nm-1")
LABELS = ["teff", "logg", "fe_h", "alpha_m"]


#: Of 4980 to 5142 Angstrom and of some of the H band.
BASIS = make_tiny_evidence()[1].basis


def raw_tokens(**kwargs) -> SpectraFMTokenizer:
    """Tokens that show each pixel as it is: no standardisation."""
    return SpectraFMTokenizer(**{"standardize_center": 0.0, "clip": None, **kwargs})


def evidence_tokens(**kwargs) -> SpectraFMTokenizer:
    """Tokens that depend on the errors."""
    return SpectraFMTokenizer(basis=BASIS, **kwargs)


#: What single precision, or another order of sums, may change.
CLOSE = {raw_tokens: {"rtol": 1e-6, "atol": 3e-6}, evidence_tokens: {"rtol": 1e-3, "atol": 1e-4}}
both_kinds = pytest.mark.parametrize("make", [raw_tokens, evidence_tokens])


def spectrum(n_stars=1, n_pixels=40, start=5000.0, step=1.0, seed=0):
    """Wavelength (n_pixels,), flux and error (n_stars, n_pixels)."""
    rng = np.random.default_rng(seed)
    flux = 1.0 + 0.1 * rng.standard_normal((n_stars, n_pixels))
    return start + step * np.arange(n_pixels), flux, rng.uniform(0.01, 0.1, flux.shape)


def same(first, second, **tolerance):
    """Two outputs of the tokenizer agree, by default bit by bit."""
    assert first.keys() == second.keys()
    for key in first:
        np.testing.assert_allclose(first[key], second[key], err_msg=key, **{"rtol": 0, "atol": 0, **tolerance})


# --------------------------------------------------------------------------------------------------------------- output


def test_shapes_types_and_names_are_those_of_the_model(tiny_model):
    wavelength, flux, error = spectrum(3, 40)
    inputs = SpectraFMTokenizer()(wavelength, flux, error, scalars={"teff": 5000.0}, requests=["logg", 5010])
    assert {key: (tuple(value.shape), value.dtype) for key, value in inputs.items()} == {
        "flux": ((3, 40), torch.float32),
        "wavelength": ((3, 40), torch.float32),
        "attention_mask": ((3, 40), torch.bool),
        "scalar_ids": ((3, 1), torch.int64),
        "scalar_values": ((3, 1), torch.float32),
        "request_ids": ((3, 2), torch.int64),
        "request_wavelength": ((3, 2), torch.float32),
        "flux_center": ((3, 2), torch.float32),
        "flux_scale": ((3, 2), torch.float32),
    }
    outputs = tiny_model(**inputs)
    assert outputs.predictions.shape == outputs.prediction_errors.shape == (3, 2)


@both_kinds
def test_numpy_output_equals_torch_output(make):
    arguments = spectrum(2)
    arrays, tensors = (make()(*arguments, return_tensors=kind) for kind in ("np", "pt"))
    assert all(isinstance(array, np.ndarray) for array in arrays.values())
    same(arrays, tensors)


def test_pixels_come_out_sorted():
    inputs = raw_tokens()([5003.0, 5000.0, 5001.0], [3.0, 1.0, 2.0], [0.3, 0.1, 0.2])
    assert inputs["wavelength"].tolist() == [[5000.0, 5001.0, 5003.0]]
    assert inputs["flux"].tolist() == [[1.0, 2.0, 3.0]]


def test_a_spectrum_of_one_pixel_is_one_token():
    inputs = raw_tokens()([5000.0], [1.5])
    assert inputs["wavelength"].tolist() == [[5000.0]] and inputs["flux"].tolist() == [[1.5]]


def test_padding_is_zero_and_false():
    inputs = raw_tokens()([[5000.0, 5001.0], [5000.0]], [[1.0, 2.0], [3.0]])
    assert inputs["attention_mask"].tolist() == [[True, True], [True, False]]
    assert inputs["flux"].tolist() == [[1.0, 2.0], [3.0, 0.0]]
    assert inputs["wavelength"].tolist() == [[5000.0, 5001.0], [5000.0, 0.0]]


def test_shared_wavelengths_give_the_same_tokens_as_single_spectra():
    wavelength, flux, error = spectrum(4, 50)
    mask = np.random.default_rng(1).random(flux.shape) < 0.3
    together = SpectraFMTokenizer()(wavelength, flux, error, mask, return_tensors="np")
    for star in range(4):
        alone = SpectraFMTokenizer()(wavelength, flux[star], error[star], mask[star], return_tensors="np")
        n = alone["flux"].shape[1]
        cut = {key: value[star : star + 1] for key, value in together.items()}
        assert n == 50 - mask[star].sum() and not np.any(cut["attention_mask"][:, n:])
        same({key: value if key == "request_ids" else value[:, :n] for key, value in cut.items()}, alone)


# ------------------------------------------------------------------------------------------------------ kinds of input

WAVELENGTH, FLUX, ERROR = spectrum(n_pixels=6)
FLUX, ERROR = FLUX[0], ERROR[0]
BAD = np.array([False, True, False, False, False, False])


def masked_array(values, dtype=float):
    return np.ma.MaskedArray(np.where(BAD, 777, values).astype(dtype), BAD)


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param((WAVELENGTH[None], FLUX[None], ERROR[None], BAD[None]), id="two dimensions"),
        pytest.param(([WAVELENGTH], [FLUX], [ERROR], [BAD]), id="list of arrays"),
        pytest.param((WAVELENGTH.tolist(), FLUX.tolist(), ERROR.tolist(), BAD.tolist()), id="lists"),
        pytest.param(tuple([x.tolist()] for x in (WAVELENGTH, FLUX, ERROR, BAD)), id="nested lists"),
        pytest.param(tuple(map(tuple, (WAVELENGTH, FLUX, ERROR, BAD))), id="tuples"),
        pytest.param(tuple(torch.tensor(x) for x in (WAVELENGTH, FLUX, ERROR, BAD)), id="tensors"),
        pytest.param(
            (torch.tensor(WAVELENGTH), torch.tensor(FLUX, requires_grad=True), torch.tensor(ERROR), torch.tensor(BAD)),
            id="tensor with gradient",
        ),
        pytest.param((WAVELENGTH.astype(">f8"), FLUX.astype(">f8"), ERROR.astype(">f8"), BAD), id="big-endian"),
        pytest.param((WAVELENGTH.astype(int), FLUX, ERROR, BAD), id="int wavelength"),
        pytest.param((WAVELENGTH, masked_array(FLUX), ERROR), id="masked flux"),
        pytest.param((WAVELENGTH, FLUX, masked_array(ERROR)), id="masked error"),
        pytest.param((WAVELENGTH, FLUX, ERROR, np.ma.MaskedArray(np.zeros(6, bool), BAD)), id="masked mask"),
        pytest.param((masked_array(WAVELENGTH, int), FLUX, ERROR, BAD), id="masked wavelength"),
        pytest.param((WAVELENGTH, FLUX, ERROR, 4 * BAD), id="bit mask"),
        pytest.param((WAVELENGTH, np.where(BAD, np.nan, FLUX), ERROR), id="NaN flux"),
        pytest.param((WAVELENGTH, np.where(BAD, np.inf, FLUX), ERROR), id="infinite flux"),
        pytest.param((WAVELENGTH, np.where(BAD, 1e300, FLUX), ERROR), id="flux beyond float32"),
        pytest.param(
            (WAVELENGTH, [None if b else f for f, b in zip(FLUX, BAD, strict=True)], ERROR), id="None in flux"
        ),
        pytest.param((WAVELENGTH, FLUX, np.where(BAD, 0.0, ERROR)), id="zero error"),
        pytest.param((WAVELENGTH, FLUX, np.where(BAD, np.inf, ERROR)), id="infinite error"),
        pytest.param((WAVELENGTH, FLUX, np.where(BAD, np.nan, ERROR)), id="NaN error"),
        pytest.param((WAVELENGTH, FLUX, np.where(BAD, -1, ERROR), BAD), id="negative error that is masked"),
        pytest.param((np.where(BAD, np.nan, WAVELENGTH), FLUX, ERROR, BAD), id="NaN wavelength that is masked"),
        pytest.param((np.where(BAD, 0, WAVELENGTH), FLUX, ERROR, BAD), id="zero wavelength that is masked"),
        pytest.param((np.where(BAD, 5002, WAVELENGTH), FLUX, ERROR, BAD), id="second wavelength that is masked"),
        pytest.param((WAVELENGTH[::-1], FLUX[::-1], ERROR[::-1], BAD[::-1]), id="decreasing"),
        pytest.param((WAVELENGTH * u.AA, FLUX, ERROR, BAD), id="quantity"),
        pytest.param(((WAVELENGTH / 10) * u.nm, FLUX * FLAM, ERROR * 1e3 * MILLI, BAD), id="quantities"),
        pytest.param(([WAVELENGTH / 1e4 * u.um], [FLUX * FLAM], [ERROR * FLAM], [BAD]), id="list of quantities"),
        pytest.param((list(WAVELENGTH * u.AA), FLUX, ERROR, BAD), id="list of scalar quantities"),
        pytest.param((WAVELENGTH, Masked(FLUX * FLAM, mask=BAD), ERROR * FLAM), id="masked quantity"),
        pytest.param((WAVELENGTH, MaskedColumn(FLUX, mask=BAD, unit="W m-2 nm-1"), ERROR * FLAM), id="masked column"),
        pytest.param(
            (Table({"w": WAVELENGTH / 10}, units={"w": "nm"})["w"], FLUX, ERROR, BAD), id="column with a unit"
        ),
        pytest.param(({"wavelength": WAVELENGTH, "flux": FLUX, "flux_error": ERROR, "mask": BAD},), id="row"),
        pytest.param(([{"wavelength": WAVELENGTH, "flux": FLUX, "flux_error": ERROR, "mask": BAD}],), id="rows"),
        pytest.param(
            ({"wavelength": [WAVELENGTH], "flux": [FLUX], "flux_error": [ERROR], "mask": [BAD]},), id="columns"
        ),
        pytest.param(
            (
                Spectrum(
                    flux=FLUX * FLAM, spectral_axis=WAVELENGTH * u.AA, uncertainty=StdDevUncertainty(ERROR), mask=BAD
                ),
            ),
            id="Spectrum",
        ),
        pytest.param(
            (
                Spectrum(
                    flux=FLUX[::-1] * FLAM,
                    spectral_axis=(WAVELENGTH[::-1] * u.AA).to(u.THz, u.spectral()),
                    uncertainty=VarianceUncertainty(ERROR[::-1] ** 2 * 1e6, unit="mW2 m-4 nm-2"),
                    mask=BAD[::-1],
                ),
            ),
            id="Spectrum of frequency with variance",
        ),
        pytest.param(
            (
                [
                    Spectrum(
                        flux=FLUX * FLAM,
                        spectral_axis=WAVELENGTH / 1e4 * u.um,
                        uncertainty=InverseVariance(np.where(BAD, 0, ERROR**-2)),
                    )
                ],
            ),
            id="list of Spectrum with inverse variance",
        ),
    ],
)
def test_every_kind_of_input_gives_the_same_tokens(arguments):
    expected = raw_tokens()(WAVELENGTH, FLUX, ERROR, BAD)
    assert expected["flux"].shape == (1, 5)
    same(raw_tokens()(*arguments), expected, rtol=2e-7)
    same(evidence_tokens()(*arguments), evidence_tokens()(WAVELENGTH, FLUX, ERROR, BAD), **CLOSE[evidence_tokens])


def test_float32_and_integers_are_read_as_they_are():
    inputs = raw_tokens()(WAVELENGTH.astype("f4"), np.arange(6), np.ones(6, "u1"))
    assert inputs["flux"][0].tolist() == [0, 1, 2, 3, 4, 5]


@both_kinds
def test_single_and_double_precision_agree_and_inputs_are_not_changed(make):
    wavelength, flux, error = spectrum(3, 140)
    flux[0, 7], error[1, 9], error[2] = np.nan, 0.0, np.nan
    spectra_by_type = [(wavelength, flux.astype(kind), error.astype(kind)) for kind in ("f8", "f4", ">f4")]
    before = copy.deepcopy(spectra_by_type)
    double, *single = (make()(*arrays, return_tensors="np") for arrays in spectra_by_type)
    for other in single:
        same(other, double, **CLOSE[make])
    for spectra, copies in zip(spectra_by_type, before, strict=True):
        assert all(np.array_equal(*pair, equal_nan=True) for pair in zip(spectra, copies, strict=True))


def test_spectra_of_different_lengths_are_padded():
    fluxes = [FLUX, FLUX[:2], FLUX[:4]]
    wavelengths = [WAVELENGTH, WAVELENGTH[:2], WAVELENGTH[:4]]
    expected = raw_tokens()(wavelengths, fluxes, [0 * f + 0.1 for f in fluxes])
    assert expected["attention_mask"].sum(dim=1).tolist() == [6, 2, 4]
    objects = [np.array(x, dtype=object) for x in (wavelengths, fluxes)]
    same(raw_tokens()(*objects, [0 * f + 0.1 for f in fluxes]), expected)
    spectra = [
        Spectrum(flux=f * 10 * MILLI if f.size == 2 else f * 0.01 * FLAM, spectral_axis=w * u.AA)
        for w, f in zip(wavelengths, fluxes, strict=True)
    ]
    np.testing.assert_allclose(raw_tokens()(spectra)["flux"], 0.01 * expected["flux"], rtol=1e-6)


@both_kinds
def test_one_wavelength_error_and_mask_serve_for_many_spectra(make):
    wavelength, flux, error = spectrum(3)
    mask = wavelength > 5030
    one = make()(wavelength, flux, error[0], mask)
    many = make()([wavelength] * 3, flux, [error[0]] * 3, [mask] * 3)
    same(one, many)


def test_a_negative_shared_error_is_refused():
    wavelength, flux, error = spectrum(3)
    error[0, 2] = -0.25
    with pytest.raises(ValueError, match=r"flux_error: expected positive numbers, got -0\.25"):
        raw_tokens()(wavelength, flux, error[0])


@both_kinds
def test_a_spectrum_of_many_stars_is_a_batch(make):
    wavelength, flux, error = spectrum(3)
    expected = make()(wavelength, flux, error)
    uncertainty = StdDevUncertainty(error)
    same(make()(Spectrum(flux=flux * FLAM, spectral_axis=wavelength * u.AA, uncertainty=uncertainty)), expected)
    uncertainty = StdDevUncertainty(error.T)
    turned = Spectrum(
        flux=flux.T * FLAM, spectral_axis=wavelength * u.AA, uncertainty=uncertainty, spectral_axis_index=0
    )
    same(make()(turned), expected)


def test_spectra_without_uncertainty_have_unknown_errors():
    with_error = Spectrum(flux=FLUX * FLAM, spectral_axis=WAVELENGTH * u.AA, uncertainty=StdDevUncertainty(ERROR))
    without = Spectrum(flux=FLUX * FLAM, spectral_axis=WAVELENGTH * u.AA)
    expected = evidence_tokens()(WAVELENGTH, [FLUX, FLUX], [ERROR, np.nan * ERROR])
    assert not torch.equal(expected["coefficients"][0], expected["coefficients"][1])
    same(evidence_tokens()([with_error, without]), expected)


@pytest.mark.parametrize("kind", [None, "numpy", "torch"])
@pytest.mark.parametrize("n_short", [40, 25], ids=["equal lengths", "ragged"])
def test_a_slice_of_a_data_set_in_any_format(kind, n_short):
    wavelength, flux, error = (np.float32(x) for x in spectrum(3))
    n = [40, n_short, 40]
    columns = {
        "object_id": ["a", "b", "c"],
        "wavelength": [wavelength[:k] for k in n],
        "flux": [f[:k] for f, k in zip(flux, n, strict=True)],
        "flux_error": [e[:k] for e, k in zip(error, n, strict=True)],
        "mask": [np.arange(k) % 7 == 0 for k in n],
        "teff": [5000.0, None, 4000.0],
        "teff_err": [50.0, None, 40.0],
        "logg": [2.0, 3.0, 4.0],
    }
    expected = raw_tokens()(
        *[columns[key] for key in ("wavelength", "flux", "flux_error", "mask")],
        scalars={"logg": [2.0, 3.0, 4.0]},
        labels={"teff": [5000.0, np.nan, 4000.0]},
        label_errors={"teff": [50.0, np.nan, 40.0]},
    )
    assert torch.isnan(expected["labels"][1, 0]) and torch.isnan(expected["label_errors"][1, 0])
    data = datasets.Dataset.from_dict(columns).with_format(kind)
    same(raw_tokens()(data[:], scalars=["logg"], labels=["teff"]), expected)
    evidence = evidence_tokens()(*[columns[key] for key in ("wavelength", "flux", "flux_error", "mask")])
    same(evidence_tokens()(data[:]), evidence, **CLOSE[evidence_tokens])
    same(raw_tokens()([data[i] for i in range(3)], scalars=["logg"], labels=["teff"]), expected)
    same(
        raw_tokens()(
            data["wavelength"],
            data["flux"],
            data["flux_error"],
            data["mask"],
            scalars={"logg": data["logg"]},
            labels={"teff": data["teff"]},
            label_errors={"teff": data["teff_err"]},
        ),
        expected,
    )
    one = raw_tokens()(data[1], scalars=["logg"], labels=["teff"])
    assert one["scalar_values"].tolist() == [[3.0]] and torch.isnan(one["labels"]).tolist() == [[True]]


# ------------------------------------------------------------------------------------------------------ single options


@pytest.mark.parametrize("unit", ["Angstrom", "nm", "um", "mm", "cm", "m"])
def test_plain_numbers_are_in_the_unit_of_the_tokenizer(unit):
    wavelength, flux, _ = spectrum()
    expected = SpectraFMTokenizer()(wavelength, flux, requests=["teff", 5010.0])
    plain = (wavelength * u.AA).to_value(unit)
    request = float((5010.0 * u.AA).to_value(unit))
    found = SpectraFMTokenizer(wavelength_unit=unit)(plain, flux, requests=["teff", request])
    same(found, expected, rtol=2e-7, atol=1e-7)
    quantity = SpectraFMTokenizer(wavelength_unit=unit)(wavelength * u.AA, flux, requests=["teff", 501.0 * u.nm])
    same(quantity, expected, rtol=2e-7, atol=1e-7)


def test_air_wavelengths_of_spectrum_and_requests_become_vacuum():
    wavelength, flux, _ = spectrum(start=6550.0)
    expected = SpectraFMTokenizer()(wavelength, flux, requests=[6564.6])
    air = SpectraFMTokenizer(wavelength_medium="air")
    same(air(vacuum_to_air(wavelength), flux, requests=[vacuum_to_air(6564.6)]), expected, rtol=2e-7, atol=1e-6)


def test_radial_velocity_moves_to_the_rest_frame():
    wavelength, flux, _ = spectrum(2, start=6550.0)
    expected = raw_tokens()(wavelength, flux, return_tensors="np")["wavelength"]
    velocity = np.array([300.0, -50.0])
    observed = [
        (w * u.AA * np.sqrt((1 + v / 299792.458) / (1 - v / 299792.458))) for v in velocity for w in [wavelength]
    ]
    for form in (velocity, velocity.tolist(), velocity * 1e3 * u.m / u.s):
        rest = raw_tokens()(observed, flux, radial_velocity=form, return_tensors="np")["wavelength"]
        np.testing.assert_allclose(rest, expected, rtol=1e-7)
    one = raw_tokens()(observed[0], flux, radial_velocity=300.0, return_tensors="np")["wavelength"]
    np.testing.assert_allclose(one, expected, rtol=1e-7)


@both_kinds
def test_inverse_variance_is_sigma_in_another_form(make):
    wavelength, flux, error = spectrum(2)
    error[0, 3] = np.inf
    expected = make()(wavelength, flux, error)
    same(make(error_type="ivar")(wavelength, flux, error**-2.0), expected, **CLOSE[make])
    quantities = (flux * FLAM, (error**-2.0 * 1e-6) / MILLI**2)
    same(make(error_type="ivar")(wavelength, *quantities), expected, **CLOSE[make])
    # An uncertainty says itself what it is.
    spectra = Spectrum(flux=flux * FLAM, spectral_axis=wavelength * u.AA, uncertainty=StdDevUncertainty(error))
    same(make(error_type="ivar")(spectra), expected, **CLOSE[make])


def test_an_error_that_is_infinite_marks_a_bad_pixel_and_errors_that_are_all_nan_are_unknown():
    wavelength, flux, error = spectrum(2)
    error[0] = np.nan
    error[1, 3] = np.inf
    inputs = raw_tokens()(wavelength, flux, error)
    assert inputs["attention_mask"].sum(dim=1).tolist() == [40, 39]
    assert 5003.0 in inputs["wavelength"][0] and 5003.0 not in inputs["wavelength"][1]


@pytest.mark.parametrize(("kind", "tiny"), [("f4", 1e-40), ("f8", 1e-20), ("f8", 1e-200)])
def test_tiny_errors_are_treated_as_zero(kind, tiny):
    found, expected = (
        evidence_tokens()(WAVELENGTH, FLUX.astype(kind), np.full(6, error, kind)) for error in (tiny, 1e-8)
    )
    torch.testing.assert_close(found["coefficients"], expected["coefficients"], rtol=1e-3, atol=1e-3)
    assert torch.isfinite(found["information"]).all()


def test_valid_flux_masks_pixels_outside():
    flux = np.array([0.04, 0.06, 1.0, 1.19, 1.21, 1.0])
    inputs = raw_tokens(valid_flux=[0.05, 1.2])(WAVELENGTH, flux)
    np.testing.assert_allclose(inputs["flux"][0], [0.06, 1.0, 1.19, 1.0], rtol=1e-6)


def test_clipping_masks():
    flux = [1.0, 1.1, 1.3, 1.0, 0.6, 0.9]
    inputs = raw_tokens(standardize_center=1.0, standardize_scale=0.1, clip=2.0)(WAVELENGTH, flux)
    np.testing.assert_allclose(inputs["flux"], [[0, 1, 0, -1]], atol=1e-6)
    assert inputs["wavelength"].tolist() == [[5000, 5001, 5003, 5005]]


def test_standardisation_tables_are_interpolated():
    tokenizer = raw_tokens(
        standardize_wavelength=[5000.0, 5002.0, 5010.0], standardize_center=[1, 3, 3], standardize_scale=[2, 4, 4]
    )
    inputs = tokenizer([5000.0, 5001.0, 5002.0, 5020.0], [1.0, 5.0, 7.0, 7.0])
    np.testing.assert_allclose(inputs["flux"], [[0, 1, 1, 1]])


# ------------------------------------------------------------------------------------------------------------- sampling


def test_even_sampling_covers_the_range():
    wavelength, flux, _ = spectrum(n_pixels=1000)
    tokenizer = raw_tokens(max_length=10)
    chosen = tokenizer(wavelength, flux)["wavelength"][0].numpy()
    np.testing.assert_array_equal(np.diff(chosen), 100.0)
    assert chosen[0] - 5000.0 == pytest.approx(5999.0 - chosen[-1], abs=1)
    assert tokenizer(wavelength, flux, max_length=1)["wavelength"].tolist() == [[5500.0]]
    same(tokenizer(wavelength, flux, max_length=1000), tokenizer(wavelength, flux, max_length=5000))


@pytest.mark.parametrize("sampling", ["even", "random"])
def test_max_length_keeps_different_valid_tokens_of_each_star(sampling):
    wavelength, flux, _ = spectrum(3, 200)
    mask = np.zeros(flux.shape, bool)
    mask[1, 5:] = True  # fewer than max_length are left
    mask[2, ::2] = True
    inputs = raw_tokens(max_length=20, sampling=sampling)(wavelength, flux, mask=mask)
    assert inputs["attention_mask"].sum(dim=1).tolist() == [20, 5, 20]
    for star in range(3):
        kept = inputs["wavelength"][star][inputs["attention_mask"][star]].numpy()
        assert np.all(np.diff(kept) > 0)
        assert not np.any(mask[star][(kept - 5000).astype(int)])


def test_random_sampling_is_new_at_each_call_and_reproducible():
    wavelength, flux, _ = spectrum(2, 300)

    def draws(seed):
        tokenizer = raw_tokens(max_length=30, sampling="random", seed=seed)
        return [tokenizer(wavelength, flux)["wavelength"] for _ in range(2)]

    first, again, other = draws(1), draws(1), draws(2)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[0], other[0])
    assert not torch.equal(first[0][0], first[0][1])  # each star has its own
    tokenizer = raw_tokens(max_length=30, sampling="random")
    by_seed = tokenizer(wavelength, flux, generator=7)["wavelength"]
    assert torch.equal(by_seed, tokenizer(wavelength, flux, generator=np.random.default_rng(7))["wavelength"])


def test_random_sampling_takes_every_part_of_the_spectrum():
    wavelength, flux, _ = spectrum(400, 100)
    chosen = raw_tokens(max_length=25, sampling="random")(wavelength, flux)["wavelength"]
    counts = np.bincount((chosen.numpy().ravel() - 5000).astype(int), minlength=100)
    assert counts.sum() == 10_000 and counts.min() > 60 and counts.max() < 140  # 100 +- 9 expected


# ------------------------------------------------------------------------------------------------- scalars and requests


def test_scalars_that_are_unknown_are_left_out(tiny_model):
    values = {"teff": [5000.0, np.nan, np.nan], "fe_h": [np.inf, -0.5, np.nan]}
    inputs = SpectraFMTokenizer()(*spectrum(3), scalars=values)
    assert inputs["scalar_ids"].tolist() == [[2], [4], [0]]
    assert inputs["scalar_values"].tolist() == [[5000.0], [-0.5], [0.0]]
    none = SpectraFMTokenizer()(*spectrum(1), scalars={"teff": np.nan})
    assert none["scalar_ids"].shape == (1, 0)
    assert torch.isfinite(tiny_model(**none).predictions).all()


def test_stars_without_a_spectrum_have_only_scalars(tiny_model):
    inputs = SpectraFMTokenizer()(scalars={"teff": [5000.0, 4000.0], "logg": 2.0}, requests=["fe_h", 5000.0])
    assert inputs["flux"].shape == inputs["wavelength"].shape == (2, 0)
    assert inputs["scalar_ids"].tolist() == [[2, 3], [2, 3]]
    outputs = tiny_model(**inputs)
    assert outputs.predictions.shape == (2, 2) and torch.all(torch.isfinite(outputs.predictions))


def test_all_labels_are_requested_by_default():
    arguments = spectrum(2)
    assert SpectraFMTokenizer()(*arguments)["request_ids"].tolist() == [[2, 3, 4, 5]] * 2
    tokenizer = SpectraFMTokenizer(requests=["fe_h", "teff"])
    assert tokenizer(*arguments)["request_ids"].tolist() == [[4, 2]] * 2
    assert tokenizer(*arguments, requests=("logg",))["request_ids"].tolist() == [[3]] * 2


def test_requests_can_differ_between_stars():
    inputs = SpectraFMTokenizer()(*spectrum(2), requests=[["teff", 5003.0], ["logg"]])
    assert inputs["request_ids"].tolist() == [[2, 1], [3, 0]]
    assert inputs["request_wavelength"].tolist() == [[0.0, 5003.0], [0.0, 0.0]]


@pytest.mark.parametrize(
    "requests",
    [
        [5003.0, 5020.0],
        (5003, 5020),
        np.array([5003.0, 5020.0]),
        torch.tensor([5003.0, 5020.0]),
        [500.3, 502.0] * u.nm,
        [5003.0 * u.AA, 5020.0],
        [[5003.0, 5020.0], [5003.0, 5020.0]],
        np.array([[5003.0, 5020.0], [5003.0, 5020.0]]),
    ],
    ids=["list", "tuple", "array", "tensor", "quantity", "mixed", "lists", "2-d array"],
)
def test_flux_can_be_requested_in_any_form(requests):
    inputs = SpectraFMTokenizer()(*spectrum(2), requests=requests)
    assert inputs["request_ids"].tolist() == [[1, 1]] * 2
    np.testing.assert_allclose(inputs["request_wavelength"], [[5003.0, 5020.0]] * 2, rtol=1e-7)


@pytest.mark.parametrize("wavelength_medium", ["vacuum", "air"])
def test_flux_center_and_scale_convert_to_the_input_units(wavelength_medium):
    wavelength, flux, _ = spectrum(2, 100, start=15000.0)
    flux = 1e-3 * flux
    tokenizer = raw_tokens(
        wavelength_medium=wavelength_medium,
        standardize_wavelength=np.linspace(15000, 15110, 7),
        standardize_center=np.linspace(0.9e-3, 1.1e-3, 7),
        standardize_scale=np.linspace(0.2e-3, 0.4e-3, 7),
    )
    pixels = [1, 50, 90]
    inputs = tokenizer(wavelength, flux, requests=["teff", *wavelength[pixels]])
    back = inputs["flux"][:, pixels] * inputs["flux_scale"][:, 1:] + inputs["flux_center"][:, 1:]
    np.testing.assert_allclose(back, flux[:, pixels], rtol=1e-5)
    assert inputs["flux_center"][:, 0].tolist() == [0, 0] and inputs["flux_scale"][:, 0].tolist() == [1, 1]
    torch.testing.assert_close(inputs["request_wavelength"][:, 1:], inputs["wavelength"][:, pixels])


def test_labels_become_the_requests_and_nan_is_unknown(tiny_model):
    inputs = SpectraFMTokenizer()(
        *spectrum(2), labels={"logg": [2.0, np.nan], "teff": 5000.0}, label_errors={"logg": [0.1, np.nan]}
    )
    assert inputs["request_ids"].tolist() == [[3, 2]] * 2
    np.testing.assert_array_equal(inputs["labels"], [[2.0, 5000.0], [np.nan, 5000.0]])
    np.testing.assert_array_equal(inputs["label_errors"], np.float32([[0.1, np.nan], [np.nan, np.nan]]))
    assert torch.isfinite(tiny_model(**inputs).loss)


def test_labels_follow_the_order_of_the_requests():
    inputs = SpectraFMTokenizer()(
        *spectrum(2), labels={"logg": [2.0, 3.0]}, requests=[["teff", "logg"], [5003.0, "logg"]]
    )
    np.testing.assert_array_equal(inputs["labels"], [[np.nan, 2.0], [np.nan, 3.0]])
    assert torch.as_tensor(inputs["label_errors"]).isnan().all()


def test_an_added_label_can_be_requested():
    tokenizer = SpectraFMTokenizer()
    tokenizer.add_label("mg_fe")
    assert tokenizer(*spectrum())["request_ids"].tolist() == [[2, 3, 4, 5, 6]]
    with pytest.raises(ValueError, match="name: expected a name not yet in .*got 'mg_fe'"):
        tokenizer.add_label("mg_fe")


# --------------------------------------------------------------------------------------------------------- air, vacuum


def test_air_wavelengths_agree_with_the_literature_and_specutils():
    # [O III], H-alpha and the Ca II triplet, vacuum and air of the NIST and SDSS line lists.
    vacuum = np.array([4960.295, 5008.239, 6564.614, 8544.44])
    np.testing.assert_allclose(vacuum_to_air(vacuum), [4958.911, 5006.843, 6562.80, 8542.09], atol=0.015)
    grid = np.geomspace(2001, 3e5, 1000)
    np.testing.assert_allclose(vacuum_to_air(grid), vac_to_air(grid * u.AA, method="Morton2000").value, rtol=1e-12)


@given(st.floats(1_000.0, 299_000.0))
@settings(derandomize=True, deadline=None, max_examples=200)
def test_air_and_back_is_the_same(wavelength):
    assert vacuum_to_air(air_to_vacuum(wavelength)) == pytest.approx(wavelength, rel=1e-13)


def test_below_2000_angstrom_wavelengths_are_in_vacuum():
    np.testing.assert_array_equal(air_to_vacuum([1000.0, 1999.9, 0.0, -1.0]), [1000.0, 1999.9, 0.0, -1.0])
    np.testing.assert_array_equal(vacuum_to_air([1000.0, 1999.9, np.nan]), [1000.0, 1999.9, np.nan])
    assert air_to_vacuum(2000.0) == pytest.approx(2000.648, abs=1e-3)


# --------------------------------------------------------------------------------------------------- saving and loading


def all_settings() -> SpectraFMTokenizer:
    """No setting has its default."""
    return SpectraFMTokenizer(
        label_names=["teff", "c_fe"],
        requests=["c_fe"],
        wavelength_unit="nm",
        wavelength_medium="air",
        error_type="ivar",
        valid_flux=[0.05, 1.2],
        standardize_wavelength=np.float32([5000.1, 5001.3]),
        standardize_center=[0.1, 1 / 3],
        standardize_scale=(0.2, 0.7),
        clip=3,
        max_length=np.int64(5),
        sampling="random",
        seed=3,
        pixel_wavelength=[[5000.1, 5001.3, 5002.0], [6000.0, 6001.0]],
        scalar_names=["bp_rp"],
    )


def test_save_load_save_is_byte_equal(tmp_path):
    tokenizer = all_settings()
    defaults = SpectraFMTokenizer().to_dict()
    # A basis is a file of its own: see test_basis_spectrafm.py.
    assert all(value != defaults[name] for name, value in tokenizer.to_dict().items() if name != "basis_file")
    files = tokenizer.save_pretrained(tmp_path / "first")
    tokenizer(np.linspace(500.0, 500.2, 9), np.ones(9))  # a call leaves nothing behind
    loaded = SpectraFMTokenizer.from_pretrained(tmp_path / "first")
    loaded.save_pretrained(tmp_path / "second")
    assert loaded.to_dict() == tokenizer.to_dict()
    first, second = (
        {path.name: path.read_bytes() for path in sorted((tmp_path / n).iterdir())} for n in ("first", "second")
    )
    assert first == second
    assert sorted(first) == [
        "basis_spectrafm.py",
        "configuration_emulator.py",
        "configuration_spectrafm.py",
        "evidence_spectrafm.py",
        "flags_spectrafm.py",
        "gate_spectrafm.py",
        "inputs_spectrafm.py",
        "likelihood_spectrafm.py",
        "modeling_emulator.py",
        "objects_spectrafm.py",
        "pipeline_spectrafm.py",
        "preprocessor_config.json",
        "products_spectrafm.py",
        "refinement_spectrafm.py",
        "rungs_spectrafm.py",
        "spectrum_spectrafm.py",
        "star_model_spectrafm.py",
        "tokenization_spectrafm.py",
        "tokenizer_config.json",
        "tokens_spectrafm.py",
        "velocity_spectrafm.py",
    ]
    assert [tmp_path / "first" / name for name in first if name.endswith(".json")] == [*map(type(tmp_path), files)]


def test_both_files_name_the_tokenizer_for_each_auto_class(tmp_path):
    for file in SpectraFMTokenizer().save_pretrained(tmp_path):
        with open(file) as stream:
            saved = json.load(stream)
        name = "tokenization_spectrafm.SpectraFMTokenizer"
        assert saved.pop("auto_map") == {
            "AutoFeatureExtractor": name,
            "AutoProcessor": name,
            "AutoTokenizer": [name, None],
        }
        for key in ("feature_extractor_type", "processor_class", "tokenizer_class"):
            assert saved.pop(key) == "SpectraFMTokenizer"
        assert saved == SpectraFMTokenizer().to_dict()


def test_settings_can_be_overridden_when_loading(tmp_path):
    all_settings().save_pretrained(tmp_path)
    tokenizer = SpectraFMTokenizer.from_pretrained(tmp_path, max_length=9, sampling="even", requests=None)
    assert (tokenizer.max_length, tokenizer.sampling, tokenizer.requests) == (9, "even", None)
    assert tokenizer.clip == 3.0
    with pytest.raises(ValueError, match="sampling: expected one of"):
        SpectraFMTokenizer.from_pretrained(tmp_path, sampling="first")


# ------------------------------------------------------------------------------------------------------------ bad input

W, F, E = spectrum(2, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param((), "wavelength: expected a spectrum, rows or scalars, got None", id="nothing"),
        pytest.param((W,), "flux: expected .* got None", id="no flux"),
        pytest.param((None, F), "wavelength: expected .* got None", id="no wavelength"),
        pytest.param((W[:4], F), "wavelength: .*2 spectra of 5 pixels, got 1 spectra of 4 pixels", id="lengths"),
        pytest.param((np.tile(W, (3, 1)), F), "wavelength: .*2 spectra of 5 pixels, got 3 spectra", id="stars"),
        pytest.param((np.tile(W, (2, 1)), F[0]), "wavelength: .*got 2 spectra of 5", id="more wavelengths than fluxes"),
        pytest.param((W, [F[0], F[1][:3]]), "wavelength: .*3 to 5 pixels, got 1 spectra of 5", id="ragged flux"),
        pytest.param((W, F, E[:, :3]), "flux_error: .*5 pixels, got 2 spectra of 3 pixels", id="error length"),
        pytest.param((W, F, E, E[0][:2] > 0), "mask: .*5 pixels, got 1 spectra of 2 pixels", id="mask length"),
        pytest.param((W, F * np.nan), "flux: expected at least one valid pixel .* none in spectrum 0", id="all NaN"),
        pytest.param((W, F, E, [F[0] < 0, F[0] > 0]), "flux: .*valid pixel.* none in spectrum 1", id="all masked"),
        pytest.param((W // 2, F), "wavelength: expected different .* got 2500 Angstrom twice", id="duplicates"),
        pytest.param((W, F, -E), "flux_error: expected positive numbers, got -0.0", id="negative errors"),
        pytest.param((W, F, 0 * E), "flux_error: .*only zeros or infinities in spectrum 0", id="zero errors"),
        pytest.param((W, F, [E[0], E[1] * np.inf]), "flux_error: .*only zeros .* in spectrum 1", id="infinite errors"),
        pytest.param((W / 10, F), "wavelength: .*1000 to 300000 Angstrom, got 500 .are these nanometres", id="nm"),
        pytest.param((W * 100, F), "wavelength: expected 1000 to 300000 Angstrom, got 500000$", id="too long"),
        pytest.param((W * np.nan, F), "wavelength: .* Angstrom, got nan", id="NaN wavelength"),
        pytest.param((-W, F), "wavelength: .*got -5000 .are these", id="negative wavelength"),
        pytest.param((W * u.Hz, F), "wavelength: expected Angstrom, got Hz", id="not a length"),
        pytest.param((W, F * FLAM, E * u.K), "flux_error: expected W / .nm m2., got K", id="unit of error"),
        pytest.param(
            (W, F, E * FLAM), "flux_error: expected numbers without a unit, got W / .nm m2.", id="only errors with unit"
        ),
        pytest.param(("abc", "abc"), "flux: expected real numbers, got <U3 'abc'", id="strings"),
        pytest.param((["5000", "5001"], ["a", "b"]), "flux: expected real numbers, got <U1", id="list of strings"),
        pytest.param((b"ab", b"ab"), "flux: expected real numbers, got ", id="bytes"),
        pytest.param((W, W > 0), "flux: expected real numbers, got bool", id="bool flux"),
        pytest.param((5000.0, 1.0), "flux: expected one or two dimensions.*, got shape \\(\\)", id="0-d"),
        pytest.param((W, F + 0j), "flux: expected real numbers, got complex128", id="complex"),
        pytest.param((W + 0j, F), "wavelength: expected real numbers, got complex128", id="complex wavelength"),
        pytest.param((W, F.astype(object)), "flux: expected real numbers, got object", id="object array"),
        pytest.param((W, np.array(object())), "flux: expected real numbers, got object", id="an object"),
        pytest.param((W, [{}, object()]), "flux: expected real numbers, got object", id="objects"),
        pytest.param((W, F.astype("M8[s]")), "flux: expected real numbers, got datetime64", id="dates"),
        pytest.param(([], []), "flux: expected at least one pixel.*shape \\(1, 0\\)", id="empty lists"),
        pytest.param((W[:0], F[:, :0]), "flux: expected at least one pixel.*shape \\(2, 0\\)", id="no pixels"),
        pytest.param((W, F[:0]), "flux: expected at least one pixel.*shape \\(0, 5\\)", id="no stars"),
        pytest.param((W, [F[0], []]), "flux: expected at least one pixel", id="one is empty"),
        pytest.param((W[:2], [None, None]), "flux: expected at least one valid pixel", id="Nones"),
        pytest.param((W, F[None]), "flux: expected one or two dimensions.*shape \\(1, 2, 5\\)", id="3-d"),
        pytest.param((W, [F, F]), "flux: expected a list of one-dimensional.*\\(2, 5\\)", id="list of 2-d"),
        pytest.param((W, [1.0, [2.0, 3.0]]), "flux: expected a list of one-dim", id="numbers and lists"),
        pytest.param((W, [[1.0, [2.0]], [1.0]]), "flux: expected an array of numbers, got list", id="ragged inside"),
        pytest.param((W, F, E, E), "mask: expected True and False, got float64", id="float mask"),
        pytest.param((W, torch.ones(5, dtype=torch.bfloat16)), "flux: expected an array of numbers", id="bfloat16"),
        pytest.param(
            ({"wavelength": W},), "flux: expected a column of this name.*\\['wavelength'\\]", id="row without flux"
        ),
        pytest.param(
            ([{"wavelength": W, "flux": F[0]}, {}],), "wavelength: expected rows .* in row 1", id="rows differ"
        ),
        pytest.param(
            ([{"wavelength": W, "flux": F[0]}, 3],), "wavelength: expected rows .* got int in row 1", id="not a row"
        ),
        pytest.param(({"wavelength": W, "flux": F}, F), "flux: expected None with rows", id="rows and flux"),
        pytest.param((iter([1]), F), "wavelength: expected real numbers, got object", id="iterator"),
    ],
)
def test_a_bad_spectrum_is_refused_by_name(arguments, message):
    for make in (raw_tokens, evidence_tokens):
        with pytest.raises(ValueError, match=message):
            make()(*arguments)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"scalars": {"age": 1.0}}, r"scalars: expected names out of \['teff', .*\], got \['age'\]"),
        ({"scalars": {"teff": [1.0, 2.0, 3.0]}}, r"scalars\['teff'\]: .*each of 2 stars, got shape \(3,\)"),
        ({"scalars": {"teff": "hot"}}, r"scalars\['teff'\]: expected real numbers, got <U3 'hot'"),
        ({"scalars": {"teff": 5000 * u.K}}, r"scalars\['teff'\]: expected numbers without a unit, got K"),
        ({"scalars": ["teff"]}, "scalars: expected a mapping of names to numbers, got list"),
        ({"requests": ["age"]}, r"requests: expected names out of \['teff', .*\], got \['age'\]"),
        ({"requests": "teff"}, "requests: expected a list .* got 'teff'"),
        ({"requests": 5000.0}, "requests: expected a list .* got 5000.0"),
        ({"requests": []}, "requests: expected at least one, got none for star 0"),
        ({"requests": [["teff"], []]}, "requests: expected at least one, got none for star 1"),
        ({"requests": [["teff"]] * 3}, "requests: expected one list for each of 2 stars, got 3"),
        ({"requests": ["teff", ["logg"]]}, "requests: .* or a list of them for each star, got both"),
        ({"requests": [500.0]}, "requests: expected 1000 to 300000 Angstrom, got 500 .are these"),
        ({"requests": [np.nan]}, "requests: expected 1000 to 300000 Angstrom, got nan"),
        ({"requests": [None]}, "requests: expected real numbers, got object"),
        ({"requests": [True]}, "requests: expected real numbers, got bool"),
        ({"requests": [[[5000.0]], ["teff"]]}, r"requests: expected a number, got shape \(1,\)"),
        ({"requests": [5000.0 * u.K]}, "requests: expected Angstrom, got K"),
        ({"labels": {"age": 1.0}}, r"labels: expected names out of \['teff', .*\], got \['age'\]"),
        ({"labels": ["teff"]}, "labels: expected a mapping of names to numbers, got list"),
        ({"labels": {"teff": np.inf}}, r"labels\['teff'\]: expected finite numbers or NaN, got inf"),
        (
            {"labels": {"teff": 1.0}, "label_errors": {"teff": [1.0, -9999.0]}},
            r"label_errors\['teff'\]: expected positive numbers or NaN, got -9999",
        ),
        (
            {"labels": {"teff": 1.0}, "label_errors": {"logg": 1.0}},
            r"label_errors: .*labels \['teff'\], got \['logg'\]",
        ),
        ({"label_errors": {"teff": 1.0}}, r"label_errors: .*labels \[\], got \['teff'\]"),
        ({"radial_velocity": np.nan}, "radial_velocity: expected km/s below .* got nan"),
        ({"radial_velocity": [0.0, 4e5]}, "radial_velocity: expected km/s below .* got 400000"),
        ({"radial_velocity": [0.0] * 3}, r"radial_velocity: .*each of 2 stars, got shape \(3,\)"),
        ({"radial_velocity": 3 * u.m}, "radial_velocity: expected km/s, got m"),
        ({"max_length": 0}, "max_length: expected a whole number of at least 1, got 0"),
        ({"max_length": 2.5}, "max_length: expected a whole number of at least 1, got 2.5"),
        ({"generator": "abc"}, "generator: expected a numpy.random.Generator or a seed, got 'abc'"),
        ({"generator": -1}, "generator: expected a numpy.random.Generator or a seed, got -1"),
        ({"generator": torch.Generator()}, "generator: expected a numpy.random.Generator or a seed"),
        ({"return_tensors": "tf"}, "return_tensors: expected 'pt' or 'np', got 'tf'"),
    ],
)
def test_a_bad_argument_is_refused_by_name(kwargs, message):
    with pytest.raises(ValueError, match=message):
        SpectraFMTokenizer()(W, F, **kwargs)


@pytest.mark.parametrize(
    ("arguments", "kwargs", "message"),
    [
        ((), {"scalars": {"teff": [5000.0, np.nan]}}, "scalars: expected a known value for each star"),
        ((), {"scalars": {"teff": []}}, "scalars: expected a known value for each star"),
        ((), {"scalars": {"teff": [1.0, 2.0], "logg": [1.0] * 3}}, r"scalars\['teff'\]: .*3 stars, got shape \(2,\)"),
        (({"wavelength": W, "flux": F[0]},), {"labels": ["teff"]}, r"labels: .*columns .*got \['teff'\]"),
        (({"wavelength": W, "flux": F[0]},), {"scalars": "teff"}, "scalars: expected a list of different names"),
        (
            (Spectrum(flux=F * FLAM, spectral_axis=W * u.AA, uncertainty=UnknownUncertainty(E)),),
            {},
            "flux_error: expected an uncertainty of type std, var or ivar, got unknown",
        ),
        (
            (Spectrum(flux=F * FLAM, spectral_axis=W * u.AA, uncertainty=InverseVariance(-E)),),
            {},
            "flux_error: expected positive numbers, got -",
        ),
    ],
)
def test_bad_rows_spectra_and_scalars_are_refused_by_name(arguments, kwargs, message):
    with pytest.raises(ValueError, match=message):
        SpectraFMTokenizer()(*arguments, **kwargs)


@pytest.mark.parametrize(
    ("settings_", "flux", "message"),
    [
        ({"valid_flux": [5, 6]}, F, r"flux: .*valid_flux=\[5.0, 6.0\].*got none in spectrum 0"),
        ({"clip": 3}, 50 + F, "flux: .*clip=3.0 .*got none in spectrum 0"),
    ],
)
def test_a_spectrum_that_the_settings_leave_nothing_of_is_refused(settings_, flux, message):
    with pytest.raises(ValueError, match=message):
        SpectraFMTokenizer(**settings_)(W, flux)


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"wavelength_unit": "parsec"}, r"wavelength_unit: expected one of \('Angstrom', .* got 'parsec'"),
        ({"wavelength_medium": "water"}, r"wavelength_medium: expected one of .* got 'water'"),
        ({"error_type": "variance"}, r"error_type: expected one of .* got 'variance'"),
        ({"sampling": "first"}, r"sampling: expected one of .* got 'first'"),
        ({"max_length": -1}, "max_length: expected a whole number of at least 1, got -1"),
        ({"seed": None}, "seed: expected a whole number .* got None"),
        ({"clip": -1}, "clip: expected a positive number, got -1.0"),
        ({"clip": np.nan}, "clip: expected a positive number, got nan"),
        ({"valid_flux": [1.2, 0.05]}, r"valid_flux: expected \[low, high\], got \[1.2, 0.05\]"),
        ({"valid_flux": 3.0}, r"valid_flux: expected \[low, high\], got 3.0"),
        ({"standardize_wavelength": [2.0, 1.0]}, r"standardize_wavelength: expected increasing wavelengths, got \[2"),
        ({"standardize_wavelength": [1.0, 2.0]}, r"standardize_center: .*standardize_wavelength, \(2,\), got \(\)"),
        ({"standardize_center": [1.0, 2.0]}, r"standardize_center: .*standardize_wavelength, \(\), got \(2,\)"),
        ({"standardize_scale": 0.0}, "standardize_scale: expected positive numbers, got 0"),
        ({"requests": ["age"]}, r"requests: expected names out of .* got \['age'\]"),
        ({"requests": "teff"}, "requests: expected a list of different names, got 'teff'"),
        ({"label_names": "teff"}, "label_names: expected a list of different names, got 'teff'"),
        ({"label_names": ["teff", "teff"]}, "label_names: expected a list of different names"),
        ({"label_names": ["teff", 3]}, "label_names: expected a list of different names"),
        ({"patch_size": 3}, r"settings: expected names out of \['label_names', .* got \['patch_size'\]"),
    ],
)
def test_a_bad_setting_is_refused_by_name(settings_, message):
    with pytest.raises(ValueError, match=message):
        SpectraFMTokenizer(**settings_)


# ------------------------------------------------------------------------------------ properties, with a random network


def random_model(config: SpectraFMConfig) -> SpectraFMForPrediction:
    """A network so far from its small initial weights that its answers depend on every pixel."""
    torch.manual_seed(0)
    model = SpectraFMForPrediction(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=2.0 / parameter.shape[-1] ** 0.5)
    return model


MODEL = random_model(
    SpectraFMConfig.original(
        hidden_size=32, encoder_attention_heads=[4, 4], encoder_ffn_dim=[64, 64], decoder_attention_heads=[4],
        decoder_ffn_dim=[64], readout_dims=[32], label_names=LABELS, label_units=[""] * 4,
        label_centers=[5000, 2, 0, 0], label_scales=[500, 1, 1, 1],
    )
)  # fmt: skip
TOKENIZER = SpectraFMTokenizer(standardize_scale=0.2)
REQUESTS = ["teff", "fe_h", 5555.0]
properties = settings(
    derandomize=True, deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@torch.no_grad()
def predict(*arguments):
    outputs = MODEL(**TOKENIZER(*arguments, requests=REQUESTS))
    assert torch.all(torch.isfinite(outputs.predictions)) and torch.all(torch.isfinite(outputs.prediction_errors))
    return outputs


def assert_same_answers(outputs, expected):
    """Within 1e-4 of the sigma of each answer, and the sigmas within 1e-4 of themselves."""
    assert torch.all((outputs.predictions - expected.predictions).abs() < 1e-4 * expected.prediction_errors)
    assert torch.all((outputs.prediction_errors - expected.prediction_errors).abs() < 1e-4 * expected.prediction_errors)


@st.composite
def spectra(draw):
    """Wavelength, flux and error of one star on one to three detectors of different sampling."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    starts = draw(st.sampled_from([[4000.0], [5500.0, 15000.0], [3500.0, 5000.0, 9000.0]]))
    pieces = [start + rng.uniform(0.1, 3.0) * np.arange(draw(st.integers(2, 15))) for start in starts]
    wavelength = np.concatenate(pieces)
    flux = 1.0 + 0.2 * rng.standard_normal(wavelength.size)
    return wavelength, flux, rng.uniform(0.01, 0.2, wavelength.size)


def test_the_random_network_depends_on_flux_and_wavelength():
    wavelength, flux, error = spectrum(2, 20)
    values = predict(wavelength, flux, error)
    moved = predict(wavelength + 0.3, flux, error)
    for other in (values.predictions[1], moved.predictions[0]):
        assert torch.all((values.predictions[0] - other).abs() > 1e-2 * values.prediction_errors[0])


@given(star=spectra(), seed=st.integers(0, 1000))
@properties
def test_the_order_of_pixels_changes_no_prediction(star, seed):
    order = np.random.default_rng(seed).permutation(len(star[0]))
    assert_same_answers(predict(*[x[order] for x in star]), predict(*star))


@given(star=spectra(), cuts=st.lists(st.integers(1, 44), max_size=3), seed=st.integers(0, 1000))
@properties
def test_splitting_into_detectors_changes_no_prediction(star, cuts, seed):
    blocks = np.split(np.arange(len(star[0])), sorted(cut % len(star[0]) for cut in cuts))
    order = np.concatenate([blocks[i] for i in np.random.default_rng(seed).permutation(len(blocks))])
    assert_same_answers(predict(*[x[order] for x in star]), predict(*star))


@given(
    star=spectra(),
    junk=arrays(
        float,
        st.tuples(st.integers(1, 6), st.just(3)),
        elements=st.sampled_from([0.0, -1.0, np.nan, np.inf, -np.inf, 1e300, 1.0, 4000.0, 5500.0, 7000.0]),
    ),
    seed=st.integers(0, 1000),
)
@properties
def test_masked_pixels_change_no_prediction(star, junk, seed):
    longer = [np.concatenate([values, column]) for values, column in zip(star, junk.T, strict=True)]
    mask = np.arange(len(longer[0])) >= len(star[0])
    order = np.random.default_rng(seed).permutation(mask.size)
    outputs = predict(*[x[order] for x in (*longer, mask)])
    assert_same_answers(outputs, predict(*star))


@given(star=spectra(), others=st.lists(spectra(), min_size=1, max_size=3))
@properties
def test_batching_with_longer_spectra_changes_no_prediction(star, others):
    together = predict(*[list(column) for column in zip(*others, star, strict=True)])
    alone = predict(*star)
    for key in ("predictions", "prediction_errors"):
        together[key] = together[key][-1:]
    assert_same_answers(together, alone)


@given(star=spectra(), unit=st.sampled_from(["nm", "um", "mm", "cm", "m"]))
@properties
def test_unit_and_air_round_trips_agree(star, unit):
    wavelength, flux, error = star
    expected = TOKENIZER(*star)
    other = TOKENIZER((wavelength * u.AA).to(unit), flux * FLAM, error * 1e3 * MILLI)
    same(other, expected, rtol=1e-6, atol=2e-6)
    air = SpectraFMTokenizer(standardize_scale=0.2, wavelength_medium="air", wavelength_unit=unit)
    same(air((vacuum_to_air(wavelength) * u.AA).to_value(unit), flux, error), expected, rtol=1e-6, atol=2e-6)


ANY_NUMBER = st.one_of(
    st.sampled_from([0.0, -1.0, np.nan, np.inf, -np.inf, 1e300, 1e-300, 1.7e308]),
    st.floats(0.5, 1.5),
    st.floats(),
)
ANY_WAVELENGTH = st.one_of(st.floats(1000.0, 300_000.0), st.floats(5000.0, 5010.0), ANY_NUMBER)


@given(
    wavelength=st.lists(ANY_WAVELENGTH, min_size=12, max_size=12),
    flux=arrays(float, (2, 12), elements=ANY_NUMBER),
    error=st.one_of(st.none(), arrays(float, (2, 12), elements=ANY_NUMBER)),
    mask=st.lists(st.booleans(), min_size=12, max_size=12),
    kwargs=st.fixed_dictionaries(
        {
            "basis": st.sampled_from([None, BASIS]),
            "error_type": st.sampled_from(["sigma", "ivar"]),
            "wavelength_medium": st.sampled_from(["vacuum", "air"]),
            "clip": st.sampled_from([None, 10.0]),
            "max_length": st.sampled_from([None, 2]),
            "sampling": st.sampled_from(["even", "random"]),
        }
    ),
    clean=st.booleans(),
)
@settings(derandomize=True, deadline=None, max_examples=400)
def test_no_number_that_is_accepted_becomes_nan_or_infinite(wavelength, flux, error, mask, kwargs, clean):
    mask = np.array(mask) | (np.arange(12) == 11)
    if clean:  # otherwise nearly all is refused
        ok = np.arange(12) < 5
        wavelength = np.where(ok, 5000.0 + np.arange(12), wavelength)
        flux = np.where(ok, 1.0 + 0.1 * np.arange(12), flux)
        error = error if error is None else np.where(ok, 0.1, error)
        mask = ~ok & (mask | True)
        mask[5] = False
        wavelength[5] = 5100.0
    try:
        inputs = SpectraFMTokenizer(**kwargs)(wavelength, flux, error, mask, requests=["teff", 5005.0])
    except ValueError as refused:
        assert ": expected " in str(refused)
        return
    inputs.pop("misfit", None)  # of few pixels it is not known
    for key, values in inputs.items():
        assert torch.all(torch.isfinite(values.double())), key
    # What lies beside all intervals is no token; of such a star there is no answer.
    assert kwargs["basis"] is not None or torch.all(inputs["attention_mask"].any(dim=-1))


@pytest.mark.parametrize("kind", ["f4", "f8"])
@pytest.mark.parametrize("limits", [{"valid_flux": [-1e300, 1e300]}, {"clip": 1e39}])
def test_limits_beyond_single_precision_limit_nothing(kind, limits):
    wavelength, flux, error = spectrum(2)
    arrays = wavelength, flux.astype(kind), error.astype(kind)
    same(raw_tokens(**limits)(*arrays), raw_tokens()(*arrays))


@pytest.mark.parametrize("value", [9e29, -9e29])
def test_without_clipping_a_flux_of_any_size_gives_finite_answers(value, tiny_model):
    flux = np.where(np.arange(FLUX.size) == 2, value, FLUX)
    inputs = SpectraFMTokenizer(clip=None)(WAVELENGTH, flux, ERROR)
    assert inputs["attention_mask"].sum() == 5, "of which the model would need the square"
    output = tiny_model(**inputs)
    assert torch.isfinite(output.predictions).all() and torch.isfinite(output.prediction_errors).all()


@pytest.mark.parametrize("value", [9e29, -9e29])
def test_a_scalar_of_any_size_gives_finite_answers(value, tiny_model):
    output = tiny_model(**SpectraFMTokenizer()(scalars={"logg": value}))
    assert torch.isfinite(output.predictions).all() and torch.isfinite(output.prediction_errors).all()


def test_the_repr_of_a_tokenizer_is_short(tiny_evidence):
    grid = np.arange(1000.0, 9000.0)
    tokenizer = SpectraFMTokenizer(
        standardize_wavelength=grid, standardize_center=grid, standardize_scale=grid, max_length=7
    )
    assert repr(tokenizer).startswith("SpectraFMTokenizer(standardize_wavelength=[1000. 1001. 1002. ... 8997.")
    assert repr(tokenizer).endswith("max_length=7)") and len(repr(tokenizer)) < 300
    assert "<4 intervals, 4881-5245, 14940-15364 Angstrom>" in repr(tiny_evidence[1])


# ------------------------------------------------------------------------------------------- fluxes beside the evidence


def test_fluxes_on_the_grids_of_a_basis_tokenizer_are_over_the_median_and_unknown_where_nothing_is():
    low, high = BASIS.rungs[0].range
    wavelength = np.linspace(low + 1.0, high - 1.0, 201)
    flux = 5.0 * np.stack([np.ones(201), 1.0 + 0.1 * np.linspace(-1.0, 1.0, 201)])
    mask = np.zeros(flux.shape, bool)
    mask[0, 50:60] = True
    grid = [wavelength[40:45] + 0.3 * (wavelength[1] - wavelength[0]), [wavelength[49], wavelength[55], high + 50.0]]
    inputs = evidence_tokens(pixel_wavelength=grid)(wavelength, flux, 0.01 * flux, mask)
    found = inputs["pixels"].numpy()
    assert found.shape == (2, 8)
    np.testing.assert_allclose(found[0], [1, 1, 1, 1, 1, 1, np.nan, np.nan], rtol=1e-5)
    np.testing.assert_allclose(found[1, :5], np.interp(grid[0], wavelength, flux[1]) / 5.0, rtol=1e-5)
    assert "pixels" not in evidence_tokens()(wavelength, flux)


def test_grids_that_do_not_increase_are_refused():
    with pytest.raises(ValueError, match="pixel_wavelength: expected lists of increasing wavelengths"):
        SpectraFMTokenizer(pixel_wavelength=[[5000.0, 4000.0]])


def test_scalars_of_a_tokenizer_on_evidence_come_with_errors_and_gaps():
    """By name or from the columns of rows, NaN where unknown; one of several that is not there is named."""
    wavelength = np.linspace(5000.0, 5400.0, 200)
    flux = np.ones((2, 200))
    tokenizer = evidence_tokens(scalar_names=["bp_rp", "parallax"])
    scalars = {"bp_rp": [0.8, np.inf], "parallax": [2.0, 3.0], "parallax_err": [0.1, np.nan]}
    found = tokenizer(wavelength, flux, 0.01 * flux, scalars=scalars)["scalars"].numpy()
    expected = np.float32([[[0.8, np.nan], [2.0, 0.1]], [[np.nan, np.nan], [3.0, np.nan]]])
    np.testing.assert_array_equal(found, expected)
    rows = [
        {"wavelength": wavelength, "flux": flux[0], "flux_error": 0.01 * flux[0]}
        | {name: values[i] for name, values in scalars.items()}
        for i in range(2)
    ]
    np.testing.assert_array_equal(tokenizer(rows)["scalars"].numpy(), expected)
    assert "scalars" not in tokenizer(wavelength, flux, 0.01 * flux)
    with pytest.raises(ValueError, match=r"expected bp_rp, parallax \(NaN where unknown\), got none of parallax"):
        tokenizer(wavelength, flux, 0.01 * flux, scalars={"bp_rp": [1.0, 1.0]})
    with pytest.raises(ValueError, match=r"scalars: expected names out of \['bp_rp', 'bp_rp_err'"):
        tokenizer(wavelength, flux, 0.01 * flux, scalars={**scalars, "g": 1.0})
