"""Corrections of a frozen model: they change what they are for and nothing else, and travel with the checkpoint."""

import numpy as np
import pytest
import torch
from test_modeling_evidence import LABELS, config, fill, tokens
from transformers import AutoModelForTimeSeriesPrediction

from spectrafm_hf.models import SpectraFMConfig, SpectraFMForPrediction
from spectrafm_hf.models.correction_spectrafm import (
    SpectraFMPixels,
    covariance,
    filled,
    mixed,
    own_variance,
    variance_of_inputs,
)


def settings(label="age", **changes):
    groups = ["answers", "shape", "coefficients"]
    values = dict(
        label=label, rung=0, inputs=["teff", "fe_h"], groups=groups, adds=False, stars=7, known=5, range=[0.0, 12.0],
        weight=1.0, beyond=1.0, pixels=-1,
    )  # fmt: skip
    return {**values, **changes}


def fill_correction(correction, seed=1):
    """Buffers of some process; that of the noise last."""
    generator = torch.Generator().manual_seed(seed)
    for buffer in correction.buffers():
        buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.1)
    correction.low.fill_(-100.0)
    correction.high.fill_(1e4)
    correction.factor.mul_(0.01)
    correction.noise.copy_(torch.tensor([1.0, 0.5, 0.0, -3.0, 3.0]))
    return correction


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = SpectraFMForPrediction(config(label_error_factors=[1.1, 1.2, 1.3])).eval()
    fill(model)
    return model


def ask(model, inputs=None):
    with torch.no_grad():
        return model(**(inputs or tokens()))


def test_when_a_label_is_new_then_all_other_answers_stay_bit_by_bit(model):
    before = ask(model)
    fill_correction(model.add_corrections([settings()], "Gyr", 5.0, 3.0)[0])
    after = ask(model)
    assert list(model.config.label_names) == [*LABELS, "age"] and model.config.label_units[-1] == "Gyr"
    assert torch.equal(after.predictions[:, :3], before.predictions) and torch.equal(
        after.prediction_errors[:, :3], before.prediction_errors
    )
    assert after.predictions[:, 3].isfinite().all() and (after.prediction_errors[:, 3] > 0).all()


def test_when_the_spectrum_is_of_another_rung_then_the_new_label_is_unknown_and_the_old_ones_stay(model):
    other = {**tokens(intervals=(6, 7)), "request_ids": torch.tensor([[2, 3]] * 4)}
    before = ask(model, other)
    fill_correction(model.add_corrections([settings()])[0])
    fill_correction(model.add_corrections([settings("logg", adds=True)])[0])
    assert torch.equal(ask(model, other).predictions, before.predictions)
    assert ask(model, {**other, "request_ids": torch.tensor([[5]] * 4)}).predictions.isnan().all()


def test_when_a_correction_adds_a_constant_then_the_answer_moves_by_it(model):
    before = ask(model)
    correction = model.add_corrections([settings("logg", groups=[], adds=True)])[0]
    correction.target.copy_(torch.tensor([0.85, 1.0, 2.0]))
    correction.noise.copy_(torch.tensor([0.01, 0.0, 0.0, 0.0, 0.0]))
    after = ask(model)
    row = LABELS.index("logg")
    np.testing.assert_allclose(after.predictions[:, row] - before.predictions[:, row], 0.85, atol=1e-5)
    np.testing.assert_allclose(after.prediction_errors[:, row], 0.2, rtol=1e-5)
    rest = [0, 2]
    assert torch.equal(after.predictions[:, rest], before.predictions[:, rest])


def test_when_a_label_is_corrected_again_then_the_last_one_counts(model):
    for shift in (1.0, 2.0):
        correction = model.add_corrections([settings("logg", groups=[], adds=True)])[0]
        correction.target[0] = shift
    assert len(model.corrections) == len(model.config.corrections) == 1
    torch.manual_seed(0)
    assert ask(model).predictions[:, 1].isfinite().all()
    with_both = ask(model).predictions[:, 1]
    model.drop_corrections()
    np.testing.assert_allclose(with_both - ask(model).predictions[:, 1], 2.0, atol=1e-5)


def test_when_an_input_is_unknown_then_the_answer_is_and_nothing_else(model):
    correction = fill_correction(model.add_corrections([settings()])[0])
    values, errors = torch.ones(3, 2), torch.ones(3, 2)
    values[1, 0] = torch.nan
    inputs = tokens(3, intervals=(1, 2))
    found, error = correction(
        values, errors, torch.zeros(3), inputs["coefficients"], inputs["reliability"], inputs["interval_ids"][0]
    )
    assert found.isnan().tolist() == error.isnan().tolist() == [False, True, False]


