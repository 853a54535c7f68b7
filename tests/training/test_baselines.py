import numpy as np
import pytest
import torch

from spectrafm_hf.training.baseline import TRANSFORMS, Spectra, transform_flux
from spectrafm_hf.training.baselines import BASELINES, BoostingBaseline, MLPBaseline, RidgeBaseline
from spectrafm_hf.training.cannon import CannonBaseline, _quadratic, _quadratic_slopes
from spectrafm_hf.training.metrics import label_metrics


N_PIXELS = 30


def make_spectra(n=1500, seed=0, noise=0.01, scatter=0.0, shared=0.0, nuisance=False) -> Spectra:
    """Flux that is quadratic in two labels (and a nuisance), with noise; `shared` shifts all pixels of a star alike."""
    model = np.random.default_rng(1)
    n_quantities = 2 + nuisance
    slopes = model.normal(0, 0.1, (N_PIXELS, n_quantities))
    curvatures = model.normal(0, 0.01, (N_PIXELS, n_quantities, n_quantities))
    draw = np.random.default_rng(seed)
    x = draw.uniform(-1.5, 1.5, (n, n_quantities))
    flux = 2 + x @ slopes.T + np.einsum("ni,pij,nj->np", x, curvatures, x)
    flux += draw.normal(0, scatter, flux.shape) if scatter else 0
    flux += shared * draw.normal(size=(n, 1)) * np.linspace(0.5, 1.5, N_PIXELS)
    flux += noise * draw.normal(size=flux.shape)
    labels = np.stack([5000 + 500 * x[:, 0], 0.3 * x[:, 1]], axis=1)
    return Spectra(flux, np.full(flux.shape, noise), labels, np.full(labels.shape, 1e-6), x[:, 2:])


def figures_of(baseline, spectra):
    values, errors = baseline.predict(spectra.flux, spectra.flux_error)
    columns = zip(values.T, errors.T, spectra.labels.T, spectra.label_errors.T, strict=True)
    return [label_metrics(*column) for column in columns]


SMALL_MLP = {"epochs": 30, "batch_size": 64, "n_components": 8, "widths": (48, 48), "transform": "raw"}


def make_baseline(name):
    if name == "boosting":
        pytest.importorskip("sklearn")
        return BoostingBaseline(transform="raw", n_components=8, leaves=8)
    return MLPBaseline(**SMALL_MLP) if name == "mlp" else BASELINES[name](transform="raw")


# ---------------------------------------------------------------------------------------------------------- what all do


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_transform_propagates_the_error_as_a_small_change_of_the_flux_does(transform):
    flux, error = np.array([0.02, 0.3, 1.0, 4.0]), np.full(4, 1e-6)
    low, high = transform_flux(flux - error, error, transform)[0], transform_flux(flux + error, error, transform)[0]
    np.testing.assert_allclose(transform_flux(flux, error, transform)[1], (high - low) / 2, rtol=1e-4)


def test_a_negative_flux_stays_finite_in_every_transform():
    for transform in TRANSFORMS:
        assert np.isfinite(transform_flux(np.array([-0.5, 0.0]), np.array([0.1, 0.1]), transform)).all()


def test_an_unknown_transform_or_arrays_that_do_not_fit_are_clear_errors():
    with pytest.raises(ValueError, match="transform: expected one of .*, got 'sqrt'"):
        transform_flux(np.ones(2), np.ones(2), "sqrt")
    spectra = make_spectra(10)
    parts = {name: getattr(spectra, name) for name in ("flux", "flux_error", "labels", "label_errors", "nuisance")}
    for name in ("flux", "flux_error", "label_errors", "nuisance"):
        with pytest.raises(ValueError, match=f"{name}: expected shape"):
            Spectra(**{**parts, name: parts[name][:-1]})
    with pytest.raises(ValueError, match="labels: expected shape"):
        Spectra(**{**parts, "labels": np.ones(10)})


@pytest.mark.parametrize("name", BASELINES)
def test_calibrated_errors_have_a_robust_z_of_one_on_the_stars_they_were_calibrated_on(name):
    train, held_out, test = make_spectra(seed=2), make_spectra(seed=3), make_spectra(seed=4)
    baseline = make_baseline(name).fit(train).calibrate(held_out)
    assert [figures["robust_z"] for figures in figures_of(baseline, held_out)] == pytest.approx([1, 1], abs=1e-3)
    assert [figures["robust_z"] for figures in figures_of(baseline, test)] == pytest.approx([1, 1], abs=0.2)


@pytest.mark.parametrize("name", BASELINES)
def test_pixels_that_are_masked_do_not_poison_the_answer(name):
    train, test = make_spectra(seed=2), make_spectra(200, seed=3)
    random = np.random.default_rng(0)
    holes = [random.random(spectra.flux.shape) < 0.03 for spectra in (train, test)]
    for hole, spectra in zip(holes, (train, test), strict=True):
        hole[:, 7] = True  # in no star is this pixel usable
        spectra.flux[hole] = np.nan
        spectra.flux_error[hole] = np.nan
    figures = figures_of(make_baseline(name).fit(train), test)
    assert figures[0]["robust_scatter"] < 150 and figures[1]["robust_scatter"] < 0.1


