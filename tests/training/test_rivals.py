"""What one would do without a fine-tuned checkpoint: it learns, asks no star that it was fitted to, and is ranked."""

import importlib.machinery
import sys
import types

import numpy as np
import pytest

from spectrafm_hf.inference.states import States
from spectrafm_hf.training import rivals
from spectrafm_hf.training.rivals import RIVALS, Sample, ask_rivals, verdict


@pytest.fixture
def sample():
    """A label that is the depth of a line."""
    generator = np.random.default_rng(0)
    depth = generator.uniform(0.1, 0.6, 60)
    x = np.linspace(-1, 1, 30)
    flux = 1 - depth[:, None] * np.exp(-0.5 * (x / 0.2) ** 2) + 0.005 * generator.standard_normal((60, 30))
    flux[3, 4] = np.nan
    tokens = np.concatenate([5.0 * depth[:, None, None], np.ones((60, 1, 1))], axis=2)
    states = States(
        ["teff"],
        5000.0 + 500.0 * depth[:, None],
        np.ones((60, 1)),
        tokens,
        np.ones_like(tokens),
        flux,
        np.arange(flux.shape[1]),
    )
    return Sample(flux, np.full_like(flux, 0.005), states, depth[:, None], np.zeros((60, 1)))


def test_all_rivals_learn_from_the_fitted_and_answer_for_the_others(sample, monkeypatch):
    monkeypatch.setattr(rivals, "MLP_STEPS", 300)
    rows = np.arange(60)
    found = ask_rivals(sample, [(rows[:40], rows[40:])])
    assert set(found) == set(RIVALS)
    for name, (values, errors) in found.items():
        assert np.isnan(values[:40]).all() and (errors[40:] > 0).all()
        residual = values[40:, 0] - sample.labels[40:, 0]
        assert np.std(residual) < (0.03 if "pixels" in name and "MLP" not in name else 0.12), name


class StandIn:
    """What `tabicl.TabICLRegressor` takes and gives, by least squares; without weights where it may not fetch them."""

    weights = True

    def __init__(self, *, allow_auto_download=True, random_state=42):
        assert not allow_auto_download, "nothing is downloaded"

    def fit(self, inputs, target):
        if not self.weights:
            raise ValueError("Checkpoint not cached\nand automatic download is disabled.")
        self.solution = np.linalg.lstsq(np.c_[inputs, np.ones(len(inputs))], target)[0]
        return self

    def predict(self, inputs, output_type, alphas):
        assert output_type == ["mean", "quantiles"] and len(alphas) == 2
        mean = np.c_[inputs, np.ones(len(inputs))] @ self.solution
        return {"mean": mean, "quantiles": np.stack([mean - 0.1, mean + 0.1], axis=1)}


@pytest.mark.parametrize("weights", [True, False])
def test_tabicl_is_compared_where_it_is_installed_with_its_weights(sample, monkeypatch, weights):
    module = types.ModuleType("tabicl")
    module.TabICLRegressor, module.__spec__ = StandIn, importlib.machinery.ModuleSpec("tabicl", None)
    monkeypatch.setitem(sys.modules, "tabicl", module)
    monkeypatch.setattr(StandIn, "weights", weights)
    monkeypatch.setattr(rivals, "MLP_STEPS", 5)
    monkeypatch.setattr(rivals, "TABICL_COMPONENTS", 5)
    rows, messages = np.arange(60), []
    found = ask_rivals(sample, [(rows[:40], rows[40:])], say=messages.append)
    if weights:
        values, errors = found[rivals.TABICL]
        assert np.std(values[40:, 0] - sample.labels[40:, 0]) < 0.03 and (errors[40:] > 0).all()
        assert messages == []
    else:
        assert set(found) == set(RIVALS)
        assert messages == [
            "TabICL is installed but cannot be used, so it is not compared: Checkpoint not cached and automatic "
            "download is disabled."
        ]


def test_the_verdict_names_the_first_and_says_how_sure_it_is():
    own = np.full(50, 0.1)
    others = {"ridge": np.full(50, 0.3), "MLP": np.full(50, 0.2)}
    assert verdict("age", "Gyr", own, others) == (
        "age: fine-tuned is ahead, RMSE 0.1 Gyr; MLP 0.2 Gyr (ahead in 100% of bootstrap samples)"
    )
    assert verdict("age", "", 0.5 * own + 0.5, others).startswith("age: MLP is ahead, RMSE 0.2; fine-tuned 0.55 ")
