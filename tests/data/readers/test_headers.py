"""Medium, frame and dispersions in FITS headers, compared with the written wavelengths."""

import numpy as np
import pytest
from astropy.io import fits

from spectrafm_hf.data.readers import read_spectra
from spectrafm_hf.models.gate_spectrafm import air_to_vacuum


LIGHT = 299_792.458
PIXEL = np.arange(601.0)
LINEAR = 4800.0 + PIXEL
LOGARITHMIC = 4800.0 * np.exp(2e-4 * PIXEL)
BY_FREQUENCY = 1 / np.linspace(1 / 4800, 1 / 5400, 601)


def image(path, *others, flux=None, shape=None, **cards):
    first = fits.PrimaryHDU(np.linspace(1.0, 2.0, 601) if flux is None else flux)
    if shape:
        first.data = first.data.reshape(shape)
    for name, value in cards.items():
        first.header[name.replace("__", "-")] = value
    fits.HDUList([first, *others]).writeto(path)
    return path


def one(path, **options):
    (row,) = read_spectra([path], **options)
    return row


START = {"CRVAL1": 4800.0, "CDELT1": 1.0, "CRPIX1": 1.0}


@pytest.mark.parametrize(
    ("cards", "wavelength"),
    [
        ({"CRVAL1": 4800.0, "CDELT1": 1.0, "PC1_1": 1.0}, LINEAR),
        ({"CRVAL1": 4800.0, "CDELT1": 2.0, "PC1_1": 0.5}, LINEAR),
        ({"CRVAL1": 4.8e-7, "CDELT1": 1e-10, "CUNIT1": "m"}, LINEAR),
        ({"CRVAL1": 4.8e-7, "CDELT1": 1e-10, "CTYPE1": "WAVE"}, LINEAR),
        ({"CRVAL1": np.log(4800), "CDELT1": 2e-4, "CTYPE1": "log(wavelength)"}, LOGARITHMIC),
        ({"CRVAL1": np.log10(480), "CDELT1": 2e-4 / np.log(10), "CUNIT1": "log(nm)"}, LOGARITHMIC),
        (
            {
                "CRVAL1": np.log10(4800),
                "CDELT1": 2e-4 / np.log(10),
                "WAT1_001": "wtype=linear label=Wavelength units=log(Angstroms)",
            },
            LOGARITHMIC,
        ),
        ({"CRVAL1": 4800.0, "CDELT1": 4800 * 2e-4, "CTYPE1": "WAVE-LOG", "CUNIT1": "Angstrom"}, LOGARITHMIC),
        ({"CTYPE1": "FREQ", "CUNIT1": "THz", "CRVAL1": LIGHT / 480, "CDELT1": -0.1}, None),
        ({"CTYPE1": "WAVN", "CUNIT1": "cm-1", "CRVAL1": 1e8 / 4800, "CDELT1": -1e4 / 2592}, BY_FREQUENCY),
        (
            {
                "CTYPE1": "WAVE-F2W",
                "CUNIT1": "Angstrom",
                "CRVAL1": 4800.0,
                "CDELT1": -(4800.0**2) * (1 / 5400 - 1 / 4800) / 600,
            },
            BY_FREQUENCY,
        ),
    ],
)  # fmt: skip
def test_dispersions_give_their_wavelengths(tmp_path, cards, wavelength):
    if wavelength is None:
        wavelength = LIGHT * 10 / (cards["CRVAL1"] + cards["CDELT1"] * PIXEL)
    row = one(image(tmp_path / "a.fits", CRPIX1=1.0, **cards))
    assert row["wavelength"] == pytest.approx(wavelength, rel=1e-6)


def test_wavelengths_are_read_from_a_table_named_by_the_axis(tmp_path):
    uneven = LINEAR + 0.3 * np.sin(PIXEL)
    column = fits.Column("lambda", "601D", array=uneven[None], unit="Angstrom", dim="(1,601)")
    beside = fits.BinTableHDU.from_columns([column], name="WCS-TABLE")
    cards = {"CTYPE1": "WAVE-TAB", "CUNIT1": "Angstrom", "CRVAL1": 1.0, "CDELT1": 1.0, "CRPIX1": 1.0, "PS1_1": "lambda"}
    row = one(image(tmp_path / "a.fits", beside, **cards, PS1_0="WCS-TABLE"))
    assert row["wavelength"] == pytest.approx(uneven, rel=1e-6)
    with pytest.raises(ValueError, match="wavelength: expected the table ELSEWHERE with lambda in"):
        one(image(tmp_path / "b.fits", beside, **cards, PS1_0="ELSEWHERE"))


