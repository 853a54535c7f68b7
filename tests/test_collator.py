"""The collator: rows of a data set -> batches, with augmentation in training."""

import numpy as np
import pytest
import torch
from datasets import Dataset

from spectrafm_hf import SpectraFMConfig, SpectraFMForPrediction, SpectraFMTokenizer
from spectrafm_hf.collator import SpectraFMCollator, _runs, extinction_curve, gaussian_noise


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


TOKENIZER = SpectraFMTokenizer(label_names=["teff", "bp_rp"], patch_size=8)


def test_rows_become_model_inputs_with_labels_and_errors():
    batch = SpectraFMCollator(TOKENIZER, ["teff"], ["bp_rp"])(make_rows())
    assert batch["flux"].shape == (6, 5, 8)
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
    assert batch["attention_mask"].sum(dim=1).tolist()[0] <= 3
    assert batch["attention_mask"][1:].sum() > 20


def test_noise_has_the_size_of_the_errors_and_is_new_at_each_call():
    rows = make_rows(n_stars=3000)
    torch.manual_seed(0)
    plain = SpectraFMCollator(TOKENIZER, ["teff"])(rows)
    collator = SpectraFMCollator(TOKENIZER, ["teff"], noise=2.0)
    first, second = collator(rows), collator(rows)
    # 2 u times the error, u uniform in 0-1: mean square 4/3 of the error's.
    added = (first["flux"] - plain["flux"]) / 0.01
    assert abs(added.square().mean().item() - 4 / 3) < 0.1
    assert torch.equal(first["flux_error"], plain["flux_error"])
    assert not torch.equal(first["flux"], second["flux"])


def test_correlated_noise_keeps_its_size_and_fades_over_the_given_width():
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
    batch = SpectraFMCollator(TOKENIZER, ["teff"], pixel_dropout=0.25, error_dropout=0.5)(rows)
    assert abs(batch["pixel_mask"].float().mean().item() - 0.75) < 0.02
    without_errors = (batch["flux_error"] == 0).all(dim=-1).all(dim=-1).float().mean().item()
    assert 0.4 < without_errors < 0.6


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
    plain, batch = (SpectraFMCollator(TOKENIZER, ["teff"], sky_lines=share)(rows) for share in (0.0, 0.4))
    shares = [1 - part["pixel_mask"].sum(dim=(1, 2)).numpy() / 400 for part in (plain, batch)]
    assert (shares[0] == 0).all() and shares[1].mean() == pytest.approx(0.18, abs=0.05) and shares[1].std() > 0.05


def test_reddening_dims_the_blue_more_than_the_red_and_keeps_the_signal_to_noise():
    rows = make_rows(n_stars=50)
    plain = SpectraFMTokenizer(label_names=["teff"], patch_size=40)
    torch.manual_seed(0)
    collator = SpectraFMCollator(plain, ["teff"], reddening=0.5)
    reddened, original = collator(rows), SpectraFMCollator(plain, ["teff"])(rows)
    ratio = (reddened["flux"] + 1) / (original["flux"] + 1)
    extinction = -2.5 * torch.log10(ratio)[:, 0]
    torch.testing.assert_close(reddened["flux_error"] / original["flux_error"], ratio, rtol=1e-4, atol=1e-5)
    # Between 4000 and 4780 A the curve falls from 1.4 to 1.2 A(V).
    assert torch.allclose(extinction[:, -1] / extinction[:, 0], torch.tensor(0.84), atol=0.04)
    assert 0.4 < extinction[:, 20].std() / 1.28 < 0.6


def test_the_extinction_curve_is_one_in_the_v_band():
    curve = extinction_curve(np.array([5500.0, 22000.0]))
    assert abs(curve[0] - 1) < 0.02 and curve[1] < 0.15
    with pytest.raises(ValueError):
        extinction_curve(np.array([400.0]))


def test_a_tilt_is_smooth_and_keeps_the_signal_to_noise():
    rows = make_rows()
    plain = SpectraFMTokenizer(label_names=["teff"], patch_size=40)
    torch.manual_seed(0)
    batch = SpectraFMCollator(plain, ["teff"], tilt=0.1)(rows)
    reference = SpectraFMCollator(plain, ["teff"])(rows)
    ratio = (1 + batch["flux"]) / (1 + reference["flux"])
    assert ratio.log().std() > 0.03
    assert ratio.log()[:, 0].diff(n=4).abs().max() < 1e-3, "a polynomial of degree 3"
    torch.testing.assert_close(batch["flux_error"] / reference["flux_error"], ratio, rtol=1e-4, atol=1e-4)