@pytest.mark.parametrize("name", BASELINES)
def test_a_fit_is_the_same_when_repeated_and_leaves_the_global_generators_alone(name):
    train, test = make_spectra(300, seed=2), make_spectra(20, seed=3)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first, second = (make_baseline(name).fit(train).predict(test.flux, test.flux_error) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])


def test_calibration_without_a_known_label_is_an_error():
    spectra = make_spectra(50)
    baseline = RidgeBaseline(transform="raw").fit(spectra)
    spectra.labels[:, 1] = np.nan
    with pytest.raises(ValueError, match="got none in column 1"):
        baseline.calibrate(spectra)


# ---------------------------------------------------------------------------------------------------------------- ridge


def linear_spectra(n=500, seed=0):
    draw = np.random.default_rng(seed)
    flux = draw.normal(1, 0.1, (n, N_PIXELS))
    weights = np.random.default_rng(1).normal(size=(N_PIXELS, 2))
    labels = 4 + flux @ weights
    return Spectra(flux, np.full(flux.shape, 0.01), labels, np.zeros(labels.shape), np.empty((n, 0)))


def test_ridge_is_exact_where_labels_are_linear_in_the_pixels():
    train, test = linear_spectra(), linear_spectra(50, seed=5)
    values, _ = RidgeBaseline(alpha=1e-12, transform="raw").fit(train).predict(test.flux, test.flux_error)
    np.testing.assert_allclose(values, test.labels, atol=1e-7)


def test_ridge_uses_each_label_of_the_stars_that_have_it():
    train, test = linear_spectra(), linear_spectra(50, seed=5)
    train.labels[::2, 1] = np.nan
    values, _ = RidgeBaseline(alpha=1e-12, transform="raw").fit(train).predict(test.flux, test.flux_error)
    np.testing.assert_allclose(values, test.labels, atol=1e-7)


def test_a_large_penalty_leaves_the_mean_label():
    train = linear_spectra()
    values, _ = RidgeBaseline(alpha=1e9, transform="raw").fit(train).predict(train.flux, train.flux_error)
    np.testing.assert_allclose(values, np.broadcast_to(train.labels.mean(axis=0), values.shape), atol=1e-4)


def test_errors_as_inputs_bring_in_what_only_they_know():
    train = linear_spectra()
    train.flux_error[:] *= np.exp(np.random.default_rng(3).normal(size=(len(train), 1)))
    labels = np.log(train.flux_error[:, :2]) + 0.0
    known = Spectra(train.flux, train.flux_error, labels, train.label_errors, train.nuisance)
    with_errors, without = (
        np.abs(RidgeBaseline(1e-6, "raw", use).fit(known).predict(known.flux, known.flux_error)[0] - labels).max()
        for use in (True, False)
    )
    assert with_errors < 1e-3 < 0.5 < without


# --------------------------------------------------------------------------------------------------------------- Cannon


def test_the_slopes_of_the_quadratic_are_its_derivatives():
    x = np.random.default_rng(0).normal(size=(5, 3))
    slopes, step = _quadratic_slopes(x), 1e-6
    for quantity in range(3):
        shift = step * np.eye(3)[quantity]
        np.testing.assert_allclose(
            slopes[:, quantity], (_quadratic(x + shift) - _quadratic(x - shift)) / (2 * step), atol=1e-8
        )


def test_the_cannon_recovers_labels_of_spectra_made_by_a_quadratic_model_within_its_formal_errors():
    train, test = make_spectra(seed=2, noise=0.02), make_spectra(seed=3, noise=0.02)
    figures = figures_of(CannonBaseline(transform="raw").fit(train), test)
    assert [f["robust_z"] for f in figures] == pytest.approx([1, 1], abs=0.1)
    assert figures[0]["rmse"] < 40 and figures[1]["rmse"] < 0.03
    noiseless = make_spectra(50, seed=4, noise=1e-6)
    values, _ = (
        CannonBaseline(transform="raw")
        .fit(make_spectra(seed=2, noise=1e-6))
        .predict(noiseless.flux, noiseless.flux_error)
    )
    np.testing.assert_allclose(values, noiseless.labels, rtol=1e-4, atol=1e-4)


def test_the_cannon_tells_intrinsic_scatter_from_noise():
    cannon = CannonBaseline(transform="raw").fit(make_spectra(4000, noise=0.02, scatter=0.03))
    np.testing.assert_allclose(np.sqrt(cannon.scatter2), 0.03, rtol=0.1)
    quiet = CannonBaseline(transform="raw").fit(make_spectra(4000, noise=0.02))
    assert np.sqrt(quiet.scatter2).max() < 0.01


