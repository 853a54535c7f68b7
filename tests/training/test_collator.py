"""The collator: rows of a data set -> batches, with augmentation in training."""

import numpy as np
import pytest
import torch
from datasets import Dataset

from spectrafm_hf import SpectraFMTokenizer
from spectrafm_hf.training.collator import SpectraFMCollator, _runs, extinction_curve, gaussian_noise


def make_rows(n_stars: int = 6, n_pixels: int = 40) -> list[dict]:
    generator = np.random.default_rng(0)
    return [
        {
            "wavelength": np.linspace(4000, 4780, n_pixels, dtype=np.float32),
            "flux": generator.uniform(0.5, 1.5, n_pixels).astype(np.float32),
            "flux_error": np.full(n_pixels, 0.01, dtype=np.float32),
            "mask": np.zeros(n_pixels, dtype=bool),
            "teff": np.float32(5000 + i),
            "teff_err": np.float32("nan") if i else np.float32(50),
            "bp_rp": np.float32("nan") if i % 2 else np.float32(1.0),
        }
        for i in range(n_stars)
    ]


TOKENIZER = SpectraFMTokenizer(label_names=["teff", "bp_rp"], clip=None)


class Shown(SpectraFMTokenizer):
    """A tokenizer that shows what it is given."""

    def __call__(self, **columns):
        return columns


def shown(rows, label_names=("teff",), **settings) -> dict:
    """Columns of spectra as the tokenizer gets them of a collator."""
    return SpectraFMCollator(Shown(label_names=["teff", "bp_rp"]), label_names, **settings)(rows)


def test_rows_become_model_inputs_with_labels_and_errors():
    batch = SpectraFMCollator(TOKENIZER, ["teff"], ["bp_rp"])(make_rows())
    assert batch["flux"].shape == (6, 40)
    assert batch["labels"].tolist() == [[5000.0 + i] for i in range(6)]
    assert batch["label_errors"][0] == 50 and torch.isnan(batch["label_errors"][1:]).all()
    assert batch["scalar_ids"].tolist() == [[3], [0], [3], [0], [3], [0]], "an unknown scalar is padding"


def test_columns_of_a_data_set_give_the_batch_that_its_rows_give():
    rows = make_rows()
    columns = Dataset.from_list(rows).with_format("numpy")[:]
    collator = SpectraFMCollator(TOKENIZER, ["teff"], ["bp_rp"])
    for key, value in collator(rows).items():
        torch.testing.assert_close(collator(columns)[key], value, equal_nan=True, rtol=0, atol=0)


def test_spectra_of_different_length_are_augmented_and_padded():
    rows = make_rows()
    for key in ("wavelength", "flux", "flux_error", "mask"):
        rows[0][key] = rows[0][key][:17]
    batch = SpectraFMCollator(TOKENIZER, ["teff"], noise=1.0, pixel_dropout=0.1)(rows)
    lengths = batch["attention_mask"].sum(dim=1)
    assert lengths[0] <= 17 and (lengths[1:] > 20).all()


def test_noise_has_the_size_of_the_errors_and_is_new_at_each_call():
    rows = make_rows(n_stars=3000)
    torch.manual_seed(0)
    plain, first, second = shown(rows), shown(rows, noise=2.0), shown(rows, noise=2.0)
    # 2 u times the error, u uniform in 0-1: mean square 4/3 of the error's.
    added = (np.stack(first["flux"]) - np.stack(plain["flux"])) / 0.01
    assert abs(np.square(added).mean() - 4 / 3) < 0.1
    np.testing.assert_array_equal(first["flux_error"], plain["flux_error"])
    assert not np.array_equal(first["flux"], second["flux"])


def test_correlated_noise_keeps_its_size_and_fades_over_the_stated_width():
    noise = gaussian_noise(np.random.default_rng(0), (4000, 60), 1.5)
    assert noise.dtype == np.float32 and noise.shape == (4000, 60)
    # At the ends of the spectrum as in the middle.
    np.testing.assert_allclose(noise.std(axis=0), 1.0, atol=0.06)
    for distance in (1, 2, 4):
        expected = np.exp(-((distance / 1.5) ** 2) / 4)
        assert np.mean(noise[:, distance:] * noise[:, :-distance]) == pytest.approx(expected, abs=0.02)


def test_a_label_without_a_column_of_errors_is_learnt_without():
    batch = SpectraFMCollator(TOKENIZER, ["teff", "bp_rp"])(make_rows())
    assert batch["labels"].shape == batch["label_errors"].shape == (6, 2)
    assert torch.isnan(batch["label_errors"][:, 1]).all()


def test_the_same_torch_seed_gives_the_same_augmentation():
    collator = SpectraFMCollator(TOKENIZER, ["teff"], noise=1.0, pixel_dropout=0.2, error_dropout=0.5)
    torch.manual_seed(3)
    first = collator(make_rows())
    torch.manual_seed(3)
    second = collator(make_rows())
    assert all(torch.equal(first[key].nan_to_num(), second[key].nan_to_num()) for key in first)