def test_a_cut_keeps_one_window_for_all_stars_and_every_star_keeps_some():
    torch.manual_seed(1)
    collator = SpectraFMCollator(TOKENIZER, ["teff"], wavelength_cut=1.0)
    sizes = []
    for _ in range(20):
        batch = collator(make_rows())
        kept = batch["pixel_mask"].flatten(1)
        assert (kept == kept[0]).all()
        pixels = torch.nonzero(kept[0])[:, 0]
        assert len(pixels) == pixels[-1] - pixels[0] + 1
        sizes.append(len(pixels))
    assert min(sizes) >= 4 and max(sizes) <= 40 and len(set(sizes)) > 5


def test_a_star_of_which_a_cut_leaves_no_flux_stays_whole():
    rows = make_rows()
    rows[2]["flux"][:20] = -0.1
    median = SpectraFMTokenizer(label_names=["teff"], patch_size=8, continuum="median")
    torch.manual_seed(0)
    collator = SpectraFMCollator(median, ["teff"], wavelength_cut=1.0)
    whole = [bool(collator(rows)["pixel_mask"][2].sum() == 40) for _ in range(30)]
    assert any(whole) and not all(whole)


def test_each_star_is_shifted_smoothed_and_degraded_by_a_draw_of_its_own():
    rows = make_rows(n_stars=400)
    for row in rows:
        row["flux"] = 1 - 0.5 * np.exp(-0.5 * ((row["wavelength"] - 4400) / 40) ** 2)
        row["flux_error"] = np.full(40, 1e-3, np.float32)
    plain = SpectraFMTokenizer(label_names=["teff"], patch_size=40)
    torch.manual_seed(0)
    wavelength = torch.from_numpy(rows[0]["wavelength"])

    def moments(**augmentation):
        depth = -SpectraFMCollator(plain, ["teff"], **augmentation)(rows)["flux"][:, 0]
        center = (depth * wavelength).sum(dim=1) / depth.sum(dim=1)
        width = (depth * (wavelength - center[:, None]) ** 2).sum(dim=1) / depth.sum(dim=1)
        return center, width.sqrt()

    velocity = (moments(radial_velocity=100.0)[0] / 4400 - 1) * 299_792
    assert velocity.std() == pytest.approx(100, rel=0.1) and abs(velocity.mean()) < 15
    added = (moments(smoothing=2.0)[1] ** 2 - 40.0**2).clamp(min=0).sqrt() / 20  # pixels of 20 A
    assert added.max() == pytest.approx(2.0, abs=0.1) and added.median() == pytest.approx(1.0, abs=0.2)

    batch = SpectraFMCollator(plain, ["teff"], snr=[10, 100])(rows)
    snr = ((1 + batch["flux"]) / batch["flux_error"])[:, 0].median(dim=1).values
    assert 8 < snr.min() < 12 and 85 < snr.max() < 120
    assert snr.median() == pytest.approx(np.sqrt(10 * 100), rel=0.2)
    with pytest.raises(ValueError, match=r"snr: expected two positive numbers, the least first, got \[30, 10\]"):
        SpectraFMCollator(plain, ["teff"], snr=[30, 10])


def test_a_resampled_batch_has_fewer_tokens_of_wider_pixels():
    torch.manual_seed(0)
    collator = SpectraFMCollator(TOKENIZER, ["teff"], resampling=0.5)
    layouts = {
        (batch["flux"].shape[1], round(batch["wavelength_step"][0, 0].item()))
        for batch in map(collator, [make_rows()] * 30)
    }
    assert layouts == {(5, 20), (3, 40), (2, 60)}
    rows = make_rows()
    for key in ("wavelength", "flux", "flux_error", "mask"):
        rows[0][key] = rows[0][key][:17]
    everything = {"radial_velocity": 5, "smoothing": 1, "resampling": 1, "snr": (5, 50), "tilt": 0.1, "noise": 1}
    batch = SpectraFMCollator(TOKENIZER, ["teff"], **everything, noise_correlation=1)(rows)
    assert torch.isfinite(batch["flux"]).all() and batch["attention_mask"].sum(dim=1)[0] == 1