def test_when_it_is_saved_then_it_loads_with_its_own_code_and_says_the_same(model, tmp_path):
    fill_correction(model.add_corrections([settings()], "Gyr")[0])
    fill_correction(model.add_corrections([settings("logg", adds=True)])[0])
    model.save_pretrained(tmp_path)
    assert (tmp_path / "correction_spectrafm.py").is_file()
    again = AutoModelForTimeSeriesPrediction.from_pretrained(tmp_path, trust_remote_code=True).eval()
    assert torch.equal(ask(again).predictions, ask(model).predictions)
    half = SpectraFMForPrediction.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert half.corrections[0].stars.dtype == torch.float32
    assert half.to(torch.float16).corrections[0].stars.dtype == torch.float32


def test_when_new_labels_are_dropped_then_the_vocabulary_is_as_it_was(model):
    before = model.config.to_dict()
    fill_correction(model.add_corrections([settings()], "Gyr")[0])
    model.drop_corrections()
    after = model.config.to_dict()
    assert {key for key in after if after[key] != before[key]} <= {"network_labels"}
    assert ask(model).predictions.shape[1] == 3


def test_when_settings_do_not_fit_then_the_field_is_named():
    with pytest.raises(Exception, match="corrections: expected labels and inputs out of"):
        config(corrections=[{**settings(), "new": False}])
    with pytest.raises(Exception, match="corrections: expected weights that add up to 1 for a label and a rung"):
        config(corrections=[{**settings("logg", weight=0.5), "new": False}])
    with pytest.raises(Exception, match="corrections: expected pixels out of pixel_sets"):
        config(corrections=[{**settings("logg", groups=["pixels"]), "new": False}])
    with pytest.raises(Exception, match="corrections: expected rungs of rung_intervals"):
        config(corrections=[{**settings("logg", rung=5), "new": False}])
    with pytest.raises(ValueError, match="token_embedding='basis'"):
        SpectraFMForPrediction(SpectraFMConfig(hidden_size=16)).add_corrections([settings()])


def test_the_variance_of_a_star_is_the_diagonal_of_the_covariance():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    linear, length = torch.rand(2, 5, generator=generator, dtype=torch.float64) + 0.1
    amplitude = torch.tensor([0.3, 0.7], dtype=torch.float64)
    matrix = covariance(a, a, 10.0, linear, length, amplitude, [2, 3])
    np.testing.assert_allclose(matrix.diagonal(), own_variance(a, 10.0, linear, amplitude))
    assert torch.linalg.eigvalsh(matrix).min() > 0


def test_when_a_label_was_learnt_from_pixels_then_it_is_unknown_without_them(model):
    pixels = model.add_pixels(2, 5, 3)
    generator = torch.Generator().manual_seed(1)
    directions = torch.linalg.qr(torch.randn(5, 3, generator=generator)).Q
    pixels.directions.copy_(directions)
    pixels.scaled_directions.copy_(directions)
    entries = [settings(groups=["pixels"], weight=0.7, pixels=0), settings(groups=["answers"], weight=0.3)]
    for entry, correction in zip(entries, model.add_corrections(entries), strict=True):
        assert correction.pixels == entry["pixels"]
        fill_correction(correction)
    flux = torch.rand(4, 8, generator=generator)
    found = ask(model, {**tokens(), "pixels": flux}).predictions
    assert found[:, 3].isfinite().all()
    without = ask(model).predictions
    assert without[:, 3].isnan().all() and torch.equal(without[:, :3], found[:, :3])
    # Only its own columns count.
    others = flux.clone()
    others[:, [0, 1, 7]] += 1.0
    assert torch.equal(ask(model, {**tokens(), "pixels": others}).predictions[:, 3], found[:, 3])


def test_holes_are_filled_with_what_the_other_pixels_say():
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(40, 2, generator=generator, dtype=torch.float64)).Q
    flux = torch.randn(6, 2, generator=generator, dtype=torch.float64) @ directions.T
    holes = torch.rand(flux.shape, generator=generator) < 0.3
    found = filled(torch.where(holes, torch.nan, flux), directions)
    np.testing.assert_allclose(found, flux, atol=0.02)
    module = SpectraFMPixels(0, 40, 2).double()
    module.directions.copy_(directions)
    pixels = 0.1 * torch.sinh(flux)
    for name, whole in module(pixels).items():
        np.testing.assert_allclose(module(torch.where(holes, torch.nan, pixels))[name], whole, atol=0.05)