def test_pixel_and_error_dropout_hide_their_share():
    rows = make_rows(n_stars=300)
    torch.manual_seed(0)
    columns = shown(rows, pixel_dropout=0.25, error_dropout=0.5)
    assert np.mean(columns["mask"]) == pytest.approx(0.25, abs=0.02)
    without = np.isnan(columns["flux_error"])
    assert (without == without[:, :1]).all() and 0.4 < without.mean() < 0.6


def test_sky_lines_mask_runs_of_the_share_that_is_drawn_for_each_star():
    share = np.linspace(0, 0.4, 200)
    masked = _runs((200, 4000), share[:, None], np.random.default_rng(0))
    np.testing.assert_allclose(masked.mean(axis=1), 1 - np.exp(-share), atol=0.12)  # they overlap
    assert masked.mean() == pytest.approx(np.mean(1 - np.exp(-share)), abs=0.01)
    edges = np.diff(np.pad(masked, ((0, 0), (1, 1))).astype(int), axis=1).ravel()
    lengths = np.flatnonzero(edges < 0) - np.flatnonzero(edges > 0)
    assert 12 < np.median(lengths) < 24 and (lengths < 3).mean() < 0.02
    assert np.abs(masked.mean(axis=0) - masked.mean()).max() < 0.12, "anywhere alike"


def test_sky_lines_hide_pixels_of_each_star_but_not_their_wavelengths():
    rows = make_rows(50, 400)
    columns = shown(rows, sky_lines=0.4)
    shares = np.mean(columns["mask"], axis=1)
    assert shares.mean() == pytest.approx(0.18, abs=0.05) and shares.std() > 0.05
    np.testing.assert_array_equal(columns["wavelength"], [row["wavelength"] for row in rows])


def test_reddening_dims_the_blue_more_than_the_red_and_keeps_the_signal_to_noise():
    rows = make_rows(n_stars=50)
    torch.manual_seed(0)
    reddened, original = shown(rows, reddening=0.5), shown(rows)
    ratio, of_errors = (np.divide(reddened[name], original[name]) for name in ("flux", "flux_error"))
    np.testing.assert_allclose(of_errors, ratio, rtol=1e-5)
    extinction = -2.5 * np.log10(ratio)
    # Between 4000 and 4780 A the curve falls from 1.4 to 1.2 A(V).
    np.testing.assert_allclose(extinction[:, -1] / extinction[:, 0], 0.84, atol=0.04)
    assert 0.4 < extinction[:, 20].std() / 1.28 < 0.6


def test_the_extinction_curve_is_one_in_the_v_band():
    curve = extinction_curve(np.array([5500.0, 22000.0]))
    assert abs(curve[0] - 1) < 0.02 and curve[1] < 0.15
    with pytest.raises(ValueError):
        extinction_curve(np.array([400.0]))


def test_a_tilt_is_smooth_and_keeps_the_signal_to_noise():
    rows = make_rows()
    torch.manual_seed(0)
    tilted, original = shown(rows, tilt=0.1), shown(rows)
    ratio, of_errors = (np.divide(tilted[name], original[name]) for name in ("flux", "flux_error"))
    assert np.log(ratio).std() > 0.03
    assert np.abs(np.diff(np.log(ratio), n=4, axis=1)).max() < 1e-3, "a polynomial of degree 3"
    np.testing.assert_allclose(of_errors, ratio, rtol=1e-5)


def test_a_cut_keeps_one_window_for_all_stars_and_every_star_keeps_some():
    torch.manual_seed(1)
    sizes = []
    for _ in range(20):
        kept = ~np.stack(shown(make_rows(), wavelength_cut=1.0)["mask"])
        assert (kept == kept[0]).all()
        pixels = np.flatnonzero(kept[0])
        assert len(pixels) == pixels[-1] - pixels[0] + 1
        sizes.append(len(pixels))
    assert min(sizes) >= 4 and max(sizes) <= 40 and len(set(sizes)) > 5


def test_a_star_that_would_lose_all_flux_is_not_cut():
    rows = make_rows()
    rows[2]["flux"][:20] = -0.1
    torch.manual_seed(0)
    whole = [not shown(rows, wavelength_cut=1.0)["mask"][2].any() for _ in range(30)]
    assert any(whole) and not all(whole)