def test_a_spectrum_along_the_third_axis_of_a_cube_has_the_cards_of_that_axis(tmp_path):
    cards = {"CRVAL1": 266.4, "CDELT1": -0.1, "CTYPE1": "RA---TAN", "CRVAL2": -29.0, "CTYPE2": "DEC--TAN"}
    cards |= {"CRVAL3": 480.0, "CDELT3": 0.1, "CRPIX3": 1.0, "CTYPE3": "AWAV", "CUNIT3": "nm"}
    row = one(image(tmp_path / "a.fits", shape=(601, 1, 1), **cards))
    assert row["wavelength"] == pytest.approx(air_to_vacuum(LINEAR), rel=1e-6)
    assert "medium_unstated" not in row["flags"]


def test_the_variance_of_muse_is_not_taken_for_errors(tmp_path):
    flux = np.linspace(1.0, 2.0, 601)
    parts = [fits.ImageHDU(flux, name="DATA"), fits.ImageHDU((0.02 * flux) ** 2, name="STAT")]
    for part, unit in zip(
        parts, ("10**(-20)*erg/s/cm**2/Angstrom", "(10**(-20)*erg/s/cm**2/Angstrom)**2"), strict=True
    ):
        part.header.update({**START, "CTYPE1": "AWAV", "CUNIT1": "Angstrom", "BUNIT": unit})
    fits.HDUList([fits.PrimaryHDU(), *parts]).writeto(tmp_path / "a.fits")
    row = one(tmp_path / "a.fits")
    assert row["flux_error"] / row["flux"] == pytest.approx(np.full(601, 0.02), rel=1e-5)
    assert row["flags"] == ["frame_unstated"]


@pytest.mark.parametrize(
    ("cards", "rest_frame"),
    [
        ({"SPECSYS": "SOURCE"}, True),
        ({"SPECSYS": "rest"}, True),
        ({"SPECSYS": "HELIOCENTRIC"}, False),
        ({"SPECSYS": "BARYCENT"}, False),
        ({"SPECSYS": "LSRK"}, False),
        ({"SPECSYS": "CMBDIPOL"}, False),
        ({"SPECSYS": "somewhere"}, None),
        ({}, None),
    ],
)
def test_the_frame_follows_the_header(tmp_path, cards, rest_frame):
    assert one(image(tmp_path / "a.fits", **START, **cards))["rest_frame"] is rest_frame


def test_the_redshift_of_the_source_shifts_observed_wavelengths(tmp_path):
    row = one(image(tmp_path / "a.fits", **START, SPECSYS="BARYCENT", ZSOURCE=1e-3))
    assert row["wavelength"][0] == pytest.approx(4800 / 1.001, abs=1e-3)
    with pytest.raises(ValueError, match="redshift: expected a star, with one below 0.01, got 0.3"):
        one(image(tmp_path / "b.fits", **START, SPECSYS="BARYCENT", ZSOURCE=0.3))


@pytest.mark.parametrize(
    ("remark", "medium"),
    [
        ("Wavelengths are in air", "air"),
        ("Wavelength scale in vacuum, Angstrom", "vacuum"),
        ("air wavelengths converted to vacuum", None),
        ("Wavelengths in air were corrected to the frame of the Sun", None),
        ("Exposed to air for a while", None),
    ],
)
@pytest.mark.parametrize("card", ["COMMENT", "HISTORY"])
def test_clear_remarks_state_the_medium(tmp_path, card, remark, medium):
    row = one(image(tmp_path / "a.fits", **START, **{card: remark}))
    assert ("medium_unstated" in row["flags"]) == (medium is None)
    assert row["wavelength"][0] == pytest.approx(4801.34 if medium == "air" else 4800.0, abs=0.01)


@pytest.mark.parametrize("telescope", ["SDSS 2.5-M", "LCO Du Pont", ""])
@pytest.mark.parametrize(("kind", "redshift"), [("STAR", 1e-3), ("QSO", 1.2)])
def test_a_spectrum_of_sdss_is_known_by_its_tables_whichever_telescope_it_names(tmp_path, telescope, kind, redshift):
    pixels = {"FLUX": np.ones(601), "LOGLAM": np.log10(LINEAR), "IVAR": np.full(601, 4.0), "AND_MASK": np.zeros(601)}
    spectrum = fits.BinTableHDU.from_columns([fits.Column(name, "D", array=array) for name, array in pixels.items()])
    columns = [fits.Column("CLASS", "6A", array=[kind]), fits.Column("Z", "D", array=[redshift])]
    primary = fits.PrimaryHDU()
    primary.header["TELESCOP"] = telescope
    fits.HDUList([primary, spectrum, fits.BinTableHDU.from_columns(columns)]).writeto(tmp_path / "a.fits")
    if kind == "QSO":
        with pytest.raises(ValueError, match="object_class: expected a star, got QSO"):
            one(tmp_path / "a.fits")
    else:
        row = one(tmp_path / "a.fits")
        assert row["wavelength"][0] == pytest.approx(4800 / 1.001, abs=1e-3) and row["flags"] == []
        assert row["flux_error"][0] == 0.5
