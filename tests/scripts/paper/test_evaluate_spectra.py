# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Baselines for predicted spectra."""

import runpy
from pathlib import Path

import numpy as np
import pytest

from spectrafm_hf.synthesis.emulation import Grid


SCRIPT = Path(__file__).parents[3] / "scripts" / "paper" / "evaluate_spectra.py"


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(SCRIPT))


def test_figures_are_those_of_noise(script):
    generator = np.random.default_rng(0)
    truth = np.full((200, 500), 2.0)
    found = truth + 0.02 * generator.standard_normal(truth.shape)
    assert script["figures"](found, truth, np.full(truth.shape, 0.02)) == "1.00 %; 1.00 (1.00)"
    assert script["figures"](found, truth, np.full(truth.shape, 0.01)).startswith("1.00 %; 1.9")
    noise = 0.02 * np.sqrt(3)
    assert script["figures"](found, truth, np.full(truth.shape, 0.02), noise) == "1.00 %; 0.50 (0.50)"


def test_the_rivals_learn_a_quadratic_dependence(script):
    generator = np.random.default_rng(1)
    labels = generator.normal([4800.0, 2.5, -0.2], [400.0, 1.0, 0.3], (400, 3))
    x = (labels - [4800.0, 2.5, -0.2]) / [400.0, 1.0, 0.3]
    shapes = generator.standard_normal((4, 80))
    flux = 1.0 + 0.05 * np.stack([x[:, 0], x[:, 1], x[:, 2], x[:, 0] * x[:, 1]], axis=1) @ shapes
    fitted = Grid(["teff", "logg", "fe_h"], labels[:300], np.arange(80.0), flux[:300])
    np.testing.assert_allclose(script["cannon"](fitted, flux[:300], labels[300:]), flux[300:], atol=2e-3)
    seen, hidden = flux[:, :50], flux[:, 50:]
    found = script["by_components"](seen[:300], hidden[:300], seen[300:])
    np.testing.assert_allclose(found, hidden[300:], atol=5e-3)


def test_a_hole_is_masked_in_every_row(script):
    rows = [{"wavelength": np.arange(4000.0, 4100.0, 10.0), "mask": np.zeros(10, bool)} for _ in range(2)]
    masked, hole = script["with_hole"](rows, 4015.0, 4045.0)
    assert hole.tolist() == [False, False, True, True, True, *[False] * 5]
    assert all(row["mask"].sum() == 3 for row in masked)
    assert not rows[0]["mask"].any()
