"""The emulator: labels -> synthetic spectrum, loadable by the Auto classes, with checked limits."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel

from spectrafm_hf import SpectrumEmulator, bundled
from spectrafm_hf.models import default_vmicro


SUN = {"teff": 5777.0, "logg": 4.44, "fe_h": 0.0}


@pytest.fixture(scope="module")
def hband() -> SpectrumEmulator:
    return SpectrumEmulator.from_pretrained(bundled("emulator-hband"))


@pytest.fixture(scope="module")
def optical() -> SpectrumEmulator:
    return SpectrumEmulator.from_pretrained(bundled("emulator-optical"))


def test_the_h_band_comes_on_the_apstar_grid_divided_by_the_continuum(hband):
    wavelength, flux = hband.synthesize(**SUN)
    assert wavelength.dtype == np.float64 and flux.dtype == np.float32
    np.testing.assert_allclose(wavelength, 10 ** (4.179 + 6e-6 * np.arange(8575)), rtol=1e-7)
    assert flux.shape == (1, 8575)
    assert 0.97 < np.percentile(flux, 95) < 1.01 and 0.3 < flux.min() < 0.9


def test_the_optical_spectrum_of_a_hotter_star_is_brighter_and_bluer(optical):
    wavelength, flux = optical.synthesize(teff=[4800, 5800], logg=4.4, fe_h=0.0)
    blue, red = (wavelength > 4000) & (wavelength < 4500), (wavelength > 9000) & (wavelength < 9500)
    cool, hot = flux
    assert (hot > cool).mean() > 0.99
    assert hot[blue].mean() / hot[red].mean() > 1.3 * cool[blue].mean() / cool[red].mean()
    # A black body of the effective temperature gives the size of the flux: sigma T^4 / pi over this range.
    luminosity = 5.67e-5 * 5800.0**4
    assert 0.5 < hot.mean() * (wavelength[-1] - wavelength[0]) / luminosity < 0.9


def test_more_of_an_element_deepens_its_lines_and_hardly_the_rest(hband):
    labels = {"teff": 4600, "logg": 2.4, "fe_h": -0.2}
    wavelength, plain = hband.synthesize(**labels)
    _, rich = hband.synthesize(**labels, mg_fe=0.3)
    change = (rich - plain)[0]
    lines = np.zeros(wavelength.size, dtype=bool)
    for line in (15745.0, 15753.3, 15770.1):
        lines |= np.abs(wavelength - line) < 1.5
    assert change[lines].min() < -0.02
    # Magnesium gives electrons as well, which changes all lines, by far less.
    assert np.median(np.abs(change)) < 0.15 * np.abs(change[lines]).max()


def test_numbers_and_arrays_and_many_stars_at_once_give_the_same_spectra(hband):
    generator = np.random.default_rng(0)
    teff = generator.uniform(4500, 5000, 1500)
    _, together = hband.synthesize(teff=teff, logg=2.5, fe_h=[-0.1])
    assert together.shape == (1500, 8575)
    for star in (0, 1400):
        _, alone = hband.synthesize(teff=teff[star], logg=2.5, fe_h=-0.1)
        np.testing.assert_allclose(alone[0], together[star], atol=2e-6)


def test_microturbulence_left_out_is_the_usual_one(hband):
    _, plain = hband.synthesize(**SUN)
    _, same = hband.synthesize(**SUN, vmicro=default_vmicro(SUN["teff"], SUN["logg"]))
    _, other = hband.synthesize(**SUN, vmicro=2.0)
    assert np.array_equal(plain, same) and not np.allclose(plain, other, atol=1e-3)


def test_its_derivatives_are_those_of_finite_differences(hband):
    labels = torch.from_numpy(hband.label_table({"teff": 4700, "logg": 2.5, "fe_h": -0.3}))
    steps = {"teff": 20.0, "logg": 0.05, "fe_h": 0.03, "mg_fe": 0.03}
    for name, step in steps.items():
        direction = torch.zeros_like(labels)
        direction[0, hband.config.label_names.index(name)] = 1.0
        _, slope = torch.autograd.functional.jvp(lambda at: hband(at)[0], labels, direction)
        with torch.no_grad():
            finite = (hband(labels + step * direction)[0] - hband(labels - step * direction)[0]) / (2 * step)
        assert (slope - finite).norm() < 0.02 * finite.norm(), name


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({**SUN, "teff": 9000}, r"teff: expected 3122\.\d+ to 6761\.\d+ K, the range of the grid, got 9000 \(star 0\)"),
        ({**SUN, "teff": [5000, np.nan]}, r"teff: expected .* got nan \(star 1\)"),
        ({**SUN, "mg_fe": 2.0}, r"mg_fe: expected -0\.5 to 0\.6\d* dex, .* got 2"),
        ({**SUN, "eu_fe": 0.1}, r"labels: expected names out of .*got \['eu_fe'\]"),
        ({"teff": 5000.0, "logg": 4.0}, r"labels: expected at least .*got none for \['fe_h'\]"),
        ({"teff": 6500.0, "logg": 0.5, "fe_h": 0.0}, r"teff, logg, fe_h: expected a combination within .* 6500 K"),
        (
            {**SUN, "teff": [5000.0, 5100.0], "logg": [4.0, 4.1, 4.2]},
            "labels: expected numbers or arrays",
        ),
        ({**SUN, "normalized": False}, "normalized: expected True"),
    ],
)
def test_labels_that_it_cannot_know_are_errors_that_name_label_range_and_value(hband, labels, message):
    with pytest.raises(ValueError, match=message):
        hband.synthesize(**labels)


def test_covers_returns_which_stars_are_within_the_grid(hband):
    table = hband.label_table({"teff": [5777, 9000, 6500], "logg": [4.44, 4.0, 0.5], "fe_h": 0.0})
    assert hband.covers(table).tolist() == [True, False, False]


@pytest.mark.parametrize("name", ["emulator-hband", "emulator-optical"])
def test_a_bundled_emulator_saves_to_the_same_bytes_and_carries_its_code_then(tmp_path, name):
    emulator = SpectrumEmulator.from_pretrained(bundled(name))
    emulator.save_pretrained(tmp_path)
    weights = "model.safetensors"
    assert (tmp_path / weights).read_bytes() == Path(bundled(name), weights).read_bytes(), f"save {name} again"
    assert {path.name for path in tmp_path.glob("*.py")} == {"configuration_emulator.py", "modeling_emulator.py"}
    assert isinstance(AutoModel.from_pretrained(tmp_path), SpectrumEmulator)


def test_it_loads_with_its_own_code_where_the_package_is_not_imported(tmp_path, hband):
    hband.save_pretrained(tmp_path / "emulator")
    code = (
        "import sys; sys.modules['spectrafm_hf'] = None\n"
        "from transformers import AutoModel\n"
        f"emulator = AutoModel.from_pretrained({str(tmp_path / 'emulator')!r}, trust_remote_code=True)\n"
        "print(emulator.synthesize(teff=5000, logg=3.0, fe_h=0.0)[1].shape)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"HF_HOME": str(tmp_path)})
    assert run.stdout.strip() == "(1, 8575)", run.stderr


def test_saturated_lines_of_cool_giants_have_no_negative_flux(optical):
    labels = {"teff": 3250.0, "logg": 0.5, "fe_h": 0.0}
    table = torch.from_numpy(optical.label_table(labels))
    with torch.no_grad():
        as_fitted, _ = optical(table, None)
    assert (as_fitted < 0).any()
    _, flux = optical.synthesize(normalized=True, **labels)
    assert flux.min() == 0.0
    np.testing.assert_array_equal(flux[0][flux[0] > 0], as_fitted.numpy()[0][as_fitted.numpy()[0] > 0])
