"""The scale of flux that is asked for, measured on training stars."""

import numpy as np
import torch

from spectrafm_hf.data.synthetic import SyntheticStars
from spectrafm_hf.preparation import prepare_checkpoint, prepare_model, robust_center_and_scale, standardise_requests
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
    np.testing.assert_allclose(center, 0, atol=0.02)
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
    assert tokenizer.request_scale[:343] == learnt["request_scale"]
    center, scale = robust_center_and_scale(asked(tokenizer, new, slice(0, 7514, 500)))
    np.testing.assert_allclose(center, 0, atol=0.02)
    np.testing.assert_allclose(scale, 1, atol=0.02)


def test_without_a_table_or_a_ratio_nothing_changes():
    sample = SyntheticStars("gaia-xp").draw(50, np.random.default_rng(0))
    torch.manual_seed(0)
    model, tokenizer, _ = prepare_model(Recipe(model=MODEL), [sample])
    standardise_requests(model, tokenizer, [sample])
    assert tokenizer.request_scale is None
