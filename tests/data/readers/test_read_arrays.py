"""NumPy files; nothing in them is executed."""

import pickle

import numpy as np
import pytest

from spectrafm_hf.data.readers import read_spectra
from spectrafm_hf.models.gate_spectrafm import air_to_vacuum


WAVELENGTH = np.linspace(5000, 5100, 30)
FLUX = np.arange(60.0).reshape(2, 30) + 1


def test_an_archive_of_arrays_with_a_shared_grid(tmp_path, read):
    mask = np.arange(30) == 4
    ids = np.array(["HD 1", "Proxima Köln"])
    np.savez(tmp_path / "a.npz", wavelength=WAVELENGTH, flux=FLUX, flux_error=FLUX / 9, mask=mask, object_id=ids)
    rows = read(tmp_path / "a.npz")
    assert [row["object_id"] for row in rows] == ["HD 1", "Proxima Köln"]
    np.testing.assert_allclose(rows[1]["wavelength"], WAVELENGTH, rtol=1e-7)
    np.testing.assert_allclose(rows[1]["flux_error"], FLUX[1] / 9, rtol=1e-6)
    np.testing.assert_array_equal(rows[1]["mask"], mask)


def test_numbers_of_the_other_byte_order_are_read_as_what_they_are(tmp_path, read):
    np.savez(tmp_path / "a.npz", wavelength=WAVELENGTH.astype(">f8"), flux=FLUX[0].astype(">f4"))
    (row,) = read(tmp_path / "a.npz")
    assert all(row[name].dtype.isnative for name in ("wavelength", "flux"))
    np.testing.assert_array_equal(row["flux"], FLUX[0])


def test_a_single_array_takes_the_grid_of_the_caller(tmp_path, read):
    np.save(tmp_path / "fluxes.npy", FLUX)
    rows = read(tmp_path / "fluxes.npy", grid=WAVELENGTH / 10, wavelength_unit="nm", wavelength_medium="air")
    assert [row["object_id"] for row in rows] == ["fluxes:0", "fluxes:1"]
    np.testing.assert_allclose(rows[0]["wavelength"], air_to_vacuum(WAVELENGTH), rtol=1e-7)
    np.testing.assert_array_equal(rows[1]["flux"], FLUX[1])
    with pytest.raises(ValueError, match=r"^grid: expected the wavelengths of the pixels of .*fluxes.npy, got none; "):
        next(read_spectra([tmp_path / "fluxes.npy"]))
    with pytest.raises(ValueError, match=r"^wavelength: expected the shape of flux, \(2, 30\), in .*, got \(29,\)$"):
        next(read_spectra([tmp_path / "fluxes.npy"], grid=WAVELENGTH[1:]))


class Poison:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("form", ["npy", "npz", "pickle"])
def test_a_file_with_python_objects_is_refused_in_one_line_and_nothing_runs(tmp_path, form):
    poison, file = np.array([Poison(tmp_path / "ran")], dtype=object), tmp_path / f"a.{form}"
    if form == "npy":
        np.save(file, poison, allow_pickle=True)
    elif form == "npz":
        np.savez(file, wavelength=WAVELENGTH, flux=poison)
    else:
        file = tmp_path / "pickled.npy"
        file.write_bytes(pickle.dumps(poison))
    with pytest.raises(ValueError, match=rf"^\S*{file.name}: expected [^\n]+$"):
        next(read_spectra([file]))
    assert not (tmp_path / "ran").exists()