def test_a_nuisance_is_fitted_with_the_labels_and_not_asked_for():
    train, test = make_spectra(seed=2, nuisance=True), make_spectra(seed=3, nuisance=True)
    blind = Spectra(test.flux, test.flux_error, test.labels, test.label_errors, np.full(test.nuisance.shape, np.nan))
    informed, ignorant = (
        figures_of(CannonBaseline(transform="raw", use_nuisance=use).fit(train), blind)[0]["robust_scatter"]
        for use in (True, False)
    )
    assert informed < 12 < 15 < ignorant


def test_decorrelated_misfits_make_the_formal_errors_honest():
    train, test = make_spectra(seed=2, shared=0.2), make_spectra(seed=3, shared=0.2)
    plain, decorrelated = (
        figures_of(CannonBaseline(transform="raw", decorrelate=choice).fit(train), test) for choice in (False, True)
    )
    assert decorrelated[0]["robust_scatter"] < 0.5 * plain[0]["robust_scatter"]
    assert [f["robust_z"] for f in decorrelated] == pytest.approx([1, 1], abs=0.1)
    assert abs(plain[0]["robust_z"] - 1) > 0.2


def test_a_prior_decides_where_the_spectrum_says_nothing():
    train = make_spectra(seed=2)
    cannon = CannonBaseline(transform="raw", use_prior=True).fit(train)
    values, errors = cannon.predict(np.full((1, N_PIXELS), 2.0), np.full((1, N_PIXELS), 1e6))
    np.testing.assert_allclose(values[0], train.labels.mean(axis=0), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(errors[0], train.labels.std(axis=0), rtol=1e-3)


def test_the_cannon_needs_stars_of_which_all_labels_are_known():
    train = make_spectra(400, seed=2)
    train.labels[::3, 1] = np.nan
    assert figures_of(CannonBaseline(transform="raw").fit(train), make_spectra(100, seed=3))[0]["robust_scatter"] < 20
    train.labels[:, 1] = np.nan
    with pytest.raises(ValueError, match=r"train.labels: expected stars with all labels known, got none"):
        CannonBaseline(transform="raw").fit(train)


# ------------------------------------------------------------------------------------------------------------------ MLP


def test_the_mlp_learns_labels_and_how_well_it_knows_them():
    # The noise of half of the stars is tenfold, as the errors say.
    def uneven(seed):
        quiet, loud = make_spectra(seed=seed), make_spectra(seed=seed + 100, noise=0.1)
        return Spectra(
            *(
                np.concatenate([getattr(quiet, name), getattr(loud, name)])
                for name in ("flux", "flux_error", "labels", "label_errors", "nuisance")
            )
        )

    test = uneven(5)
    mlp = MLPBaseline(**{**SMALL_MLP, "batch_size": 128}, errors_as_inputs=True, learning_rate=3e-3, ema=0.9)
    values, errors = mlp.fit(uneven(2)).predict(test.flux, test.flux_error)
    half = len(test) // 2
    for part, limit in ((slice(None, half), 25), (slice(half, None), 150)):
        figures = label_metrics(values[part, 0], errors[part, 0], test.labels[part, 0])
        assert figures["robust_scatter"] < limit
        assert 0.8 < figures["robust_z"] < 1.25
    assert np.median(errors[half:, 0]) > 5 * np.median(errors[:half, 0])


@pytest.mark.parametrize(
    "setting", [{"noise": 1.0}, {"dropout": 0.1}, {"ema": 0.9}, {"weight_decay": 0.5}, {"seed": 1}]
)
def test_each_setting_of_the_mlp_takes_effect(setting):
    train = make_spectra(200)
    plain, changed = (
        MLPBaseline(**{**SMALL_MLP, "epochs": 2, **more}).fit(train).predict(train.flux, train.flux_error)[0]
        for more in ({}, setting)
    )
    assert np.abs(plain - changed).max() > 1e-3


def test_the_mlp_leaves_out_labels_that_are_unknown():
    train, test = make_spectra(seed=2), make_spectra(300, seed=3)
    train.labels[::2, 1] = np.nan
    train.label_errors[::2, 1] = np.nan
    figures = figures_of(MLPBaseline(**SMALL_MLP).fit(train), test)
    assert figures[0]["robust_scatter"] < 100 and figures[1]["robust_scatter"] < 0.08


def test_label_errors_keep_noisy_labels_from_misleading_the_mlp():
    train = make_spectra(seed=2)
    random = np.random.default_rng(0)
    labels, label_errors = train.labels.copy(), train.label_errors.copy()
    labels[::2, 0] += 1000 + random.normal(0, 1000, len(labels[::2]))
    label_errors[::2, 0] = 1500
    test = make_spectra(300, seed=3)
    aware, unaware = (
        abs(
            figures_of(
                MLPBaseline(**SMALL_MLP).fit(Spectra(train.flux, train.flux_error, labels, sigma, train.nuisance)), test
            )[0]["bias"]
        )
        for sigma in (label_errors, train.label_errors)
    )
    assert aware < 60 < unaware