def test_the_draws_of_the_stars_decide_their_augmentation_and_nothing_else_does():
    rows = {**Dataset.from_list(make_rows()).with_format("numpy")[:], "draw": np.arange(6)}
    settings = {"noise": 1.0, "pixel_dropout": 0.2, "snr": (5, 50), "smoothing": 1.0}
    collator = SpectraFMCollator(TOKENIZER, ["teff"], **settings)
    first, torch_state = collator(rows), torch.get_rng_state()
    assert torch.equal(first["flux"], collator(rows)["flux"])
    assert torch.equal(torch_state, torch.get_rng_state())
    assert not torch.equal(first["flux"], collator({**rows, "draw": rows["draw"] + 6})["flux"])
    assert not torch.equal(first["flux"], SpectraFMCollator(TOKENIZER, ["teff"], seed=1, **settings)(rows)["flux"])


def test_a_batch_in_parts_is_augmented_as_the_whole_is():
    rows = {**Dataset.from_list(make_rows()).with_format("numpy")[:], "draw": np.arange(12, 18)}
    settings = {
        **{"noise": 1.0, "noise_correlation": 1.5, "pixel_dropout": 0.2, "error_dropout": 0.5, "reddening": 0.1},
        **{"tilt": 0.1, "snr": (5, 50), "radial_velocity": 50.0, "smoothing": 1.0, "sky_lines": 0.3},
        **{"wavelength_cut": 0.5, "resampling": 0.5, "patch_phase": 0.5, "scalar_inputs": 0.5},
    }
    layouts = set()
    for seed in range(6):  # what is drawn for a batch is a chance
        collator = SpectraFMCollator(TOKENIZER, ["teff"], seed=seed, batch_size=6, **settings)
        whole = collator(rows)
        parts = [collator({name: column[part] for name, column in rows.items()}) for part in (slice(2), slice(2, 6))]
        layouts.add(whole["flux"].shape[1])
        for name in whole:
            if name not in ("scalar_ids", "scalar_values"):  # of which a part holds what its stars have
                torch.testing.assert_close(torch.cat([part[name] for part in parts]), whole[name], equal_nan=True)
    assert len(layouts) > 1


def test_a_part_whose_spectra_have_one_length_is_augmented_as_within_a_batch_of_several():
    rows = [{**row, "draw": 40 + i} for i, row in enumerate(make_rows())]
    for key in ("wavelength", "flux", "flux_error", "mask"):
        rows[0][key] = rows[0][key][:17]
    collator = SpectraFMCollator(TOKENIZER, ["teff"], noise=1.0, snr=(5, 50), pixel_dropout=0.2, sky_lines=0.3)
    whole, part = collator(rows), collator(rows[2:])
    for name in ("flux", "flux_error", "pixel_mask"):
        torch.testing.assert_close(whole[name][2:], part[name])


def test_patches_of_a_batch_may_start_elsewhere():
    torch.manual_seed(0)
    collator = SpectraFMCollator(TOKENIZER, ["teff"], patch_phase=0.7)
    first = [round((collator(make_rows())["wavelength"][0, 0].item() - 4070) / 20) for _ in range(60)]
    assert set(first) == set(range(8)), "pixels that are lost"
    assert 0.15 < np.mean(np.array(first) == 0) < 0.45


# ------------------------------------------------------------------------------------------- flux asked, labels given

GENERATION = {"flux_requests": 12, "flux_request_share": 1.0}


def generation_batches(rows, n=40, **settings):
    tokenizer = SpectraFMTokenizer(
        label_names=["teff", "bp_rp"], patch_size=8, continuum="median", standardize_scale=0.5, request_scale=0.1,
        request_center=1.0,
    )  # fmt: skip
    torch.manual_seed(0)
    collator = SpectraFMCollator(tokenizer, ["teff"], ["bp_rp"], **{**GENERATION, **settings})
    return [collator(rows) for _ in range(n)]


