"""Broken, strange and missing files on the command line: one clear line each, and the others are predicted."""

import csv
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from astropy.io import fits
from astropy.table import Table

from spectrafm_cli import main
from spectrafm_hf.files import DEMO_STARS


#: What to start a program with, that it may read only what its user may: to root, no file is closed. None: no way.
RESTRICTED: list[str] | None = (
    []
    if os.geteuid()
    else ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
    if shutil.which("setpriv")
    else None
)
PIXELS = ("wavelength", "flux", "flux_error", "mask")


class Unpickled:
    """Leaves a trace if anybody unpickles it."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.fixture
def star() -> dict:
    row = pq.read_table(DEMO_STARS).slice(0, 1).to_pylist()[0]
    return {name: np.array(row[name]) for name in PIXELS}


@pytest.fixture
def good(tmp_path, star) -> list[Path]:
    """Strange files that hold spectra all the same."""
    folder = tmp_path / "good"
    folder.mkdir()
    # Both byte orders in one file, and a FITS table, which is big-endian.
    kinds = dict(zip(PIXELS, (">f8", "<f4", ">f4", "?"), strict=True))
    np.savez(folder / "mixed.npz", **{name: star[name].astype(kind) for name, kind in kinds.items()})
    Table(star).write(folder / "table.fits")
    # By its content, not by its name.
    Table(star).write(folder / "a table.txt", format="fits")
    # Names in many scripts, and one of them twice.
    rows = pq.read_table(DEMO_STARS).slice(0, 3)
    pq.write_table(rows.set_column(0, "object_id", pa.array(["HD 1 ü", "星", "星"])), folder / "names ü 星.parquet")
    return sorted(folder.iterdir())


@pytest.fixture
def hostile(tmp_path, star) -> dict[Path, str]:
    """Files that cannot be used, and what must be said of them."""
    folder = tmp_path / "hostile"
    folder.mkdir()
    causes = {}

    def add(name: str, cause: str, content: bytes | str | None = None) -> Path:
        path = folder / name
        causes[path] = cause
        if content is not None:
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    whole = tmp_path / "whole.fits"
    Table(star).write(whole)
    add("truncated.fits", "truncated", whole.read_bytes()[:6000])
    add("picture.fits", "expected a FITS, Parquet, VOTable, NumPy or text file", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" * 50)
    add("nothing at all.fits", "expected", b"")
    fits.PrimaryHDU().writeto(add("no spectrum.fits", "expected a table"))
    add("garbage.fits.gz", "expected", b"\x1f\x8b\x08\x00" + bytes(range(256)) * 20)
    add("header only.csv", "expected at least one spectrum, got none", "wavelength,flux\n")
    add("columns.csv", "flux: expected a column of this name", "wavelength,brightness\n5000,1\n5001,1\n")
    nan = "\n".join(f"{wavelength},nan,0.1" for wavelength in star["wavelength"])
    add("nan.csv", "not finite", f"wavelength,flux,flux_error\n{nan}\n")
    empty = pq.read_table(DEMO_STARS).slice(0, 1).to_pylist()[0] | {name: [] for name in PIXELS}
    pq.write_table(
        pa.Table.from_pylist([empty], schema=pq.read_schema(DEMO_STARS)), add("zero length.parquet", "got none")
    )
    add("cut.parquet", "expected a Parquet file", DEMO_STARS.read_bytes()[:5000])
    np.save(add("pickle.npy", "unpickling"), np.array([Unpickled(tmp_path / "trace")], dtype=object))
    add("pickle.npz", "expected", pickle.dumps(Unpickled(tmp_path / "trace")))
    add("nowhere.fits", "got nothing of this name")
    add("loop.fits", "expected a file or a folder").symlink_to(folder / "loop.fits")
    if RESTRICTED is not None:
        add("locked.fits", "permission denied", whole.read_bytes()).chmod(0)
    return causes


def spectrafm(*arguments, folder: Path) -> subprocess.CompletedProcess:
    """The command line in a process of its own."""
    command = [*(RESTRICTED or []), sys.executable, "-m", "spectrafm_cli", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200)


def check_failed(table: Path, errors: str, hostile: dict[Path, str]) -> None:
    """Every file has one line, in failed.csv and on standard error, with its name and cause; nothing else is there."""
    with table.open(newline="", encoding="utf-8") as lines:
        failed = {row["file"]: row["cause"] for row in csv.DictReader(lines)}
    listed = [line for line in errors.replace("\r", "\n").splitlines() if line.startswith("  ")]
    assert failed.keys() == {str(path) for path in hostile}
    assert listed == [f"  {path}: {cause}" for path, cause in failed.items()]
    for path, cause in hostile.items():
        assert cause.lower() in failed[str(path)].lower(), path.name


def among(good: list[Path], hostile: dict[Path, str]) -> list[Path]:
    return [*list(hostile)[:8], *good, *list(hostile)[8:]]


def test_a_batch_of_broken_files_is_listed_and_the_others_are_predicted(tmp_path, good, hostile):
    result = spectrafm("predict", *among(good, hostile), "--output", "labels.csv", folder=tmp_path)
    assert result.returncode == 1, result.stderr
    check_failed(tmp_path / "failed.csv", result.stderr, hostile)
    labels = pd.read_csv(tmp_path / "labels.csv")
    assert set(labels["object_id"]) == {"mixed", "table", "a table", "HD 1 ü", "星"}
    assert len(labels) == 6
    assert np.isfinite(labels["teff"]).all()
    same = labels["teff"][labels["object_id"] != "星"]
    np.testing.assert_allclose(same, same.iloc[0], rtol=1e-5)
    assert "rows whose object_id came before: 1 " in result.stdout
    assert not (tmp_path / "trace").exists()


@pytest.mark.slow
def test_a_data_set_is_made_of_the_usable_files(tmp_path, good, hostile):
    (tmp_path / "labels.csv").write_text("id,teff,teff_err\n星,5000,50\n星,1,1\nHD 2,4000,50\n", encoding="utf-8")
    arguments = ("--out", "set", "--labels", "labels.csv", "--split-by", "none")
    result = spectrafm("data", "from-files", *among(good, hostile), *arguments, folder=tmp_path)
    assert result.returncode == 1, result.stderr
    check_failed(tmp_path / "failed.csv", result.stderr, hostile)
    rows = pq.read_table(tmp_path / "set" / "data" / "train-00000-of-00001.parquet").to_pandas()
    assert rows["object_id"].tolist() == ["a table", "mixed", "HD 1 ü", "星", "星", "table"]
    # "HD 1 ü" brings its own, as a data set does.
    own = pq.read_table(good[2])["teff"][0].as_py()
    assert rows["teff"].fillna(0).tolist() == [0, 0, own, 5000, 5000, 0]
    for name in PIXELS:
        np.testing.assert_array_equal(np.stack(rows[name][:2]), np.stack([rows[name][5]] * 2))
    assert "spectra with labels: 3 of 6" in result.stdout
    assert "labels that match no spectrum: 1: HD 2" in result.stdout
    assert "labels that are there more than once (the first row counts): 1: 星" in result.stdout
    assert not (tmp_path / "trace").exists()


def test_a_broken_file_alone_is_one_line_and_exit_code_2(tmp_path, hostile, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path, cause in hostile.items():
        if path.name == "locked.fits" and not os.geteuid():
            continue  # this process may read it
        for verb, *options in (["predict", "--output", "labels.csv"], ["plot"], ["data", "from-files", "--out", "set"]):
            words = [verb] if verb != "data" else [verb, options.pop(0)]
            assert main([*words, str(path), *options]) == 2, (verb, path)
            captured = capsys.readouterr()
            assert captured.out == ""
            lines = [line for line in captured.err.splitlines() if "\r" not in line]
            assert len(lines) == 1, captured.err
            assert lines[0].startswith(f"spectrafm {verb}: ")
            assert str(path) in lines[0]
            assert cause.lower() in lines[0].lower()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hostile", "whole.fits"]


def test_nothing_but_broken_files_is_exit_code_2_and_a_table_of_them(tmp_path, hostile, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    broken = [str(path) for path in hostile if path.name != "locked.fits"]
    for words, options in ((["predict"], []), (["data", "from-files"], ["--out", "set"])):
        assert main([*words, *broken, *options]) == 2
        errors = capsys.readouterr().err
        assert f"got {len(broken)} that cannot, see failed.csv" in errors and errors.count(f" like {tmp_path}") > 3
        with (tmp_path / "failed.csv").open(newline="", encoding="utf-8") as lines:
            assert sorted(row["file"] for row in csv.DictReader(lines)) == sorted(broken)
    assert not (tmp_path / "set").exists()


def test_a_star_with_scattered_lines_in_a_csv_is_refused(tmp_path, star, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["wavelength", "flux", "flux_error"]
    lines = ["object_id,wavelength,flux,flux_error"]
    for object_id in ("a", "b", "a"):
        lines += [f"{object_id},{w},{f},{e}" for w, f, e in zip(*(star[name] for name in names), strict=True)]
    (tmp_path / "stars.csv").write_text("\n".join(lines))
    assert main(["predict", "stars.csv"]) == 1
    assert "stars.csv: object_id: expected the lines of a star together" in capsys.readouterr().err
