"""The command line and the gate: mixed folders, reasons in the table, options for missing statements of files."""

import csv

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from astropy.io import fits

from spectrafm_cli import main
from spectrafm_cli.report import as_typed
from spectrafm_hf.files import DEMO_STARS


@pytest.fixture
def tiny_base(tmp_path, monkeypatch, tiny_model, tiny_tokenizer):
    """A tiny checkpoint in the place of the bundled one."""
    from spectrafm_hf import checkpoints, save_checkpoint
    from spectrafm_hf.inference.training_range import TrainingRange

    save_checkpoint(tiny_model, tiny_tokenizer, tmp_path / "models" / "spectrafm-base")
    TrainingRange({"teff": (-1e9, 1e9)}).save(tmp_path / "models" / "spectrafm-base")
    load = checkpoints.load_checkpoint
    monkeypatch.setattr(
        checkpoints, "load_checkpoint", lambda name, revision="main": load(str(tmp_path / "models" / name), revision)
    )
    monkeypatch.chdir(tmp_path)


def write_h_band(path, **cards):
    wavelength = np.exp(np.linspace(np.log(15150), np.log(16950), 2000))
    hdu = fits.BinTableHDU.from_columns(
        [fits.Column(name, "D", array=array) for name, array in (("wave", wavelength), ("flux", np.ones(2000)))]
    )
    hdu.header.update(cards)
    hdu.writeto(path)


def test_a_mixed_folder_is_predicted_with_the_labels_of_each_spectrum(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    write_h_band(tmp_path / "in" / "b.fits")
    write_h_band(tmp_path / "in" / "c.fits", CLASS="GALAXY")
    pq.write_table(pq.read_table(DEMO_STARS).slice(0, 2), tmp_path / "in" / "a.parquet")
    assert main(["predict", "in", "--output", "labels.csv"]) == 1
    printed, errors = capsys.readouterr()
    table = pd.read_csv("labels.csv", keep_default_na=False)
    assert table["reason"].tolist() == ["", "", "", "object_class: expected a star, got GALAXY"]
    flags = table["flags"].tolist()
    assert flags[:2] == ["", ""] and flags[2].startswith("medium_unstated;frame_unstated") and flags[3] == ""
    assert [text == "" for text in table["teff"].astype(str)] == [False, False, False, True]
    assert [text == "" for text in table["mg_fe"].astype(str)] == [True, True, False, True]  # Gaia XP does not tell it
    assert "model: spectrafm-base" in printed
    assert "c.fits: c: object_class: expected a star, got GALAXY" in errors


def test_options_replace_missing_statements_of_a_file(tmp_path, tiny_base, capsys):
    write_h_band(tmp_path / "a.fits")
    for options, expected in (
        ([], "medium_unstated;frame_unstated"),
        (["--vacuum"], "frame_unstated"),
        (["--air", "--at-rest"], ""),
        (["--vacuum", "--radial-velocity", "0"], ""),
    ):
        assert main(["predict", "a.fits", "--output", "labels.csv", "--overwrite", *options]) == 0
        assert pd.read_csv("labels.csv", keep_default_na=False)["flags"].tolist() == [expected]


def test_columns_are_named_as_the_message_shows_it(tmp_path, tiny_base, capsys):
    (tmp_path / "a.csv").write_text("place,flux\n" + "".join(f"{w},1.5\n" for w in range(5000, 5400)))
    assert main(["predict", "a.csv"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--columns wavelength=NAME" in error
    assert main(["predict", "a.csv", "--columns", "wavelength=place"]) == 0
    capsys.readouterr()
    assert main(["predict", "a.csv", "--columns", "wavelength"]) == 2
    assert "--columns: expected ROLE=NAME" in capsys.readouterr().err


def test_existing_files_are_not_overwritten(tmp_path, tiny_base, capsys):
    (tmp_path / "labels.csv").write_text("mine")
    (tmp_path / "failed.csv").write_text("mine too")
    write_h_band(tmp_path / "a.fits")
    write_h_band(tmp_path / "b.fits", CLASS="QSO")
    assert main(["predict", "a.fits", "b.fits", "--output", "labels.csv"]) == 2
    assert "labels.csv, which exists; --overwrite replaces it" in capsys.readouterr().err
    assert (tmp_path / "labels.csv").read_text() == "mine"
    assert main(["predict", "a.fits", "b.fits", "--output", "labels.csv", "--overwrite"]) == 1
    assert (tmp_path / "failed.csv").read_text() == "mine too"
    with (tmp_path / "failed-2.csv").open() as lines:
        assert [row["file"] for row in csv.DictReader(lines)] == ["b.fits"]
    assert pd.read_csv("labels.csv")["object_id"].tolist() == ["a", "b"]


@pytest.mark.parametrize(
    ("python", "typed"),
    [
        ("flux: name it with columns={'flux': 'f', 'mask': 'none'}", "flux: name it with --columns flux=f,mask=none"),
        ("radial_velocity: expected km/s", "--radial-velocity: expected km/s"),
        ("give them with grid=WAVELENGTHS", "give them with --grid FILE"),
        ("flux_error: expected Jy, got K", "flux_error: expected Jy, got K"),
    ],
)
def test_messages_name_options_as_they_are_typed(python, typed):
    assert as_typed(python) == typed


def test_a_velocity_column_that_a_file_cannot_have_is_refused(tmp_path, capsys):
    image = fits.PrimaryHDU(np.linspace(0.9, 1.1, 2000))
    image.header.update({"CRVAL1": 5000.0, "CDELT1": 0.5, "CTYPE1": "WAVE", "CUNIT1": "Angstrom"})
    image.writeto(tmp_path / "a.fits")
    assert main(["predict", str(tmp_path / "a.fits"), "--radial-velocity-column", "rv"]) == 2
    error = capsys.readouterr().err
    assert "radial_velocity_column: expected a table with rv, got a file of the format fits-image" in error


def test_the_resolving_power_of_the_input_is_an_option_of_every_verb(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_h_band(tmp_path / "a.fits")
    powers = []

    def read(files, **how):
        powers.append(how["resolving_power"])
        raise ValueError("enough")

    monkeypatch.setattr("spectrafm_hf.data.readers.read_spectra", read)
    for verb, options in (
        ("predict", []),
        ("plot", []),
        ("explain", ["--output", "a.png"]),
        ("embed", ["--output", "a.parquet"]),
        ("spectrum", ["--output", "new.fits"]),
    ):
        option = "--input-resolving-power" if verb == "spectrum" else "--resolving-power"
        assert main([verb, "a.fits", option, "1800", *options]) == 2
    assert powers == [1800.0] * len(powers) and len(powers) >= 5
    with pytest.raises(SystemExit):
        main(["predict", "a.fits", "--resolving-power", "sharp"])
