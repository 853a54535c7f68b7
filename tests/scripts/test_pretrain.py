"""What `scripts/pretrain.py` finds out about errors after the training."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="module")
def pretrain():
    spec = importlib.util.spec_from_file_location("pretrain_script", Path(__file__).parents[2] / "scripts/pretrain.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_curves_make_the_errors_right_in_every_bin_of_temperature_and_noise(pretrain):
    random = np.random.default_rng(0)
    n = 20_000
    teff, unknown = random.uniform(3500, 6500, n), random.uniform(-8, -4, n)
    sigma = np.full(n, 0.1)
    true = sigma * np.exp(0.4 * (teff - 5000.0) / 1000.0 - 0.2 * (unknown + 6.0))
    label_error = np.full(n, 0.05)
    residual = np.hypot(true, label_error) * random.standard_normal(n)
    residual[::20] = np.nan
    residual[1::50] *= 30.0  # labels that are plainly wrong
    knots = [pretrain.TEMPERATURES, np.percentile(unknown, pretrain.UNKNOWN_KNOTS)]
    design = [pretrain.interpolation(x, k) for x, k in zip((teff, unknown), knots, strict=True)]
    factor, curves = pretrain.error_curves(residual, sigma, label_error, design)
    assert [len(curve) for curve in curves] == [len(pretrain.TEMPERATURES), len(pretrain.UNKNOWN_KNOTS)]
    ln = sum(part @ np.array(curve) for part, curve in zip(design, curves, strict=True))
    z = np.abs(residual) / np.hypot(sigma * factor * np.exp(ln), label_error)
    for x in (teff, unknown):
        for part in np.array_split(np.argsort(x), 8):
            assert 1.4826 * np.nanmedian(z[part]) == pytest.approx(1.0, abs=0.08)
    assert curves[0][-1] == pytest.approx(0.0, abs=1e-6)  # no star is there
