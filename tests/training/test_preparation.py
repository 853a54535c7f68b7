"""Preparation of training: standardisation from training stars, and labels added to checkpoints."""

import numpy as np
import pytest
import torch

from spectrafm_hf import save_checkpoint
from spectrafm_hf.inference.training_range import TrainingRange
from spectrafm_hf.synthesis.synthetic import SyntheticStars
from spectrafm_hf.training.preparation import _instruments, freeze, prepare_checkpoint, prepare_model, rung_of
from spectrafm_hf.training.recipe import Recipe


MODEL = {"hidden_size": 16, "encoder_attention_heads": [2], "encoder_ffn_dim": [16],
         "decoder_attention_heads": [2], "decoder_ffn_dim": [16], "readout_dims": [8]}  # fmt: skip
RECIPE = Recipe(labels=["teff", "mg_fe"], units=["K", "dex"], model=MODEL)
N_PIXELS = 20
LEVEL, SCATTER = np.linspace(0.5, 2.0, N_PIXELS), np.linspace(0.02, 0.1, N_PIXELS)


def make_sample(n_stars: int = 2001, first: float = 5000.0, step: float = 2.0, seed: int = 0) -> dict:
    """Stars whose flux scatters around LEVEL as a Gaussian of SCATTER does."""
    generator = np.random.default_rng(seed)
    flux = LEVEL + SCATTER * generator.standard_normal((n_stars, N_PIXELS))
    return {
        "wavelength": np.tile(first + step * np.arange(N_PIXELS), (n_stars, 1)).astype(np.float32),
        "flux": flux.astype(np.float32),
        "flux_error": np.full(flux.shape, 0.01, np.float32),
        "mask": np.zeros(flux.shape, bool),
        "teff": np.linspace(4000.0, 6000.0, n_stars, dtype=np.float32),
        "mg_fe": generator.normal(0.1, 0.05, n_stars).astype(np.float32),
        "bp_rp": generator.normal(1.0, 0.2, n_stars).astype(np.float32),
    }


# ------------------------------------------------------------------------------------------------------- a new model


def test_the_table_is_median_and_robust_scatter_of_each_pixel():
    sample = make_sample()
    plain = prepare_model(RECIPE, [sample])[1]
    sample["flux"][:100] *= 50  # one in twenty is spoilt
    _, tokenizer, _ = prepare_model(RECIPE, [sample])
    np.testing.assert_array_equal(tokenizer.standardize_wavelength, sample["wavelength"][0])
    median = np.median(sample["flux"].astype(float), axis=0)
    np.testing.assert_allclose(tokenizer.standardize_center, median, rtol=1e-6)
    deviation = np.median(np.abs(sample["flux"] - median), axis=0)
    np.testing.assert_allclose(tokenizer.standardize_scale, 1.4826 * deviation, rtol=1e-4)
    np.testing.assert_allclose(plain.standardize_center, LEVEL, atol=0.01)
    np.testing.assert_allclose(plain.standardize_scale / SCATTER, 1.0, atol=0.1)
    inputs = tokenizer(sample["wavelength"][100:], sample["flux"][100:])
    assert abs(inputs["flux"][inputs["attention_mask"]].median().item()) < 0.1


def test_labels_and_scalars_have_their_median_scatter_and_range():
    sample = make_sample()
    sample["teff"][7] = np.nan
    recipe = Recipe(labels=["teff", "mg_fe"], units=["K", "dex"], scalars=["bp_rp"], model=MODEL)
    model, tokenizer, training_range = prepare_model(recipe, [sample])
    config = model.config
    assert tokenizer.label_names == list(config.label_names) == ["teff", "mg_fe", "bp_rp"]
    assert list(config.label_units) == ["K", "dex", ""] and config.token_embedding == "value"
    assert tokenizer.requests == ["teff", "mg_fe"]
    assert config.label_centers[0] == pytest.approx(5000, abs=2)
    assert config.label_scales[0] == pytest.approx(1.4826 * 500, rel=2e-3)
    np.testing.assert_allclose(config.label_centers[1:], [0.1, 1.0], atol=0.02)
    np.testing.assert_allclose(config.label_scales[1:], [0.05, 0.2], rtol=0.1)
    assert training_range.labels["teff"] == (4000.0, 6000.0)
    assert training_range.wavelength == (5000.0, 5038.0) and training_range.wavelength_step == (2.0, 2.0)
    assert torch.isfinite(model(**tokenizer(sample["wavelength"][:3], sample["flux"][:3])).predictions).all()


def test_masked_pixels_are_ignored_and_pixels_without_stars_are_interpolated():
    sample = make_sample()
    expected = prepare_model(RECIPE, [sample])[1]
    sample["flux"][:500, 3], sample["mask"][:500, 3] = 99.0, True
    sample["flux"][500:1000, 3] = np.nan
    sample["mask"][:, 8] = True
    sample["flux"][:, 12] = np.nan
    sample["flux"][:, 15] = 1.0  # a pixel in which all stars are alike has no scatter
    _, tokenizer, _ = prepare_model(RECIPE, [sample])
    for name, truth in (("standardize_center", LEVEL), ("standardize_scale", SCATTER)):
        found, before = getattr(tokenizer, name), getattr(expected, name)
        np.testing.assert_allclose(found[3], truth[3], rtol=0.1)
        for pixel in (8, 12, 15):
            assert found[pixel] == pytest.approx((before[pixel - 1] + before[pixel + 1]) / 2)
        others = np.setdiff1d(np.arange(N_PIXELS), [3, 8, 12, 15])
        np.testing.assert_array_equal(found[others], before[others])


