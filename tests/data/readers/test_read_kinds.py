"""Files in the layouts of other instruments and programs: values are read as written."""

import gzip
import json
import pickle
import zipfile

import numpy as np
import pytest
from astropy import units as u
from astropy.io import fits
from astropy.io.votable import from_table
from astropy.table import Table

from spectrafm_hf.data.readers import read_spectra
from spectrafm_hf.data.readers.columns import by_meaning, find_columns, from_logarithm


WAVELENGTH = 5000.0 + 0.25 * np.arange(400)
RNG = np.random.default_rng(1)
FLUX = np.round(100 * (1 + 0.3 * np.sin(WAVELENGTH / 3)) + RNG.normal(size=400), 4)
ERROR = np.round(FLUX / (50 + 20 * np.sin(WAVELENGTH / 20)), 5)


def only(path, **how):
    (row,) = read_spectra([path], **how)
    return row


def is_the_star(row, errors=True, rtol=2e-5):
    np.testing.assert_allclose(row["wavelength"], WAVELENGTH, rtol=1e-6)
    scale = row["flux"][0] / FLUX[0]
    np.testing.assert_allclose(row["flux"], FLUX * scale, rtol=rtol)
    if errors:
        np.testing.assert_allclose(row["flux_error"], ERROR * scale, rtol=rtol)
    else:
        assert np.isnan(row["flux_error"]).all()
    return True


def lines(pattern, *columns):
    return "".join(pattern.format(*values) + "\n" for values in zip(*columns, strict=True))


PLAIN = lines("{:.3f},{:.4f},{:.5f}", WAVELENGTH, FLUX, ERROR)
SNR = lines("{:.3f},{:.4f},{:.9f}", WAVELENGTH, FLUX, FLUX / ERROR)
BYTES = """Title: Spectra
Authors: A.
Table: One spectrum
================================================================================
Byte-by-byte Description of file: t.txt
--------------------------------------------------------------------------------
   Bytes Format Units    Label  Explanations
--------------------------------------------------------------------------------
   1- 10 F10.3  0.1nm    Lambda  Wavelength
  12- 20 F9.4   ---      Flux    Flux
  22- 30 F9.5   ---      e_Flux  Error
--------------------------------------------------------------------------------
"""
TEXTS = {
    "utf-16": ("wavelength,flux,error\n" + PLAIN, "utf-16"),
    "utf-16 without a mark": ("wavelength,flux,error\n" + PLAIN, "utf-16-le"),
    "the other utf-16": ("wavelength,flux,error\n" + PLAIN, "utf-16-be"),
    "S/N instead of errors": ("wavelength,flux,snr\n" + SNR, "utf-8"),
    "S/N between blanks": ("# wave flux S/N\n" + SNR.replace(",", " "), "utf-8"),
    "units below the heading": (
        "wavelength,flux,error\nnm,counts,counts\n" + lines("{:.4f},{},{}", WAVELENGTH / 10, FLUX, ERROR),
        "utf-8",
    ),
    "units in brackets below the heading": (
        "wave flux err\n(nm) (-) (-)\n" + lines("{:.4f} {} {}", WAVELENGTH / 10, FLUX, ERROR),
        "utf-8",
    ),
    "bars": ("wavelength|flux|error\n" + PLAIN.replace(",", "|"), "utf-8"),
    "energies": ("energy (eV),flux,error\n" + lines("{:.9f},{},{}", 12398.41984332 / WAVELENGTH, FLUX, ERROR), "utf-8"),
    "a title above": ("HD 25 normalized by hand\n" + PLAIN.replace(",", " "), "utf-8"),
    "a title above a heading": (
        "HD 25 by hand\nlambda(nm) flux err\n" + lines("{:.4f} {} {}", WAVELENGTH / 10, FLUX, ERROR),
        "utf-8",
    ),
    "machine-readable": (BYTES + lines("{:10.3f} {:9.4f} {:9.5f}", WAVELENGTH, FLUX, ERROR), "utf-8"),
}


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize("packed", [False, True])
def test_texts(tmp_path, kind, packed):
    content, encoding = TEXTS[kind]
    path = tmp_path / ("star.csv.gz" if packed else "star.csv")
    path.write_bytes(gzip.compress(content.encode(encoding)) if packed else content.encode(encoding))
    row = only(path)
    order = np.argsort(row["wavelength"])
    assert is_the_star({name: row[name][order] for name in ("wavelength", "flux", "flux_error")})
    # Energies are in no medium.
    assert ("medium_unstated" in row["flags"]) is (kind != "energies")


