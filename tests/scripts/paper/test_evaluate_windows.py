# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Echelle spectra as Gaia RVS and GALAH would see them, and stars of Gaia RVS by the names of their files."""

import numpy as np
import pytest
from script_loader import load_script


@pytest.fixture(scope="module")
def script():
    return load_script("paper/evaluate_windows")


def echelle(low, high, power):
    wavelength = np.exp(np.arange(np.log(low), np.log(high), 0.4 / power))
    line = 1.0 - 0.8 * np.exp(-0.5 * ((wavelength - 8_600.0) / (8_600.0 / power / 2.3548)) ** 2)
    columns = {"wavelength": wavelength, "flux": line, "mask": np.zeros(len(wavelength), bool)}
    return columns | {"object_id": "one", "resolving_power": power}


def test_a_spectrum_is_cut_to_a_window_at_its_resolving_power(script):
    ranges, power = script.WINDOWS["Gaia RVS"]
    row = script.cut(echelle(8_000.0, 9_000.0, 60_000.0), ranges, power)
    assert row["resolving_power"] == power == 11_500.0 and not row["mask"].any()
    assert 8_460.0 < row["wavelength"][0] < 8_461.0 and 8_699.0 < row["wavelength"][-1] < 8_700.0
    np.testing.assert_allclose(row["flux_error"], row["flux"] / script.SNR, rtol=1e-5)
    depth, x = 1.0 - row["flux"], row["wavelength"] - 8_600.0
    width = np.sqrt(np.sum(depth * x**2) / depth.sum()) * 2.3548
    assert width == pytest.approx(8_600.0 / power, rel=0.05)


def test_a_spectrum_without_the_window_or_too_coarse_is_left_out(script):
    ranges, power = script.WINDOWS["Gaia RVS"]
    assert script.cut(echelle(5_000.0, 6_000.0, 60_000.0), ranges, power) is None
    assert script.cut(echelle(8_000.0, 9_000.0, 9_000.0), ranges, power) is None


def test_stars_of_gaia_are_found_by_the_names_of_their_files(script, tmp_path):
    lines = ["source_id,wavelength,flux,flux_error"]
    lines += [f"12,{846 + 0.01 * i:.2f},{1 - 0.1 * (i % 7 == 0)},0.01" for i in range(2401)]
    (tmp_path / "Kepler-93.csv").write_text("\n".join(lines) + "\n")
    text = script.report("spectrafm-base", [tmp_path])
    (row,) = [line for line in text.splitlines() if "Kepler-93" in line]
    assert "| 5669; 4.47; -0.18 |" in row and row.startswith("| Gaia RVS, observed |")