def test_two_instruments_share_one_table_in_the_order_of_their_wavelengths():
    red, blue = make_sample(first=8000.0, seed=1), make_sample(first=5000.0)
    _, tokenizer, training_range = prepare_model(RECIPE, [red, blue])
    both = [prepare_model(RECIPE, [sample])[1] for sample in (blue, red)]
    for name in ("standardize_wavelength", "standardize_center", "standardize_scale"):
        np.testing.assert_array_equal(getattr(tokenizer, name), np.concatenate([getattr(one, name) for one in both]))
    assert sorted(training_range.wavelength) == [(5000.0, 5038.0), (8000.0, 8038.0)]


@pytest.mark.parametrize("first", [5000.0, 5030.0, 5038.0])
def test_instruments_that_overlap_are_refused(first):
    with pytest.raises(ValueError, match="wavelength: expected instruments that do not overlap .* got 5038 and "):
        prepare_model(RECIPE, [make_sample(), make_sample(first=first)])


def test_a_model_on_evidence_from_nothing_is_refused():
    recipe = Recipe(model={"token_embedding": "basis"})
    with pytest.raises(ValueError, match="model: expected token_embedding 'value', or a checkpoint .* got 'basis'"):
        prepare_model(recipe, [make_sample()])


def test_stars_that_cannot_be_measured_are_refused():
    moved = make_sample()
    moved["wavelength"][5] += 1
    ragged = make_sample(3)
    for name in ("wavelength", "flux", "mask"):
        ragged[name] = np.array([ragged[name][0], ragged[name][1][:9], ragged[name][2]], dtype=object)
    for sample in (moved, ragged):
        with pytest.raises(ValueError, match="wavelength: expected one grid for all stars of an instrument"):
            prepare_model(RECIPE, [sample])
    nothing = make_sample()
    nothing["mask"][:] = True
    with pytest.raises(ValueError, match="mask: expected good pixels in some of the stars, got none"):
        prepare_model(RECIPE, [nothing])
    with pytest.raises(ValueError, match=r"labels: expected columns of the data \(\[.*'teff'.*\]\), got 'c_fe'"):
        prepare_model(Recipe(labels=["c_fe"], units=["dex"], model=MODEL), [make_sample()])


def test_scalars_that_are_not_there_or_are_labels_are_refused():
    named = {"labels": ["teff"], "units": ["K"], "model": MODEL}
    with pytest.raises(ValueError, match=r"scalars: expected columns of the data \(\[.*'bp_rp'.*\]\), got 'parallax'"):
        prepare_model(Recipe(**named, scalars=["bp_rp", "parallax"]), [make_sample(50)])
    with pytest.raises(ValueError, match=r"scalars: expected columns that are not also labels .*, got \['teff'\]"):
        prepare_model(Recipe(**named, scalars=["teff", "bp_rp"]), [make_sample(50)])


def test_both_grids_of_apogee_are_one_range_of_wavelength():
    samples = [SyntheticStars(name).draw(20, np.random.default_rng(0)) for name in ("apogee", "apogee-apstar")]
    for order in (samples, samples[::-1]):
        found = _instruments(order)
        assert len(np.ravel(found["wavelength"])) == 2 and 15151 < found["wavelength"][0] < 15153
        training_range = TrainingRange({}, **found)
        for sample in samples:
            assert training_range.flags({name: column[0] for name, column in sample.items()}, {}) == []


# -------------------------------------------------------------------------------------------------------- a checkpoint


@pytest.fixture(params=["value", "basis"])
def checkpoint(request, tmp_path, tiny_model, tiny_tokenizer, tiny_evidence):
    """Folder of a checkpoint that asks for teff out of four labels, and says what it was trained on; its model."""
    model, tokenizer = tiny_evidence if request.param == "basis" else (tiny_model, tiny_tokenizer)
    tokenizer.requests = ["teff"]
    save_checkpoint(model, tokenizer, tmp_path / "checkpoint")
    labels = {"teff": (4500.0, 7000.0), "logg": (0.0, 5.0)}
    TrainingRange(labels, wavelength=(4900.0, 5100.0), wavelength_step=(1.0, 2.0)).save(tmp_path / "checkpoint")
    return tmp_path / "checkpoint", model