def test_flux_is_asked_for_of_a_window_of_the_spectrum_or_of_known_labels_alone():
    rows = make_rows()
    for row in rows:
        row["bp_rp"] = np.float32(1.0)
    rows[0]["mask"][::2] = True
    flux, wavelength = (np.stack([row[name] for row in rows]) for name in ("flux", "wavelength"))
    flux[0, ::2] = np.nan
    seen = set()
    for batch in generation_batches(rows, scalar_inputs=0.3):
        assert (batch["request_ids"][:, 2:] == 1).all()
        pixels = np.rint((batch["request_wavelength"][:, 2:].numpy() - 4000) / 20).astype(int)
        np.testing.assert_array_equal(batch["labels"][:, 2:], np.take_along_axis(flux, pixels, axis=1))
        np.testing.assert_allclose(batch["label_errors"][:, 2:], 0.01)
        # What is given is not asked for, and the other way round.
        known = batch.get("scalar_ids", torch.zeros((6, 0), dtype=int))
        for column, row in ((0, 2), (1, 3)):
            asked = torch.isfinite(batch["labels"][:, column])
            assert torch.equal(asked, ~(known == row).any(dim=1))
        if batch["flux"].shape[1] == 0:
            assert (known != 0).any(dim=1).all() and (batch["request_wavelength_step"] == 0).all()
            # The level is that of the whole spectrum.
            median = np.nanmedian(flux, axis=1, keepdims=True)
            np.testing.assert_allclose(
                batch["flux_scale"][:, 2:], np.broadcast_to(0.1 * median, pixels.shape), rtol=1e-5
            )
        else:
            window = batch["pixel_mask"][1].flatten().numpy()
            assert 0 < window.sum() < 40
            # The level is that of the window, as for who asks has nothing else.
            level = batch["flux_scale"][1, 2].numpy() / 0.1
            np.testing.assert_allclose(
                level, np.median((1 + 0.5 * batch["flux"][1].flatten()[window]) * level), rtol=1e-5
            )
        some_labels = batch["flux"].shape[1] == 0 and torch.isfinite(batch["labels"][:, :2]).any()
        assert batch["request_ids"].shape == (6, 4 if some_labels else 14), "as much weight for labels as for flux"
        seen.add((batch["flux"].shape[1] > 0, known.shape[1] > 0, bool((known != 0).all() and known.shape[1] == 2)))
    assert {(False, True, True), (False, True, False), (True, False, False)} <= seen


def test_a_model_takes_stars_without_a_spectrum_and_learns_from_flux_and_labels():
    model = SpectraFMForPrediction(
        SpectraFMConfig(label_names=["teff", "bp_rp"], label_units=["K", ""], label_centers=[5000.0, 1.0],
                        label_scales=[500.0, 0.5], patch_size=8, hidden_size=32)
    )  # fmt: skip
    rows = make_rows()
    for row in rows:
        row["bp_rp"] = np.float32(1.0)
    shapes = set()
    for batch in generation_batches(rows, n=8):
        loss = model(**batch).loss
        loss.backward()
        shapes.add(batch["flux"].shape[1] == 0)
        assert torch.isfinite(loss)
    assert shapes == {True, False}
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_a_star_of_which_nothing_is_known_keeps_its_spectrum():
    rows = make_rows()
    rows[3]["teff"] = rows[3]["bp_rp"] = np.float32("nan")
    assert all(batch["flux"].shape[1] > 0 for batch in generation_batches(rows, n=12))


def test_scalars_may_be_labels_that_are_known():
    rows = make_rows(n_stars=200)
    for row in rows:
        row["bp_rp"] = np.float32(1.0)
    tokenizer = SpectraFMTokenizer(label_names=["teff", "bp_rp", "logg"], patch_size=8)
    torch.manual_seed(0)
    collator = SpectraFMCollator(tokenizer, ["teff", "bp_rp"], scalar_inputs=0.5)
    given = []
    for _ in range(40):
        batch = collator(rows)
        asked = torch.isfinite(batch["labels"])
        assert torch.equal(asked.sum(1), 2 - (batch.get("scalar_ids", torch.zeros((200, 1))) != 0).sum(1))
        given.append(1 - asked.float().mean().item())
    assert 0.3 < np.mean(np.array(given) > 0) < 0.7
    assert np.std([share for share in given if share]) > 0.15, "some of them, many or few"


def test_flux_is_asked_for_of_stars_that_share_their_wavelengths():
    rows = make_rows()
    rows[0]["wavelength"] = rows[0]["wavelength"] + 1
    with pytest.raises(ValueError, match="flux_requests: expected stars that share their wavelengths"):
        generation_batches(rows, n=1)
    for key in ("wavelength", "flux", "flux_error", "mask"):
        rows[0][key] = rows[0][key][:17]
    with pytest.raises(ValueError, match="flux_requests: expected stars that share their wavelengths"):
        generation_batches(rows, n=1)