def test_without_signal_or_ratio_a_pixel_is_masked(tmp_path):
    snr = FLUX / ERROR
    snr[3], snr[5], snr[7] = 0.0, -2.0, np.nan
    path = tmp_path / "a.csv"
    path.write_text("wavelength,flux,snr\n" + lines("{},{},{}", WAVELENGTH, FLUX, snr))
    row = only(path)
    assert np.flatnonzero(row["mask"]).tolist() == [3, 5, 7]
    np.testing.assert_allclose(row["flux_error"][10:], ERROR[10:], rtol=1e-6)


def test_errors_count_more_than_a_ratio_and_a_ratio_of_the_star_is_none_of_pixels(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("wavelength,flux,error,snr\n" + lines("{},{},{},7", WAVELENGTH, FLUX, ERROR))
    assert is_the_star(only(path))
    columns = [
        fits.Column("wave", "400D", array=WAVELENGTH[None], unit="Angstrom"),
        fits.Column("flux", "400D", array=FLUX[None]),
        fits.Column("snr", "D", array=np.array([50.0])),
    ]
    fits.BinTableHDU.from_columns(columns).writeto(tmp_path / "b.fits")
    assert is_the_star(only(tmp_path / "b.fits"), errors=False)
    np.savez(tmp_path / "c.npz", wavelength=WAVELENGTH, flux=FLUX, snr=np.array(50.0))
    assert is_the_star(only(tmp_path / "c.npz"), errors=False)
    assert "snr" not in find_columns(path, ["wave", "flux", "ivar", "SNR"])


def test_columns_that_only_the_observatory_names(tmp_path):
    table = Table({"a": WAVELENGTH * 1e-10 * u.m, "b": FLUX * u.Unit("W m-2 um-1"), "c": ERROR * u.Unit("W m-2 um-1")})
    file = from_table(table)
    utypes = ("spec:Data.SpectralAxis.Value", "spec:Data.FluxAxis.Value", "spec:Data.FluxAxis.Accuracy.StatError")
    for field, utype in zip(file.resources[0].tables[0].fields, utypes, strict=True):
        field.utype = utype
    file.to_xml(str(tmp_path / "a.xml"))
    assert is_the_star(only(tmp_path / "a.xml"))
    found = by_meaning(
        [("x", "em.wl;obs.atmos", ""), ("y", "phot.flux.density", ""), ("z", "stat.error;phot.flux", "")]
    )
    assert found == {"wavelength": "x", "flux": "y", "flux_error": "z"}
    assert by_meaning([("x", "meta.id", ""), ("y", "", "spec:Char.SpectralAxis.Coverage")]) == {}


def image(values, name=None, **cards):
    hdu = fits.ImageHDU(np.asarray(values, float), name=name)
    hdu.header.update({card.replace("_", "-"): value for card, value in cards.items()})
    return hdu


GRID = {"CRVAL1": 5000.0, "CDELT1": 0.25, "CRPIX1": 1.0}


def saved(path, *hdus):
    fits.HDUList([fits.PrimaryHDU(), *hdus]).writeto(path)
    return path


def test_rows_that_cards_name(tmp_path):
    logs = 3.69 + 1e-5 * np.arange(400)
    cards = {"CRVAL1": 3.69, "CDELT1": 1e-5, "CRPIX1": 1.0, "DC_FLAG": 1}
    cards |= {"ARRAY1": "Normalized flux spectrum", "ARRAY2": "Normalized error spectrum"}
    cards |= {"ARRAY3": "Normalized expected fluctuation spectrum"}
    row = only(saved(tmp_path / "a.fits", image([FLUX, ERROR, 2 * ERROR], **cards)))
    np.testing.assert_allclose(row["wavelength"], 10**logs, rtol=1e-6)
    np.testing.assert_allclose(row["flux"], FLUX, rtol=1e-6)
    np.testing.assert_allclose(row["flux_error"], ERROR, rtol=1e-6)


def test_6dfgs(tmp_path):
    both = image([FLUX, ERROR**2, FLUX * 0], "SPECTRUM VR", **GRID)
    row = only(saved(tmp_path / "a.fits", image([[1.0, 2.0]] * 3, "SPECTRUM V", **GRID), both))
    assert is_the_star(row)


@pytest.mark.parametrize(
    ("names", "kind"),
    [(("FluxAB", "WaveAB", "ErrAB"), 1), (("GREEN_SCI_FLUX1", "GREEN_SCI_WAVE1", "GREEN_SCI_VAR1"), 2)],
)
def test_extensions_in_pairs(tmp_path, names, kind):
    orders = [np.array([values, values]) for values in (FLUX, WAVELENGTH, ERROR**kind)]
    orders[1][1] += 100.0  # the next order
    hdus = [image(values, name) for name, values in zip(names, orders, strict=True)]
    row = only(saved(tmp_path / "a.fits", image(np.ones((3, 3)), "BLAZE"), *hdus))
    assert row["wavelength"].size == 800 and row["object_id"] == "a"
    first = {name: row[name][:400] for name in ("wavelength", "flux", "flux_error")}
    assert is_the_star(first)


def test_inverse_variance_in_words(tmp_path):
    row = only(saved(tmp_path / "a.fits", image(FLUX, "FLUX", **GRID), image(ERROR**-2, "INVERSE VARIANCE", **GRID)))
    assert is_the_star(row)


def test_natural_logarithms_that_are_called_log(tmp_path):
    step = 5e-5
    cards = {"CRVAL1": np.log(5000.0), "CDELT1": step, "CRPIX1": 1.0}
    cards |= {"CTYPE1": "log(wavelength)", "CUNIT1": "log(Angstrom)"}
    row = only(saved(tmp_path / "a.fits", image(FLUX, **cards)))
    np.testing.assert_allclose(row["wavelength"], 5000.0 * np.exp(step * np.arange(400)), rtol=1e-6)
    np.testing.assert_allclose(from_logarithm([3.7], 10.0), [10**3.7])


def test_sdss_v_without_a_ratio(tmp_path):
    flux = FLUX[None].astype("f4")
    columns = [fits.Column("flux", "400E", array=flux), fits.Column("ivar", "400E", array=ERROR[None] ** -2.0)]
    columns.append(fits.Column("pixel_flags", "400J", array=np.zeros((1, 400))))
    columns.append(fits.Column("wavelength", "400D", array=WAVELENGTH[None]))
    table = fits.BinTableHDU.from_columns(columns, name="BOSS/APO")
    first = fits.PrimaryHDU()
    first.header["SDSS_ID"] = 123
    fits.HDUList([first, table]).writeto(tmp_path / "mwmStar.fits")
    row = only(tmp_path / "mwmStar.fits")
    assert is_the_star(row) and np.isnan(row["snr"]) and row["object_id"] == "123"


def test_files_without_a_spectrum_are_refused(tmp_path):
    numbers = {"wavelength": WAVELENGTH.tolist(), "flux": FLUX.tolist()}
    (tmp_path / "a.txt").write_text(json.dumps(numbers))
    (tmp_path / "b.npz").write_bytes(b"PK\x03\x04 no archive")
    with zipfile.ZipFile(tmp_path / "c.npz", "w") as archive:
        archive.writestr("[Content_Types].xml", "<Types/>")
    (tmp_path / "d.dat").write_bytes(pickle.dumps(numbers))
    rows = list(zip(WAVELENGTH, FLUX, ERROR, strict=True))
    latex = [r"\begin{tabular}{lll}", r"wave & flux & err \\", *(rf"{a} & {b} & {c} \\ \hline" for a, b, c in rows)]
    (tmp_path / "e.tex").write_text("\n".join(latex))
    (tmp_path / "f.md").write_text("\n".join(["| wave | flux |", "|---|---|", *(f"| {a} | {b} |" for a, b, _ in rows)]))
    for name, words in {
        "e.tex": "got a table for print",
        "f.md": "got a table for print",
        "a.txt": "expected columns of numbers, got JSON",
        "b.npz": "got another zip archive .* or part of one",
        "c.npz": "got another zip archive .* or part of one",
        "d.dat": "expected a FITS, Parquet, VOTable, NumPy or text file, got one of another kind",
    }.items():
        with pytest.raises(ValueError, match=words) as raised:
            only(tmp_path / name)
        assert name in str(raised.value)


def test_a_flux_that_is_too_large_for_the_schema_is_masked(tmp_path):
    lines = [f"{5000 + i};{1e39 if i == 13 else 1.0}" for i in range(40)]
    (tmp_path / "a.csv").write_text("\n".join(["wavelength;flux", *lines]))
    (row,) = read_spectra([tmp_path / "a.csv"])
    assert row["mask"].tolist() == [i == 13 for i in range(40)]


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        # Slitless spectra of Euclid; normalised spectra; names without vowels.
        (("WAVELENGTH", "SIGNAL", "VAR"), "variance"),
        (("WAVELENGTH_VAC", "FLUX_NORMALISED", "FLUX_NORMALISED_ERROR"), "sigma"),
        (("WVL", "FLUX", "ERR_FLUX"), "sigma"),
    ],
)
def test_names_of_surveys(tmp_path, names, kind):
    error = ERROR**2 if kind == "variance" else ERROR
    columns = zip(names, (WAVELENGTH, FLUX, error), strict=True)
    extra = [fits.Column("QUALITY", "E", array=np.ones(400)), fits.Column("MASK", "J", array=np.zeros(400))]
    own = [fits.Column(name, "D", array=values) for name, values in columns]
    fits.BinTableHDU.from_columns(own + (extra if kind == "variance" else [])).writeto(tmp_path / "a.fits")
    assert is_the_star(only(tmp_path / "a.fits"))
