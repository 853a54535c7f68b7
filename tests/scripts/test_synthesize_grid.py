import shutil
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from script_loader import load_script

from spectrafm_hf.synthesis import LABEL_NAMES
from spectrafm_hf.synthesis.sampling import APSTAR_WAVELENGTH


SCRIPT = Path(__file__).parents[2] / "scripts" / "synthesize_grid.py"


@pytest.fixture(scope="module")
def script():
    return load_script("synthesize_grid")


TABLE = pa.table(
    {"object_id": ["a", "b", "c"], "teff": [4600, 5800, 4000], "logg": [2.2, 4.4, 4.6], "mg_fe": [0.3, 0, 0]}
)


def test_labels_are_read_from_csv_and_parquet_alike_with_their_defaults(script, tmp_path):
    pyarrow.csv.write_csv(TABLE, tmp_path / "labels.csv")
    pq.write_table(TABLE, tmp_path / "labels.parquet")
    for name in ("labels.csv", "labels.parquet"):
        labels, ids = script.read_labels(tmp_path / name, 2)
        assert ids == ["a", "b"] and tuple(labels) == LABEL_NAMES
        assert labels["teff"].tolist() == [4600, 5800]
        assert labels["mg_fe"].tolist() == [0.3, 0] and labels["c_fe"].tolist() == [0, 0]
        assert labels["vmicro"][0] > 1


def test_the_short_names_of_a_ready_grid_are_understood(script, tmp_path):
    names = ["teff", "logg", "feh", "c", "n", "o", "mg", "si", "al", "ca", "ti", "mn", "ni", "vmic"]
    values = np.array([[4600, 2.2, -0.5, *np.arange(10) / 100, 1.3]], np.float32)
    np.savez(tmp_path / "grid.npz", labels=values, label_names=names)
    labels, ids = script.read_labels(tmp_path / "grid.npz", None)
    assert ids is None
    assert [labels[name][0] for name in LABEL_NAMES] == values[0].astype(float).tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--range", "kband"], "range: expected hband, optical, survey-optical or MIN-MAX in Angstrom, got 'kband'"),
        (["--range", "3000-4000"], "wavelength_min: expected 3300 to 25000 Angstrom, got 3000"),
        (["--range", "20000-26000"], "wavelength_max: expected 3300 to 25000 Angstrom, got 26000"),
        (["--n", "0"], "n: expected at least 1, got 0"),
        (["--processes", "0"], "processes: expected at least 1, got 0"),
        (["--labels", "none.csv"], "none.csv"),
        (["--step", "5"], "step: expected 0.001 to 1 Angstrom, got 5"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_code_2(script, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.setenv("SPECTRAFM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    assert script.main(["--out", str(tmp_path / "grid"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "grid").exists() and not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"teff": [4600], "logg": [2.2], "f_fe": [0.1]}, "labels: expected columns teff, .*, got f_fe"),
        ({"teff": [4600]}, "logg: expected among the labels, got teff"),
        ({"teff": [4600], "logg": [2.2], "c_fe": [3.0]}, "c_fe: expected -1 to 1, got 3"),
        ({"teff": [4600, 4700], "logg": [2, 2], "object_id": ["a", "a"]}, "object_id: expected each once"),
        ({"teff": [], "logg": []}, "labels: expected at least one star, got none"),
    ],
)
def test_a_bad_table_of_labels_is_refused_with_the_reason(script, tmp_path, columns, message):
    pq.write_table(pa.table(columns), tmp_path / "labels.parquet")
    with pytest.raises(ValueError, match=message):
        script.read_labels(tmp_path / "labels.parquet", None)


def test_a_missing_compiler_is_named_on_one_line(script, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SPECTRAFM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert script.main(["--out", str(tmp_path / "grid")]) == 2
    assert "expected gfortran, make, patch to build it with, found none" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.skipif(shutil.which("gfortran") is None, reason="gfortran is not installed (apt-get install gfortran)")
@pytest.mark.timeout(1800)
def test_four_stars_are_synthesised_into_a_data_set(script, tmp_path):
    pq.write_table(
        pa.concat_tables([TABLE, pa.table({**TABLE.slice(0, 1).to_pydict(), "teff": [9000]})]).set_column(
            0, "object_id", [["a", "b", "c", "d"]]
        ),
        tmp_path / "labels.parquet",
    )
    arguments = ["--labels", str(tmp_path / "labels.parquet"), "--range", "hband", "--processes", "2"]
    assert script.main([*arguments, "--out", str(tmp_path / "grid")]) == 0
    spectra = datasets.load_dataset(str(tmp_path / "grid"), split="train", cache_dir=str(tmp_path / "cache"))
    assert spectra["object_id"] == ["a", "b", "c"]
    row = spectra.with_format("numpy")[0]
    assert row["wavelength"] == pytest.approx(APSTAR_WAVELENGTH, rel=1e-6)
    assert 0.2 < row["flux"].min() < 0.7 and 0.99 < row["flux"].max() < 1.001
    card = (tmp_path / "grid" / "README.md").read_text()
    assert "- `d`: teff: expected 2800 to 8000" in card
