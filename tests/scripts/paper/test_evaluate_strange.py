"""Objects that are not stars: their kinds, and models as seen by a spectrograph."""

from pathlib import Path

import numpy as np
import pytest
from script_loader import load_script


SCRIPTS = Path(__file__).parents[3] / "scripts/paper"


@pytest.fixture(scope="module")
def script():
    return load_script("paper/evaluate_strange")


def test_kinds_follow_the_table_and_the_type(script):
    source = {"OBJECT_TYPE": "VLM", "OPT_TYPE": "", "LIT_TYPE": "sdL3"}
    assert script.kind_of(source) == "L dwarfs"
    assert script.kind_of(source | {"OPT_TYPE": "M9"}) == "M dwarfs"
    assert script.kind_of(source | {"OBJECT_TYPE": "QSO"}) == "quasars"
    assert script.kind_of(source | {"OBJECT_TYPE": "SN"}) == ""


def test_models_are_seen_at_the_resolving_power_of_the_grid(script):
    wavelength = np.arange(3_000.0, 10_000.0, 0.2)
    flux = 1.0 - 0.5 * np.exp(-0.5 * ((wavelength - 6_564.6) / 0.3) ** 2)
    seen = script.smoothed(wavelength, flux)
    depth = 1.0 - seen
    width = np.sum(depth * np.gradient(script.GRID)) / depth.max() * 0.94  # of a Gaussian
    assert 6_564.6 / width == pytest.approx(script.POWER, rel=0.1)


def test_a_line_counts_refused_flagged_right_and_wrong_spectra(script):
    found = np.array([np.nan, 9_000.0, 5_000.0, 5_200.0, 6_900.0])
    sigma = np.array([np.nan, 100.0, 100.0, 100.0, 150.0])
    flags = np.array(["few pixels", "bad_pixels;edge", "bad_pixels", "", ""])
    things = script.of_any("things", [{}] * 5, (5_300.0, 5_400.0))
    assert script.line_of(things, found, sigma, flags) == "| things | 5 | 1 | 1 | 1 | 2 | 5950 ± 125 |"
    nothing = script.of_any("nothing", [{}] * 5)
    assert script.line_of(nothing, found, sigma, flags).startswith("| nothing | 5 | 1 | 1 | 0 | 3 |")


def test_waves_grow_and_have_noise(script):
    rows = list(script.waves(5, np.random.default_rng(0)))
    spread = [row["flux"].std() for row in rows]
    assert spread[0] == pytest.approx(0.01, rel=0.1) and spread == sorted(spread) and spread[-1] > 0.15
