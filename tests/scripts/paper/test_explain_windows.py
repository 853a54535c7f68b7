"""The share of a response in windows, as a command."""

import re
import runpy
from pathlib import Path

import numpy as np
import pytest

from spectrafm_hf.synthesis.instruments import Instrument


SCRIPT = Path(__file__).parents[3] / "scripts" / "paper" / "explain_windows.py"


def test_a_response_in_its_windows_is_no_chance_and_one_elsewhere_is():
    in_windows = runpy.run_path(str(SCRIPT))["in_windows"]
    random = np.random.default_rng(0)
    weights = np.zeros(2000)
    weights[random.choice(2000, 20, replace=False)] = 0.5
    gradient = np.where(weights > 0, -1.0, 0.1)
    found = in_windows(gradient, weights, 10)
    assert found.share == pytest.approx(20 / (20 + 1980 * 0.01))
    assert found.p_value == pytest.approx(1 / 1982) and found.pixels == 0.01
    assert found.share / found.chance > 20
    elsewhere = in_windows(random.normal(size=2000), weights, 10)
    assert elsewhere.share / elsewhere.chance == pytest.approx(1.0, abs=0.7) and elsewhere.p_value > 0.05


def test_elements_are_read_in_their_windows(run_script, tmp_path):
    """Made-up windows of the wavelengths of three lines of Al, and of three where there is none."""
    step = np.log(10) * 6e-6
    windows = {"Al": (16723.5, 16755.1, 16767.9), "Ca": (15200.0, 15300.0, 15400.0), "Xx": (15200.0,)}
    wavelength = Instrument.load("apogee").wavelength
    weights = {
        name: sum(np.exp(-0.5 * (np.log(wavelength / line) / (2 * step)) ** 2) for line in lines)
        for name, lines in windows.items()
    }
    np.savez(tmp_path / "windows.npz", **weights)
    picture = tmp_path / "windows.png"
    arguments = ("--windows", tmp_path / "windows.npz", "--stars", 4, "--picture", picture)
    code, printed, error = run_script("paper/explain_windows.py", *arguments)
    assert code == 0, error
    rows = re.findall(r"^(\w+_fe) +[\d.]+ +[\d.]+ +([\d.]+) +([\d.]+)", printed, re.MULTILINE)
    ratios = {name: np.array(both, float) for name, *both in rows}  # of the checkpoint, and of the best estimate
    assert set(ratios) == {"al_fe", "ca_fe"} and min(ratios["al_fe"]) > 50 > 10 > max(ratios["ca_fe"])
    assert 0.5 < ratios["al_fe"][0] / ratios["al_fe"][1] < 1.5
    assert picture.stat().st_size > 10_000
    np.savez(tmp_path / "short.npz", Al=np.ones(7))
    code, _, error = run_script("paper/explain_windows.py", "--windows", tmp_path / "short.npz", "--stars", 1)
    assert code == 2 and "windows: expected 7514 weights, got (7,) of al_fe" in error
