"""`spectrafm finetune` on real stars of the package: what it says, and that `predict` takes the result."""

import csv
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import spectrafm_hf
from spectrafm_cli import main
from spectrafm_hf.training import rivals


STARS = Path(spectrafm_hf.__file__).parent / "resources" / "gaia_xp_demo.parquet"


@pytest.fixture
def labels(tmp_path) -> Path:
    table = pq.read_table(STARS, columns=["object_id", "teff", "logg"])
    path = tmp_path / "my.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["source_id", "log_lm[dex]", "log_lm_err"])
        for star, teff, logg in zip(*(table[name].to_pylist() for name in table.column_names), strict=True):
            writer.writerow([star, teff / 1000 - logg, 0.1])
    return path


@pytest.fixture(autouse=True)
def short_networks(monkeypatch):
    monkeypatch.setattr(rivals, "MLP_STEPS", 5)


def test_a_group_gets_a_checkpoint_that_predicts(tmp_path, labels, capsys):
    out = tmp_path / "log-lm"
    labels.write_text("".join(labels.read_text().splitlines(keepends=True)[:-4]))
    (tmp_path / "broken.fits").write_bytes(b"SIMPLE  =")
    spectra = ["--spectra", str(tmp_path / "broken.fits"), str(STARS)]
    command = ["finetune", *spectra, "--labels", str(labels), "--out", str(out)]
    assert main(command) == 0, "what was dropped was told"
    said = capsys.readouterr().out
    assert "dropped 5 spectra" in said and "no row in the table of labels: 4" in said and "cannot be read: 1" in said
    for words in (
        "60 spectra of 60 stars",
        "new to the checkpoint: log_lm [dex]",
        "ridge",
        "PCA + MLP",
        "is ahead, RMSE",
    ):
        assert words in said
    assert main([*command, "--strict"]) == 1
    table = tmp_path / "predicted.csv"
    assert main(["predict", str(STARS), "--model", str(out), "--output", str(table)]) == 0
    with table.open() as file:
        assert {"teff", "log_lm", "log_lm_err"} <= set(csv.DictReader(file).fieldnames or ())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--label", "mass"], "labels: expected columns of numbers in my.csv (log_lm), got mass"),
        (["--units", "Gyr"], "--units: expected LABEL=UNIT, such as age=Gyr, got Gyr"),
        (["--id-column", "who"], "--id-column: expected 'who' among the columns of the labels, got source_id"),
        (["--model", "no-such-model"], "checkpoint: expected one of the bundled"),
    ],
)
def test_bad_input_is_one_line(tmp_path, labels, capsys, options, words):
    command = ["finetune", "--spectra", str(STARS), "--labels", str(labels), "--out", str(tmp_path / "mine")]
    assert main([*command, *options]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