def test_each_star_is_shifted_smoothed_and_degraded_by_a_draw_of_its_own():
    rows = make_rows(n_stars=400)
    for row in rows:
        row["flux"] = 1 - 0.5 * np.exp(-0.5 * ((row["wavelength"] - 4400) / 40) ** 2)
        row["flux_error"] = np.full(40, 1e-3, np.float32)
    torch.manual_seed(0)
    wavelength = rows[0]["wavelength"].astype(float)

    def moments(**augmentation):
        depth = 1.0 - np.stack(shown(rows, **augmentation)["flux"])
        center = (depth * wavelength).sum(axis=1) / depth.sum(axis=1)
        width = (depth * (wavelength - center[:, None]) ** 2).sum(axis=1) / depth.sum(axis=1)
        return center, np.sqrt(width)

    velocity = (moments(radial_velocity=100.0)[0] / 4400 - 1) * 299_792
    assert velocity.std() == pytest.approx(100, rel=0.1) and abs(velocity.mean()) < 15
    added = np.sqrt((moments(smoothing=2.0)[1] ** 2 - 40.0**2).clip(min=0)) / 20  # pixels of 20 A
    assert added.max() == pytest.approx(2.0, abs=0.1) and np.median(added) == pytest.approx(1.0, abs=0.2)

    columns = shown(rows, snr=[10, 100])
    snr = np.median(np.divide(columns["flux"], columns["flux_error"]), axis=1)
    assert 8 < snr.min() < 12 and 85 < snr.max() < 120
    assert np.median(snr) == pytest.approx(np.sqrt(10 * 100), rel=0.2)
    with pytest.raises(ValueError, match=r"snr: expected two positive numbers, the least first, got \[30, 10\]"):
        SpectraFMCollator(TOKENIZER, ["teff"], snr=[30, 10])


def test_a_resampled_batch_has_fewer_and_wider_pixels():
    torch.manual_seed(0)
    batches = [shown(make_rows(), resampling=0.5)["wavelength"] for _ in range(30)]
    layouts = {(len(batch[0]), round(float(batch[0][1] - batch[0][0]))) for batch in batches}
    assert layouts == {(40, 20), (20, 40), (13, 60)}


def test_all_of_it_at_once_for_spectra_of_different_length():
    rows = make_rows()
    for key in ("wavelength", "flux", "flux_error", "mask"):
        rows[0][key] = rows[0][key][:17]
    torch.manual_seed(0)
    everything = {"radial_velocity": 5, "smoothing": 1, "resampling": 1, "snr": (5, 50), "tilt": 0.1, "noise": 1}
    batch = SpectraFMCollator(TOKENIZER, ["teff"], **everything, noise_correlation=1)(rows)
    assert torch.isfinite(batch["flux"]).all()
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    assert 1 <= lengths[0] <= 8 < min(lengths[1:])


def test_the_draws_of_the_stars_decide_their_augmentation_and_nothing_else_does():
    rows = {**Dataset.from_list(make_rows()).with_format("numpy")[:], "draw": np.arange(6)}
    settings = {"noise": 1.0, "pixel_dropout": 0.2, "snr": (5, 50), "smoothing": 1.0}
    torch_state = torch.get_rng_state()
    first = shown(rows, **settings)["flux"]
    np.testing.assert_array_equal(first, shown(rows, **settings)["flux"])
    assert torch.equal(torch_state, torch.get_rng_state())
    assert not np.array_equal(first, shown({**rows, "draw": rows["draw"] + 6}, **settings)["flux"])
    assert not np.array_equal(first, shown(rows, seed=1, **settings)["flux"])


PIXELS = ("wavelength", "flux", "flux_error", "mask")


def test_a_split_batch_is_augmented_like_the_whole():
    rows = {**Dataset.from_list(make_rows()).with_format("numpy")[:], "draw": np.arange(12, 18)}
    settings = {
        **{"noise": 1.0, "noise_correlation": 1.5, "pixel_dropout": 0.2, "error_dropout": 0.5, "reddening": 0.1},
        **{"tilt": 0.1, "snr": (5, 50), "radial_velocity": 50.0, "smoothing": 1.0, "sky_lines": 0.3},
        **{"wavelength_cut": 0.5, "resampling": 0.5},
    }
    layouts = set()
    for seed in range(6):  # what is drawn for a batch is a chance
        whole, *parts = (
            shown({name: column[part] for name, column in rows.items()}, seed=seed, batch_size=6, **settings)
            for part in (slice(6), slice(2), slice(2, 6))
        )
        layouts.add(len(whole["flux"][0]))
        for name in PIXELS:
            np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), whole[name])
    assert len(layouts) > 1


def test_a_part_whose_spectra_have_one_length_is_augmented_as_within_a_batch_of_several():
    rows = [{**row, "draw": 40 + i} for i, row in enumerate(make_rows())]
    for key in PIXELS:
        rows[0][key] = rows[0][key][:17]
    settings = {"noise": 1.0, "snr": (5, 50), "pixel_dropout": 0.2, "sky_lines": 0.3}
    whole, part = shown(rows, **settings), shown(rows[2:], **settings)
    for name in PIXELS:
        np.testing.assert_array_equal(whole[name][2:], part[name])


def test_a_model_on_evidence_gets_resolving_power_and_normalisation(tiny_evidence, stars):
    model, tokenizer = tiny_evidence
    rows = [{**star, "resolving_power": 1000.0 + 100.0 * i, "teff": 5000.0} for i, star in enumerate(stars)]
    batch = SpectraFMCollator(tokenizer, ["teff"])(rows)
    expected = tokenizer(rows, labels=["teff"])
    for name in ("coefficients", "reliability", "labels"):
        torch.testing.assert_close(batch[name], expected[name], rtol=0, atol=0)
    assert not torch.equal(batch["coefficients"], tokenizer(stars)["coefficients"])
    assert torch.isfinite(model(**batch).loss)
