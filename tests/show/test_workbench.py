"""Computations of the page: spectra of a file, labels, explanations, neighbours."""

import dataclasses
import gzip
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import spectrafm_cli
import spectrafm_hf.show.workbench as module
from spectrafm_hf import save_checkpoint
from spectrafm_hf.inference.similar import Embedder, EmbeddingWriter
from spectrafm_hf.inference.training_range import TrainingRange
from spectrafm_hf.show.app_html import fit_html
from spectrafm_hf.show.workbench import EXAMPLES, NEIGHBOURS, Workbench


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_is_well_known_to_the_model(workbench, name):
    reading = workbench.example(name)
    (row,) = reading.rows
    assert workbench.example(name) is reading
    assert reading.loaded.name == "spectrafm-base"
    assert len(reading.labels(0)) == (15 if "APOGEE" in name else 4)
    assert reading.flags(0) == []
    assert reading.prediction["teff"][0] == pytest.approx(row["teff"], rel=0.06)
    assert reading.prediction["logg"][0] == pytest.approx(row["logg"], abs=0.5)
    # Its own name would be no news among the known stars.
    what, nearest = workbench.nearest(reading, 0)
    assert ("synthetic APOGEE" if "APOGEE" in name else "Gaia XP") in what
    assert len(nearest) == NEIGHBOURS
    assert row["object_id"] not in [star for star, _, _ in nearest]
    assert [cosine for _, cosine, _ in nearest] == sorted((cosine for _, cosine, _ in nearest), reverse=True)


def test_the_star_that_fits_is_found_once_and_shown_in_words_and_pictures(workbench):
    reading = workbench.example(EXAMPLES[-1])
    fit = workbench.fit(reading, 0)
    assert workbench.fit(reading, 0) is fit
    assert fit.chi2 / fit.degrees_of_freedom < 1.5
    text = fit_html(reading, 0, fit)
    assert f"χ² is {fit.chi2:,.0f} for {fit.degrees_of_freedom:,.0f} degrees of freedom" in text
    assert text.count("data:image/png;base64,") == 2
    wrong = dataclasses.replace(fit, no_noise=[(15_600.0, 15_600.2, -8.0), (15_700.0, 15_710.0, 7.0)])
    assert "significant in 2 places, strongest at 15,600 Å, 15,700 to 15,710 Å" in fit_html(reading, 0, wrong)


def test_the_downloaded_table_equals_that_of_predict(workbench, demo_file, tmp_path, capsys):
    reading = workbench.read(demo_file(3))
    assert spectrafm_cli.main(["predict", str(demo_file(3)), "--output", str(tmp_path / "labels.csv")]) == 0
    assert reading.table.read_bytes() == (tmp_path / "labels.csv").read_bytes()


def test_the_table_is_deleted_with_the_reading(workbench, demo_file):
    reading = workbench.read(demo_file())
    table = reading.table
    assert table.is_file()
    del reading
    assert not table.parent.exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "expected a FITS, Parquet, VOTable, NumPy or text file, got an empty one"),
        (bytes(range(256)), "got one of another kind"),
        (b"PAR1 and no more", "expected a Parquet file"),
        (b"name,colour\nVega,blue\n", "wavelength: expected a column of this name"),
        (b"wavelength,flux\n5000,nan\n5001,nan\n", "expected pixels with a flux"),
        (b"\x1f\x8b and no more", "expected a file that can be read"),
        (b"\x1f\x8b\x08\0\0\0\0\0\0\0" + 99 * b"no deflated data", "expected a file that can be read"),
    ],
)
def test_the_message_about_a_bad_file_hides_its_path_on_the_server(workbench, tmp_path, content, expected):
    (tmp_path / "bad.fits").write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(expected)) as caught:
        workbench.read(tmp_path / "bad.fits")
    assert str(tmp_path) not in str(caught.value)


def test_a_file_that_is_too_large_is_refused(workbench, text_file, monkeypatch):
    monkeypatch.setattr(module, "MAX_MEGABYTES", 0.001)
    with pytest.raises(ValueError, match=r"^expected at most 0.001 MB, got"):
        workbench.read(text_file())