def test_when_processes_disagree_then_the_error_of_their_mean_is_larger():
    entries = [settings(weight=0.5, beyond=0.5)] * 2
    values, errors = [torch.tensor([1.0, 1.0]), torch.tensor([1.0, 3.0])], [torch.ones(2)] * 2
    mean, error = mixed(values, errors, entries)
    np.testing.assert_allclose(mean, [1.0, 2.0])
    np.testing.assert_allclose(error, [1.0, 2.0**0.5])


def test_beyond_the_range_other_weights_count():
    entries = [settings(weight=1.0, beyond=0.0, range=[0.0, 1.0]), settings(weight=0.0, beyond=1.0, range=[0.0, 1.0])]
    values, errors = (
        [torch.full((4,), 0.5), torch.tensor([0.9, 1.0, 1.05, 3.0])],
        [torch.ones(4), torch.full((4,), 0.1)],
    )
    mean, _ = mixed(values, errors, entries)
    np.testing.assert_allclose(mean, [0.5, 0.5, 0.775, 3.0], atol=1e-5)


def test_when_a_label_needs_a_scalar_then_it_is_asked_for_by_name(model):
    entries = [
        settings(groups=["known"], scalars=["bp_rp"], weight=1.0, beyond=1.0, blind=[0.0, 1.0]),
        settings(groups=["answers"], weight=0.0, beyond=0.0, blind=[1.0, 2.0]),
    ]
    before = ask(model)
    first, second = map(fill_correction, model.add_corrections(entries, "Gyr"))
    first.population.copy_(torch.tensor([[1.0, 0.5, 0.1, 0.0, 2.0]]))
    assert list(model.config.scalar_names) == ["bp_rp"] == model.config.scalars_of(["age"])
    with pytest.raises(ValueError, match="scalars: expected bp_rp, which age is predicted from, NaN where unknown"):
        ask(model)
    assert torch.equal(ask(model, {**tokens(), "request_ids": torch.tensor([[2, 3, 4]] * 4)}).predictions,
                       before.predictions)  # fmt: skip
    scalars = torch.tensor([[[0.5, 0.1]], [[1.5, 0.1]], [[torch.nan, 0.1]], [[9.0, 0.1]]])
    found = ask(model, {**tokens(), "scalars": scalars})
    assert torch.equal(found.predictions[:, :3], before.predictions)
    other = ask(model, {**tokens(), "scalars": scalars + torch.tensor([0.3, 0.0])})
    changed = (found.predictions != other.predictions)[:, 3]
    assert changed.tolist() == [True, True, False, False]
    assert model.blind(first, scalars).tolist() == [False, False, True, True]
    model.drop_corrections()
    assert list(model.config.scalar_names) == []


def test_the_less_is_known_of_a_scalar_the_nearer_it_is_to_the_usual(model):
    entry = settings(groups=["scalars"], scalars=["bp_rp"])
    (correction,) = model.add_corrections([entry])
    correction.population.copy_(torch.tensor([[1.0, 0.5, 0.5, 0.0, 2.0]]))
    scalars = torch.tensor([[[1.5, 0.0]], [[1.5, 0.5]], [[1.5, torch.nan]], [[torch.nan, 0.1]]])
    estimate, variance, known = correction.estimated(scalars)
    np.testing.assert_allclose(estimate[:, 0], [1.0, 0.5, 0.5, 0.0])
    np.testing.assert_allclose(variance[:, 0], [0.0, 0.5, 0.5, 1.0])
    assert known[:, 0].tolist() == [True, True, True, False]


def test_errors_of_inputs_add_what_the_slope_makes_of_them():
    """The variance of a linear part is its slope times that of the input; of a local part never more than its own."""
    unknown = torch.tensor([[0.0, 0.0], [0.0, 0.3], [0.0, 1e6]], dtype=torch.float64)
    linear, length = torch.tensor([5.0, 2.0]).double(), torch.ones(2).double()
    nothing, some = torch.zeros(1).double(), torch.ones(1).double()
    np.testing.assert_allclose(variance_of_inputs(unknown[:2], linear, length, nothing, [2]), [0.0, 0.6])
    found = variance_of_inputs(unknown, 0.0 * linear, length, some, [2])
    np.testing.assert_allclose(found, [0.0, 1.0 - 1.6**-0.5, 1.0], atol=1e-3)
