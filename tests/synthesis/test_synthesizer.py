import math
import shutil

import numpy as np
import pytest

from spectrafm_hf.models.modeling_emulator import default_vmicro
from spectrafm_hf.synthesis import LABEL_NAMES, Synthesizer, check_labels
from spectrafm_hf.synthesis.synthesizer import SOLAR_ABUNDANCES


needs_compiler = pytest.mark.skipif(shutil.which("gfortran") is None, reason="no gfortran to build Turbospectrum")


def test_labels_left_out_are_solar_and_of_usual_microturbulence():
    star = check_labels({"teff": 4600, "logg": 2.2, "mg_fe": 0.2})
    assert tuple(star) == LABEL_NAMES
    assert star["mg_fe"] == 0.2
    assert star["vmicro"] == pytest.approx(float(default_vmicro(4600, 2.2)))
    assert all(star[name] == 0 for name in LABEL_NAMES if name not in ("teff", "logg", "mg_fe", "vmicro"))


def test_labels_of_more_elements_are_kept_if_present():
    star = check_labels({"teff": 4600, "logg": 2.2, "li_fe": 2.5, "eu_fe": 0.3})
    assert tuple(star) == (*LABEL_NAMES, "li_fe", "eu_fe")
    assert star["li_fe"] == 2.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha_m": 0.2}, "alpha_m: expected one of the labels teff, logg, fe_h, .*vmicro, got another"),
        ({"Teff": 4600}, "Teff: expected one of the labels"),
        ({"teff": None}, "teff: expected among the labels, got logg"),
        ({"fe_h": math.nan}, "fe_h: expected a finite number, got nan"),
        ({"c_fe": 1.2}, "c_fe: expected -1 to 1, got 1.2"),
        ({"eu_fe": 1.2}, "eu_fe: expected -1 to 1, got 1.2"),
        ({"li_fe": 7.0}, "li_fe: expected -4 to 6, got 7"),
        ({"vmicro": -0.1}, "vmicro: expected 0 to 10, got -0.1"),
    ],
)
def test_bad_labels_are_refused_by_name(change, message):
    labels = {"teff": 4600, "logg": 2.2, **change}
    with pytest.raises(ValueError, match=message):
        check_labels({name: value for name, value in labels.items() if value is not None})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3000, 5000), "wavelength_min: expected 3300 to 25000 Angstrom, got 3000"),
        ((15000, 26000), "wavelength_max: expected 3300 to 25000 Angstrom, got 26000"),
        ((5000, 4000), "wavelength_max: expected above 5000, got 4000"),
        ((5000, 6000, 0.0), "step: expected 0.001 to 1 Angstrom, got 0"),
        ((3300, 25000, 0.01), "step: expected at most 990,000 steps in the range, got 2170413"),
    ],
)
def test_a_range_that_is_not_covered_is_refused_before_anything_is_fetched(arguments, message, tmp_path, monkeypatch):
    monkeypatch.setenv("SPECTRAFM_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=message):
        Synthesizer(*arguments)
    assert not (tmp_path / "cache").exists()


def test_a_relative_step_has_limits_of_its_own():
    with pytest.raises(ValueError, match=r"step: expected 1e-7 to 1e-4 in ln\(wavelength\), got 0.05"):
        Synthesizer(5000, 6000, relative=True)
    with pytest.raises(ValueError, match="step: expected at most 990,000 steps in the range, got 1841"):
        Synthesizer(5000, 6000, 1e-7, relative=True)


def test_solar_abundances_are_those_of_the_marcs_models():
    wanted = {6: 8.39, 7: 7.78, 8: 8.66, 12: 7.53, 13: 6.37, 14: 7.51, 20: 6.31, 22: 4.90, 25: 5.39, 26: 7.45, 28: 6.23}
    assert {number: SOLAR_ABUNDANCES[number] for number in wanted} == wanted
    assert SOLAR_ABUNDANCES[56] == 2.17 and SOLAR_ABUNDANCES[63] == 0.52 and SOLAR_ABUNDANCES[82] == 2.00


@pytest.mark.slow
@pytest.mark.network
@needs_compiler
def test_a_synthesised_star_has_its_lines_and_reacts_to_its_labels():
    synthesizer = Synthesizer(15890, 15900, 0.05)
    star = {"teff": 4600, "logg": 2.2, "fe_h": 0.0}
    wavelength, flux, continuum = synthesizer.synthesize(star)
    assert wavelength[0] >= 15890 and wavelength[-1] <= 15900 and np.diff(wavelength) == pytest.approx(0.05, rel=1e-2)
    assert wavelength[np.argmin(flux)] == pytest.approx(15892.8, abs=0.15)  # Si I
    assert 0.3 < flux.min() < 0.6 and 0.98 < flux.max() <= 1.0001
    # A black body of that temperature gives 9.4e5; H- lets light of deeper layers out.
    assert 5e5 < continuum.mean() < 3e6
    weaker = synthesizer.synthesize({**star, "si_fe": -0.3})
    assert (weaker.flux - flux).max() > 0.05 and (weaker.flux - flux).min() > -0.02  # molecules get stronger
    with pytest.raises(ValueError, match=r"teff: expected 2800 to 8000.*got 9000 \(m_h is the metallicity"):
        synthesizer.synthesize({**star, "teff": 9000})
    with pytest.raises(ValueError, match=r"there is none of teff 6\d+, logg 0, m_h 0 \(m_h is"):
        synthesizer.synthesize({**star, "teff": 6740, "logg": 0.1})


@pytest.mark.slow
@pytest.mark.network
@needs_compiler
def test_spherical_and_plane_parallel_transfer_agree_in_a_giant():
    star = {"teff": 4200, "logg": 0.9}
    flat = Synthesizer(15890, 15900, spherical_below=-1).synthesize(star)
    sphere = Synthesizer(15890, 15900, spherical_below=1).synthesize(star)
    assert 1e-4 < np.abs(flat.flux - sphere.flux).mean() < 0.02  # 2 % at most, at the core of Si I


@pytest.mark.slow
@pytest.mark.network
@needs_compiler
@pytest.mark.parametrize("start", [16715.0, 5000.03, 22010.77])
def test_a_range_may_start_anywhere(start):
    wavelength, flux, _ = Synthesizer(start, start + 6).synthesize({"teff": 5800, "logg": 4.4})
    assert wavelength[0] == pytest.approx(start, abs=0.1) and wavelength[-1] == pytest.approx(start + 6, abs=0.1)
    assert 0 < flux.min() < flux.max() < 1.001


@pytest.mark.slow
@pytest.mark.network
@needs_compiler
def test_steps_in_ln_wavelength_give_the_spectrum_that_steps_in_angstrom_give():
    star = {"teff": 5800, "logg": 4.4, "na_fe": 0.2}
    relative = Synthesizer(5890, 5900, 2e-6, relative=True)
    wavelength, flux, continuum = relative.synthesize(star)
    assert wavelength[0] == pytest.approx(5890, abs=0.02) and wavelength[-1] == pytest.approx(5900, abs=0.02)
    assert np.diff(np.log(wavelength)) == pytest.approx(2e-6, rel=1e-3)
    other = Synthesizer(5890, 5900, 0.01, spherical_below=-1).synthesize(star)
    difference = np.interp(other.wavelength, wavelength, flux) - other.flux
    # Steps in Angstrom are printed to 0.001 A: half a per cent at the flank of a line.
    assert np.abs(difference).max() < 0.01 and np.abs(difference).mean() < 5e-4
    assert continuum.mean() == pytest.approx(other.continuum.mean(), rel=1e-3)
    stars = {"teff": [5800.0, 9000.0], "logg": [4.4, 4.0], "fe_h": [0.0, 0.0], "mg_fe": [0.0, 0.0]}
    assert relative.covers({name: np.array(values) for name, values in stars.items()}).tolist() == [True, False]