@pytest.mark.parametrize("kind", ["gz", "npz", "parquet"])
def test_a_file_that_is_too_large_when_unpacked_is_refused_before_it_is(workbench, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(module, "MAX_UNPACKED_MEGABYTES", 1)
    path = tmp_path / f"bomb.{kind}"
    zeros = np.zeros(200_000)
    if kind == "gz":
        path.write_bytes(gzip.compress(zeros.tobytes()))
    elif kind == "npz":
        np.savez_compressed(path, flux=zeros)
    else:
        # With its dictionary the table is small in itself.
        pq.write_table(pa.table({"flux": zeros}), path)
    with pytest.raises(ValueError, match="expected at most 1 MB when unpacked, got more"):
        workbench.read(path)


BOMB = """
import sys
from pathlib import Path
import torch
from spectrafm_hf.data.readers import read_spectra
from spectrafm_hf.show.workbench import Workbench

def most_memory():
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024

before = most_memory()
try:
    Workbench().read(sys.argv[1])
except ValueError as error:
    print(error)
print(most_memory() - before)
assert next(read_spectra([sys.argv[1]]))["flux"].size == 400_000
print(most_memory() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to tell the memory of a process")
def test_a_small_parquet_file_of_very_many_pixels_takes_no_memory(tmp_path):
    """5 kB on disk, 820 MB as numbers: the page refuses it unread, and the command line reads few rows at once."""
    path = tmp_path / "bomb.parquet"
    rows, pixels = 256, 400_000
    offsets = pa.array(np.arange(rows + 1, dtype=np.int32) * pixels)
    columns = {"wavelength": 5000.0, "flux": 1.0}
    table = pa.table(
        {
            name: pa.ListArray.from_arrays(offsets, pa.array(np.full(rows * pixels, value, np.float32)))
            for name, value in columns.items()
        }
    )
    pq.write_table(table, path, compression="zstd")
    del table
    assert path.stat().st_size < 10_000
    run = subprocess.run([sys.executable, "-c", BOMB, path], capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr
    message, refused, read = run.stdout.splitlines()
    assert message == "expected at most 250 MB when unpacked, got more"
    assert float(refused) < 100 and float(read) < 300, run.stdout  # MB


def test_a_spectrum_that_is_too_long_is_refused(workbench, text_file, monkeypatch):
    monkeypatch.setattr(module, "MAX_PIXELS", 300)
    with pytest.raises(ValueError, match="expected spectra of at most 300 pixels, got one of 343"):
        workbench.read(text_file())


def test_a_table_without_units_is_read_with_the_settings_of_the_visitor(workbench, text_file):
    path = text_file(500.0, 700.0, 0.1)
    row = workbench.rows(path, wavelength_unit="nm")[0][0]
    assert row["wavelength"][0] == 5000.0 and row["flags"] == ["medium_unstated", "frame_unstated"]
    row = workbench.rows(path, wavelength_unit="nm", wavelength_medium="air", at_rest=True)[0][0]
    assert row["wavelength"][0] == pytest.approx(5001.39, abs=0.01) and row["flags"] == []
    row = workbench.rows(path, wavelength_unit="nm", wavelength_medium="vacuum", radial_velocity=300.0)[0][0]
    assert row["wavelength"][0] == pytest.approx(5000.0 * (1 - 300 / 299_792.458), abs=0.005)
    path.write_text(path.read_text().replace("wavelength,flux,", "spam,eggs,"))
    with pytest.raises(ValueError, match=r"name it with wavelength=NAME under “Columns”$"):
        workbench.rows(path)
    assert workbench.rows(path, columns={"wavelength": "spam", "flux": "eggs"})[0][0]["wavelength"][0] == 500.0


def test_spectra_of_two_kinds_in_one_file_have_the_labels_of_each(workbench, demo_file):
    """As `spectrafm predict` writes them: what a spectrum does not tell is empty."""
    xp = workbench.rows(demo_file())[0][0]
    synthetic = workbench.example("Red-clump giant, synthetic APOGEE")
    quasar = {**xp, "refused": "object_class: expected a star, got QSO"}
    reading = workbench.predict([xp, {**synthetic.rows[0], "file": xp["file"]}, quasar], more=False)
    assert [len(reading.labels(i)) for i in range(3)] == [4, 15, 0]
    assert reading.prediction["mg_fe"][1] == synthetic.prediction["mg_fe"][0]
    assert np.isnan(reading.prediction["mg_fe"][0])
    assert reading.why_not(2) == "object_class: expected a star, got QSO"
    with pytest.raises(ValueError, match=r"^object_class: expected a star, got QSO$"):
        workbench.predict([quasar], more=False)


def test_a_spectrum_unlike_those_of_the_training_has_no_neighbours(workbench, text_file):
    rows, _ = workbench.rows(text_file(20_000.0, 24_000.0, 1.0))
    assert workbench.known_stars(rows[0]) is None


@pytest.fixture
def tiny_checkpoint(tmp_path, tiny_evidence) -> Path:
    """Random weights, for spectra like no star of the package."""
    save_checkpoint(*tiny_evidence, tmp_path / "tiny")
    TrainingRange({"teff": (3000.0, 7000.0)}, (5000.0, 5100.0), (2.0, 2.0)).save(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_a_model_of_another_instrument_has_no_neighbours_by_default(tiny_checkpoint, stars, tmp_path):
    bench = Workbench(str(tiny_checkpoint))
    (row,) = stars[:1]
    reading = bench.predict([row], more=False)
    assert bench.nearest(reading, 0) == ("", [])

    with EmbeddingWriter(tmp_path / "known.parquet", reading.loaded.model) as writer:
        writer.write(Embedder(reading.loaded.model, reading.loaded.tokenizer)(stars)[0])
    bench = Workbench(str(tiny_checkpoint), tmp_path / "known.parquet")
    what, nearest = bench.nearest(bench.predict([row], more=False), 0)
    assert what == "the 5 stars of known.parquet"
    assert sorted(name for name, _, _ in nearest) == [f"star-{i}" for i in range(1, 5)]
    with pytest.raises(ValueError, match="known: expected a file of `spectrafm embed` with spectrafm-base"):
        Workbench(known=tmp_path / "known.parquet")
