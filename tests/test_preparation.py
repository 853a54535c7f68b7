"""The scale of flux that is asked for, measured on training stars."""

import numpy as np
import pytest
import torch

from spectrafm_hf.data.synthetic import SyntheticStars
from spectrafm_hf.prediction import TrainingRange
from spectrafm_hf.preparation import (
    _instruments,
    prepare_checkpoint,
    prepare_model,
    robust_center_and_scale,
    standardise_requests,
)
from spectrafm_hf.training import Recipe


MODEL = {"patch_size": 86, "hidden_size": 16, "encoder_attention_heads": [2], "encoder_ffn_dim": [16],
         "decoder_attention_heads": [2], "decoder_ffn_dim": [16], "readout_dims": [8], "num_filters": 4}  # fmt: skip


def asked(tokenizer, sample, pixels):
    """Flux at `pixels` as the model is asked for it, standardised."""
    inputs = tokenizer(sample["wavelength"], sample["flux"], requests=list(sample["wavelength"][0, pixels]))
    return (sample["flux"][:, pixels] - inputs["flux_center"].numpy()) / inputs["flux_scale"].numpy()


def test_flux_that_is_asked_for_is_in_units_of_its_scatter_where_the_input_is_a_ratio(tmp_path):
    sample = SyntheticStars("gaia-xp").draw(300, np.random.default_rng(0))
    recipe = Recipe(model={**MODEL, "flux_softening": 0.2}, tokenizer={"continuum": "median"})
    model, tokenizer, _ = prepare_model(recipe, [sample])
    before = asked(tokenizer, sample, slice(0, 343, 40))
    standardise_requests(model, tokenizer, [sample])
    center, scale = robust_center_and_scale(asked(tokenizer, sample, slice(0, 343, 40)))
    np.testing.assert_allclose(center, 0, atol=0.1)
    np.testing.assert_allclose(scale, 1, atol=0.02)
    assert abs(np.median(before) - 1) < 0.1, "which it is not of itself"

    # A model keeps the units that it has learnt in, also where it learns a new instrument, whose units are added.
    learnt = tokenizer.to_dict()
    standardise_requests(model, tokenizer, [{**sample, "flux": sample["flux"] ** 2}])
    assert tokenizer.to_dict() == learnt
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path)
    new = SyntheticStars("apogee").draw(100, np.random.default_rng(0))
    _, tokenizer, _ = prepare_checkpoint(Recipe(checkpoint=str(tmp_path)), [new])
    tokenizer = type(tokenizer)(**tokenizer.to_dict())  # the tables fit each other
    assert tokenizer.request_scale[:343].tolist() == learnt["request_scale"]
    center, scale = robust_center_and_scale(asked(tokenizer, new, slice(0, 7514, 500)))
    np.testing.assert_allclose(center, 0, atol=0.1)
    np.testing.assert_allclose(scale, 1, atol=0.02)


def test_another_continuum_beside_a_checkpoint_is_standardised_anew(tmp_path):
    samples = [SyntheticStars(name).draw(60, np.random.default_rng(0)) for name in ("apogee", "apogee-apstar")]
    recipe = Recipe(model={**MODEL, "flux_softening": 0.2}, tokenizer={"continuum": "median"})
    model, tokenizer, _ = prepare_model(recipe, samples[1:])
    assert np.isfinite(tokenizer.standardize_scale).all(), "also between the detectors, where all is masked"
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path)
    typical = [{**sample, "flux": 5 * sample["flux"]} for sample in samples]
    changes = {"continuum": "percentile", "continuum_window": 0.02}
    for settings in ({}, changes):
        _, changed, _ = prepare_checkpoint(Recipe(checkpoint=str(tmp_path), tokenizer=settings), typical)
        for sample in typical:
            inputs = changed(sample["wavelength"], sample["flux"], sample["flux_error"], sample["mask"])
            assert np.median(inputs["flux"][inputs["pixel_mask"]]) == pytest.approx(1, abs=2e-3)
    assert (changed.continuum, changed.continuum_window) == ("percentile", 0.02)
    assert np.median(changed.standardize_scale) < np.median(tokenizer.standardize_scale) - 0.005


def test_both_grids_of_apogee_are_one_range_of_wavelength():
    samples = [SyntheticStars(name).draw(20, np.random.default_rng(0)) for name in ("apogee", "apogee-apstar")]
    for order in (samples, samples[::-1]):
        found = _instruments(order)
        assert len(np.ravel(found["wavelength"])) == 2 and 15151 < found["wavelength"][0] < 15153
        training_range = TrainingRange({}, **found)
        for sample in samples:
            assert training_range.flags({name: column[0] for name, column in sample.items()}, {}) == []


def test_without_a_table_or_a_ratio_nothing_changes():
    sample = SyntheticStars("gaia-xp").draw(50, np.random.default_rng(0))
    torch.manual_seed(0)
    model, tokenizer, _ = prepare_model(Recipe(model=MODEL), [sample])
    standardise_requests(model, tokenizer, [sample])
    assert tokenizer.request_scale is None
