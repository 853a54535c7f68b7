# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""`spectrafm spectrum`."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import spectrafm_cli
from spectrafm_hf.files import DEMO_STARS


LABELS = "teff=4800,logg=2.5,fe_h=-0.2"


def test_labels_give_a_spectrum_and_a_picture(tmp_path, capsys):
    table, picture = tmp_path / "giant.csv", tmp_path / "giant.png"
    options = ["--labels", LABELS, "--errors", "teff=50", "--wavelength", "15200:15400:0.5"]
    assert spectrafm_cli.main(["spectrum", *options, "--output", str(table), "--plot", str(picture)]) == 0
    wavelength, flux, error = np.loadtxt(table, delimiter=",", skiprows=1, unpack=True)
    np.testing.assert_allclose(wavelength, np.arange(15200, 15400.1, 0.5))
    assert 0.5 < flux.min() < 0.9
    assert flux.max() <= 1.01
    assert np.all(error > 0)
    with Image.open(picture) as image:
        assert image.width > 1500
    # What is made of labels has these labels.
    assert spectrafm_cli.main(["predict", str(table), "--at-rest", "--vacuum"]) == 0
    teff = float(capsys.readouterr().out.split("\ngiant")[1].split()[0])
    assert teff == pytest.approx(4800, abs=60)


def test_a_file_gives_spectra_on_the_pixels_of_an_instrument(tmp_path, capsys):
    stars = pq.read_table(DEMO_STARS).slice(0, 3)
    pq.write_table(stars, tmp_path / "stars.parquet")
    out = tmp_path / "hband.parquet"
    arguments = [str(tmp_path / "stars.parquet"), "--wavelength", "apogee", "--output", str(out)]
    assert spectrafm_cli.main(["spectrum", *arguments]) == 0
    written = pq.read_table(out)
    assert written["object_id"].to_pylist() == stars["object_id"].to_pylist()
    assert [len(row) for row in written["flux"].to_pylist()] == [7514] * 3
    assert "written" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--plot", "x.png"], "INPUT, --labels: expected one of them, got none"),
        (["--labels", LABELS], "--output, --plot: expected one of them at least, got none"),
        (["--labels", LABELS, "--plot", "x.png"], "--wavelength: expected LOW:HIGH:STEP, a file or an instrument"),
        (["--labels", "teff", "--wavelength", "15200:15300:1", "--plot", "x.png"], "--labels: expected NAME=NUMBER"),
        (["--labels", LABELS, "--wavelength", "15200:15100:1", "--plot", "x.png"], "--wavelength: expected LOW:HIGH"),
        (["--labels", LABELS, "--wavelength", "25200:25300:1", "--plot", "x.png"], "wavelength: expected 15,101 to"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_code_2(arguments, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert spectrafm_cli.main(["spectrum", *arguments]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1
    assert not (tmp_path / "x.png").exists()