def test_a_checkpoint_gets_the_labels_that_it_lacks_and_keeps_its_answers(checkpoint):
    folder, before = checkpoint
    sample = make_sample()
    recipe = Recipe(checkpoint=str(folder), labels=["teff", "mg_fe"], units=["K", "dex"])
    model, tokenizer, training_range = prepare_checkpoint(recipe, [sample])
    names = ["teff", "logg", "fe_h", "alpha_m", "mg_fe"]
    assert tokenizer.label_names == list(model.config.label_names) == names
    assert model.config.label_units[-1] == "dex"
    assert model.config.label_centers[:4] == list(before.config.label_centers)
    assert model.config.label_centers[-1] == pytest.approx(0.1, abs=0.01)
    assert model.config.label_scales[-1] == pytest.approx(0.05, rel=0.1)
    assert tokenizer.requests == ["teff", "mg_fe"]
    inputs = tokenizer(sample["wavelength"][:3], sample["flux"][:3], sample["flux_error"][:3], requests=names)
    first_requests = {**inputs, "request_ids": inputs["request_ids"][:, :4]}
    with torch.no_grad():
        found, expected = model(**inputs), before(**first_requests)
    torch.testing.assert_close(found.predictions[:, :4], expected.predictions, rtol=1e-5, atol=1e-5)
    assert torch.isfinite(found.predictions[:, 4]).all()
    # Of labels all that it has seen; of wavelengths only these, as it may forget the others.
    assert training_range.labels["teff"] == (4000.0, 7000.0) and training_range.labels["logg"] == (0.0, 5.0)
    assert training_range.labels["mg_fe"] == (sample["mg_fe"].min(), sample["mg_fe"].max())
    assert training_range.wavelength == (5000.0, 5038.0)


def test_a_checkpoint_takes_other_dropout_and_requests_and_no_other_setting(checkpoint):
    folder, _ = checkpoint
    sample = make_sample(50)
    changes = {"model": {"dropout": 0.25}, "tokenizer": {"requests": ["logg", "teff"]}}
    known = {"checkpoint": str(folder), "labels": ["teff"], "units": ["K"]}
    model, tokenizer, _ = prepare_checkpoint(Recipe(**known, **changes), [sample])
    assert tokenizer.requests == ["logg", "teff"] and model.config.dropout == 0.25
    assert all(module.p == 0.25 for module in model.modules() if isinstance(module, torch.nn.Dropout))
    for field, settings in (("model", {"hidden_size": 32, "dropout": 0.1}), ("tokenizer", {"clip": 3.0})):
        with pytest.raises(ValueError, match=rf"{field}: expected only \(.*\) with a checkpoint, got \["):
            prepare_checkpoint(Recipe(**known, **{field: settings}), [sample])


def test_checkpoints_on_evidence_refuse_scalars_and_name_the_command_for_them(checkpoint):
    folder, before = checkpoint
    recipe = Recipe(checkpoint=str(folder), labels=["teff"], units=["K"], scalars=["bp_rp"])
    if before.config.token_embedding == "basis":
        command = "`spectrafm finetune --scalars bp_rp` learns labels from spectra and scalars"
        with pytest.raises(ValueError, match=rf"scalars: expected none .* got \['bp_rp'\] with .*; {command}"):
            prepare_checkpoint(recipe, [make_sample(50)])
        return
    sample = make_sample(50)
    model, tokenizer, _ = prepare_checkpoint(recipe, [sample])
    assert tokenizer.label_names[-1] == "bp_rp" and tokenizer.requests == ["teff"]
    assert model.config.label_centers[-1] == pytest.approx(np.median(sample["bp_rp"]))


def test_a_checkpoint_without_a_training_range_still_has_none(checkpoint):
    folder, _ = checkpoint
    (folder / "training_range.json").unlink()
    recipe = Recipe(checkpoint=str(folder), labels=["teff"], units=["K"])
    assert prepare_checkpoint(recipe, [make_sample(50)])[2] is None


def test_the_rung_of_samples_is_the_one_that_reads_all_of_them(tiny_evidence, tiny_tokenizer):
    _, tokenizer = tiny_evidence
    optical, h_band = make_sample(3), make_sample(3, first=15_100.0, step=0.3)
    assert rung_of(tokenizer, [optical]) == 0 and rung_of(tokenizer, [h_band, h_band]) == 1
    assert rung_of(tokenizer, [optical, h_band]) is None
    assert rung_of(tokenizer, [make_sample(3, first=9000.0)]) is None
    assert rung_of(tiny_tokenizer, [optical]) is None


# ------------------------------------------------------------------------------------------------------------ freezing


def test_frozen_parts_are_not_trained_and_the_others_are(tiny_model, tiny_evidence):
    evidence, _ = tiny_evidence
    for model, parts in ((tiny_model, ["decoder", "encoder.layers.0.mlp"]), (evidence, ["rungs.0", "model.rungs.1"])):
        freeze(model, parts)
        names = [f"model.{part.removeprefix('model.')}." for part in parts]
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad != name.startswith(tuple(names)), name


def test_unknown_parts_and_a_model_without_trainable_weights_are_refused(tiny_model):
    with pytest.raises(ValueError, match=r"freeze: expected modules .*'encoder.layers.0'.* got 'encoder.layers.7'"):
        freeze(tiny_model, ["encoder.layers.7"])
    with pytest.raises(ValueError, match=r"freeze: expected some weights left to train, got \['model', 'readout'\]"):
        freeze(tiny_model, ["model", "readout"])
