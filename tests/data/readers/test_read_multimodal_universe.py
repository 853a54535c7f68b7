"""The Multimodal Universe's APOGEE set, in the layout in which it is published on the Hugging Face hub."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spectrafm_hf.data.readers import APOGEE_PIXEL_BITS, count_spectra, read_spectra


def write(path, restframe=(None, None, None), **parts):
    grid = 10 ** (4.179 + 6e-6 * np.arange(40))
    spectrum = {
        "flux": np.linspace(1, 2, 40),
        "ivar": np.where(np.arange(40) == 3, 0, 25.0),
        "lsf_sigma": np.full(40, 0.3),
        "lambda": np.where(np.arange(40) < 38, grid, -1),
        "pix_bitmask": (np.arange(40) == 5) << APOGEE_PIXEL_BITS["SATPIX"] | (np.arange(40) == 6) << 11,
        "pseudo_continuum_flux": np.ones(40),
        **parts,
    }
    kinds = {"pix_bitmask": pa.int64()}
    stars = [pa.array([values] * 3, pa.list_(kinds.get(name, pa.float32()))) for name, values in spectrum.items()]
    columns = {
        "spectrum": pa.StructArray.from_arrays(stars, list(spectrum)),
        "teff": pa.array([4000, 5000, None], pa.float32()),
        "teff_err": pa.array([50, 60, None], pa.float32()),
        "radial_velocity": pa.array([10, -20, 30], pa.float32()),
        "restframe": pa.array(restframe, pa.bool_()),
        "object_id": ["b'2M00000002+7417074'", "2M00000032+5737103", "2M00001653+5540107"],
    }
    pq.write_table(pa.table(columns), path)
    return path


def test_a_published_set_loads_as_it_is(tmp_path):
    file = write(tmp_path / "train-00000-of-00001.parquet")
    assert count_spectra([file]) == 3
    rows = list(read_spectra([file]))
    assert [row["object_id"] for row in rows] == ["2M00000002+7417074", "2M00000032+5737103", "2M00001653+5540107"]
    np.testing.assert_array_equal([row["teff"] for row in rows], [4000, 5000, np.nan])
    np.testing.assert_array_equal([row["teff_err"] for row in rows], [50, 60, np.nan])
    for row, velocity in zip(rows, (10, -20, 30), strict=True):
        assert (row["survey"], row["rest_frame"], row["radial_velocity"]) == ("multimodal-universe", True, velocity)
        assert len(row["flux"]) == 38  # padding is cut off
        np.testing.assert_array_equal(np.flatnonzero(row["mask"]), [3, 5])
        np.testing.assert_allclose(row["flux_error"][~row["mask"]], 0.2, rtol=1e-6)
        np.testing.assert_allclose(row["wavelength"], 10 ** (4.179 + 6e-6 * np.arange(38)), rtol=1e-7)


def test_stars_that_are_not_at_rest_are_shifted_by_their_velocity(tmp_path):
    rows = list(read_spectra([write(tmp_path / "a.parquet", restframe=(False, True, None))]))
    assert all(row["rest_frame"] for row in rows)
    ratio = rows[0]["wavelength"] / rows[1]["wavelength"]
    np.testing.assert_allclose(ratio, 1 - 10 / 299_792.458, rtol=1e-7)
    np.testing.assert_array_equal(rows[2]["wavelength"], rows[1]["wavelength"])


def test_a_struct_without_inverse_variances_names_file_and_part(tmp_path):
    file = write(tmp_path / "a.parquet")
    table = pq.read_table(file)
    spectrum = table["spectrum"].combine_chunks()
    kept = [field.name for field in spectrum.type if field.name != "ivar"]
    parts = pa.StructArray.from_arrays([spectrum.field(name) for name in kept], kept)
    pq.write_table(table.set_column(0, "spectrum", parts), file)
    with pytest.raises(
        ValueError, match=r"a.parquet: .*spectrum.ivar: expected among the parts of spectrum, got \['flux'"
    ):
        list(read_spectra([file]))
