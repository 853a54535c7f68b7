"""`spectrafm finetune` on real stars of the package: what it says, and that `predict` takes the result."""

import csv
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import pipeline

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
    assert main(command) == 0, "dropped spectra are reported"
    output = capsys.readouterr().out
    assert "dropped 5 spectra" in output
    assert "no row in the table of labels: 4" in output and "cannot be read: 1" in output
    for words in (
        "60 spectra of 60 stars",
        "new to the checkpoint: log_lm [dex]",
        "ridge",
        "PCA + MLP",
        "is ahead, RMSE",
    ):
        assert words in output
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


def test_a_scalar_that_helps_is_needed_by_predict(tmp_path, capsys):
    """A label that depends on a scalar, which the table of labels has with an error, is predicted from it."""
    stars = pq.read_table(STARS)
    generator = np.random.default_rng(0)
    distance, useless = generator.standard_normal((2, len(stars)))
    names = [text for text in stars["object_id"].to_pylist()]
    ages = np.array(stars["teff"].to_pylist()) / 1000 - 4 + distance
    lines = ["object_id,age[Gyr],distance,distance_err,useless"]
    for i, name in enumerate(names):
        known = "" if i % 10 == 0 else f"{distance[i]:.5f}"
        lines.append(f"{name},{ages[i]:.5f},{known},0.01,{useless[i]:.5f}")
    labels, out, table = tmp_path / "labels.csv", tmp_path / "mine", tmp_path / "predicted.parquet"
    labels.write_text("\n".join(lines) + "\n")
    command = ["finetune", "--spectra", str(STARS), "--labels", str(labels), "--out", str(out)]
    assert main([*command, "--scalars", "missing"]) == 2
    error = capsys.readouterr().err
    assert "scalars: expected columns of the spectra or of the labels" in error and "got missing in neither" in error
    assert not out.exists()
    assert main([*command, "--scalars", "distance", "useless"]) == 0
    output = capsys.readouterr().out
    assert "age: scalars: distance used: RMSE " in output and "useless not used: no improvement" in output
    predict = ["predict", str(STARS), "--model", str(out), "--output", str(table)]
    assert main(predict) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and not table.exists()
    assert "distance: expected a column of this name in gaia_xp_demo.parquet (NaN where unknown)" in error
    assert main([*predict, "--scalar-table", str(labels)]) == 0
    found = pq.read_table(table)
    assert found["object_id"].to_pylist() == names
    unknown = np.array(["scalar_unknown" in flags for flags in found["flags"].to_pylist()])
    assert np.flatnonzero(unknown).tolist() == list(range(0, len(names), 10))
    residual = np.array(found["age"].to_pylist()) - ages
    assert np.std(residual[~unknown]) < 0.2 < np.std(residual[unknown])
    assert np.median(np.array(found["age_err"].to_pylist())[unknown]) > 0.5
    assert main(["predict", str(STARS), "--output", str(table), "--overwrite", "--scalar-table", str(labels)]) == 2
    assert "--scalar-table: expected none, as the checkpoint needs no scalars" in capsys.readouterr().err

    # The same by the Auto classes and the pipeline; and other labels need no scalar, and stay bit by bit.
    predict_labels = pipeline("stellar-labels", model=str(out), trust_remote_code=True)
    columns = {name: np.array(stars[name].to_pylist()) for name in ("wavelength", "flux", "flux_error", "mask")}
    rows = [
        {name: column[i] for name, column in columns.items()} | {"distance": distance[i], "distance_err": 0.01}
        for i in range(1, 4)
    ]
    for star, age in zip(predict_labels(rows), found["age"].to_pylist()[1:4], strict=True):
        assert star["age"] == pytest.approx(age, abs=1e-3)
    with pytest.raises(ValueError, match="scalars: expected distance, which age is predicted from"):
        predict_labels({name: column[1] for name, column in columns.items()})
    others = ["teff", "logg", "fe_h", "alpha_m"]
    assert predict_labels(rows[0], requests=others)["logg"] == pytest.approx(found["logg"][1].as_py(), abs=1e-3)
    base, tokenizer = spectrafm_hf.load_checkpoint("spectrafm-base")
    inputs = tokenizer(columns, requests=others)
    with torch.no_grad():
        before, after = (model(**inputs) for model in (base, predict_labels.model))
    assert torch.equal(after.predictions, before.predictions)
    assert torch.equal(after.prediction_errors, before.prediction_errors)
