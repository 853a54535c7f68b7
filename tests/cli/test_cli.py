"""The command line on real files."""

import csv
import io
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from astropy.io import fits
from astropy.table import Table
from matplotlib import image

from spectrafm_cli import main
from spectrafm_cli.report import fitting
from spectrafm_hf import save_checkpoint
from spectrafm_hf.files import DEMO_STARS
from spectrafm_hf.inference.training_range import TrainingRange


LABELS = ["teff", "logg", "fe_h", "alpha_m"]


@pytest.fixture
def checkpoint(tmp_path, tiny_model, tiny_tokenizer) -> Path:
    """Random weights with the range of what the demo stars are."""
    save_checkpoint(tiny_model, tiny_tokenizer, tmp_path / "checkpoint")
    TrainingRange({"teff": (0.0, 1e5)}, (3360.0, 10200.0), (20.0, 20.0)).save(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.fixture
def run(checkpoint, capsys, tmp_path, monkeypatch):
    """Run a verb with the tiny checkpoint in an own folder: exit code, standard output, standard error."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def call(verb, *arguments):
        model = ["--model", str(checkpoint)] if verb in ("predict", "demo") else []
        code = main([verb, *map(str, arguments), *model])
        captured = capsys.readouterr()
        # On a busy machine a progress bar shows up: from a carriage return to the end of the line.
        return code, captured.out, re.sub(r"\r[^\n]*\n?", "", captured.err)

    return call


def one_line(text: str) -> bool:
    return text.count("\n") == 1 and text.endswith("\n")


def test_help_names_the_verbs_in_a_process_of_its_own():
    result = subprocess.run(
        [sys.executable, "-m", "spectrafm_cli", "--help"], capture_output=True, text=True, check=True
    )
    assert result.stdout.startswith("usage: spectrafm")
    assert all(verb in result.stdout for verb in ("demo", "predict", "plot", "data", "formats"))
    assert not result.stderr


@pytest.mark.parametrize(
    "command",
    [
        ["predict"],
        ["spectrum"],
        ["plot"],
        ["formats"],
        ["demo"],
        ["data"],
        ["data", "from-files"],
        ["data", "gaia-xp"],
        ["data", "synthetic"],
    ],
)
def test_every_verb_has_help(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--help"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: spectrafm {' '.join(command)}")


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".fits"])
def test_predict_writes_one_row_a_star(run, tmp_path, suffix):
    output = tmp_path / f"labels{suffix}"
    code, printed, errors = run("predict", DEMO_STARS, "--output", output, "--batch-size", 10)
    assert (code, errors) == (0, "")
    table = pq.read_table(output).to_pandas() if suffix == ".parquet" else Table.read(output).to_pandas()
    ids = pq.read_table(DEMO_STARS)["object_id"].to_pylist()
    assert table["object_id"].astype(str).str.strip("b'").tolist() == ids
    assert list(table.columns) == [
        "object_id",
        *(n for name in LABELS for n in (name, f"{name}_err")),
        "flags",
        "reason",
    ]
    assert np.isfinite(table[LABELS].to_numpy()).all()
    assert (table["teff_err"] > 0).all()
    lines = printed.splitlines()
    assert lines[0].split() == [
        "object_id",
        "teff",
        "[K]",
        "logg",
        "[dex]",
        "fe_h",
        "[dex]",
        "alpha_m",
        "[dex]",
        "flags",
    ]
    assert lines[1].startswith(ids[0])
    assert f"{table['teff'][0]:.0f} ± {table['teff_err'][0]:.0f}" in lines[1]
    assert lines[21] == f"... 44 more, see {output}"


def test_predict_reads_several_inputs_and_the_splits_of_a_folder(run, tmp_path):
    (tmp_path / "stars" / "data").mkdir(parents=True)
    shutil.copy(DEMO_STARS, tmp_path / "stars" / "data" / "test-00000-of-00001.parquet")
    table = pq.read_table(DEMO_STARS)
    pq.write_table(table.slice(0, 3), tmp_path / "stars" / "data" / "train-00000-of-00001.parquet")
    code, printed, _ = run("predict", tmp_path / "stars", "--split", "train")
    assert (code, len(printed.splitlines())) == (0, 5)
    assert printed.splitlines()[-1] == "device: cpu"
    code, _, errors = run("predict", tmp_path / "stars", "--device", "tpu")
    assert code == 2 and errors.startswith("spectrafm predict: device: expected one of auto, cpu")
    code, printed, _ = run("predict", tmp_path / "stars", DEMO_STARS)
    assert code == 0
    assert f"... {64 + 3 + 64 - 20} more, --output FILE keeps them" in printed


def test_the_same_star_gives_the_same_labels_from_parquet_csv_and_fits(run, tmp_path):
    table = pq.read_table(DEMO_STARS).slice(0, 1)
    star = {name: np.array(table[name][0].as_py()) for name in ("wavelength", "flux", "flux_error", "mask")}
    pq.write_table(table, tmp_path / "star.parquet")
    lines = zip(*(star[name].tolist() for name in star), strict=True)
    text = "\n".join(["wavelength,flux,flux_error,mask", *(f"{w},{f!r},{e!r},{int(m)}" for w, f, e, m in lines)])
    (tmp_path / "star.csv").write_text(text)
    Table(star).write(tmp_path / "star.fits")
    results = []
    for suffix in (".parquet", ".csv", ".fits"):
        output = tmp_path / "labels.parquet"
        assert run("predict", tmp_path / f"star{suffix}", "--output", output, "--overwrite")[0] == 0
        results.append(pq.read_table(output).select(LABELS).to_pandas().to_numpy())
    np.testing.assert_allclose(results[1:], [results[0]] * 2, rtol=1e-5)


def test_flags_name_stars_outside_the_training_range_and_unusable_ones(run, tmp_path, checkpoint):
    rows = pq.read_table(DEMO_STARS).slice(0, 3).to_pylist()
    rows[1]["mask"] = [True] * 343
    rows[2] = {**rows[2], **{name: rows[2][name][:100] for name in ("wavelength", "flux", "flux_error", "mask")}}
    pq.write_table(pa.Table.from_pylist(rows, schema=pq.read_schema(DEMO_STARS)), tmp_path / "stars.parquet")
    code, printed, errors = run("predict", tmp_path / "stars.parquet", "--output", tmp_path / "labels.parquet")
    assert code == 1
    assert errors.splitlines() == [
        f"1 failed, see {tmp_path / 'failed.csv'}:",
        f"  {tmp_path / 'stars.parquet'}: {rows[1]['object_id']}: no valid pixel",
    ]
    labels = pq.read_table(tmp_path / "labels.parquet")
    assert labels["flags"].to_pylist() == ["", "", "wavelength"]
    assert labels["reason"].to_pylist() == ["", "no valid pixel", ""]
    assert np.isnan(labels["teff"].to_numpy()).tolist() == [False, True, False]
    assert "2 of 3 stars flagged: no valid pixel (1), wavelength (1)" in printed
    (checkpoint / "training_range.json").unlink()
    code, printed, _ = run("predict", tmp_path / "stars.parquet")
    assert "1 of 3 stars flagged" in printed
    assert "has no training range" in printed


def test_plots_are_pictures_of_the_stars_and_an_overview(run, tmp_path):
    table = pq.read_table(DEMO_STARS).slice(0, 2)
    table = table.set_column(0, "object_id", pa.array(["../HD 1/ü", "星"]))
    pq.write_table(table, tmp_path / "stars.parquet")
    code, printed, _ = run("predict", tmp_path / "stars.parquet", "--plot", tmp_path / "plots")
    assert code == 0
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == [
        "01-.._HD_1_ü.png",
        "02-星.png",
        "overview.png",
    ]
    for path in (tmp_path / "plots").iterdir():
        assert image.imread(path)[..., :3].std() > 0.01
    assert "2 spectra and overview.png" in printed


def test_bad_input_is_one_line_and_exit_code_2(run, tmp_path):
    (tmp_path / "notes.txt").write_text("flux")
    (tmp_path / "lambda.csv").write_text("place,flux\n1,2\n")
    (tmp_path / "nm.csv").write_text("wavelength,flux\n500,2\n501,2\n")
    fits.PrimaryHDU().writeto(tmp_path / "nothing.fits")
    pq.write_table(pq.read_table(DEMO_STARS).slice(0, 0), tmp_path / "empty.parquet")
    cases = {
        ("nowhere.fits",): "nowhere.fits: expected a file",
        ("notes.txt",): "notes.txt: ",
        ("lambda.csv",): "got place, flux; name it with --columns wavelength=NAME",
        ("nm.csv",): "(are these nanometres or microns? set --wavelength-unit)",
        ("nothing.fits",): "nothing.fits: expected",
        ("empty.parquet",): "expected at least one spectrum",
        (DEMO_STARS, "--output", tmp_path / "labels.txt"): "labels.txt",
        (DEMO_STARS, "--output", tmp_path / "no" / "labels.csv"): "expected a folder that exists",
        (DEMO_STARS, "--split", "test"): "split: expected a data set folder",
        (DEMO_STARS, "--wavelength-unit", "kg"): "expected a unit of length, got 'kg'",
    }
    for (name, *others), expected in cases.items():
        code, printed, errors = run("predict", tmp_path / name, *others)
        assert (code, printed) == (2, "")
        assert one_line(errors), errors
        assert errors.startswith("spectrafm predict: ")
        assert expected in errors


def test_names_of_the_first_stars_only_are_remembered(run, tmp_path, monkeypatch):
    monkeypatch.setattr("spectrafm_cli.summary.OVERVIEW_STARS", 128)
    assert "rows whose object_id came before: 64 (rows" in run("predict", DEMO_STARS, DEMO_STARS, "--batch-size", 64)[1]
    monkeypatch.setattr("spectrafm_cli.summary.OVERVIEW_STARS", 64)
    assert "came before" not in run("predict", DEMO_STARS, DEMO_STARS, "--batch-size", 64)[1]
    monkeypatch.setattr("spectrafm_cli.summary.OVERVIEW_STARS", 67)
    summary = run("predict", DEMO_STARS, DEMO_STARS, "--batch-size", 64)[1]
    assert "rows whose object_id came before: 3, of the first 67 (rows" in summary


def test_a_file_whose_every_star_fails_is_flagged_among_others_and_an_error_alone(run, tmp_path):
    rows = pq.read_table(DEMO_STARS).slice(0, 3).to_pylist()
    for row in rows:
        row["mask"] = [True] * 343
    dark, output = tmp_path / "dark.parquet", tmp_path / "labels.csv"
    pq.write_table(pa.Table.from_pylist(rows, schema=pq.read_schema(DEMO_STARS)), dark)
    code, printed, _ = run("predict", dark, DEMO_STARS, "--output", output)
    assert code == 1
    assert "no valid pixel (3)" in printed
    assert "rows whose object_id came before: 3 " in printed
    with (tmp_path / "failed.csv").open(newline="") as lines:
        failed = list(csv.DictReader(lines))
    assert failed == [{"file": str(dark), "cause": f"{row['object_id']}: no valid pixel"} for row in rows]
    output.unlink()
    code, _, errors = run("predict", dark, "--output", output)
    assert code == 2
    assert one_line(errors)
    assert "INPUT: expected a spectrum that can be used, got 3 that cannot" in errors
    assert "no valid pixel" in errors
    assert not list(tmp_path.glob("*labels*"))


def test_a_wavelength_in_another_unit_is_refused_until_the_unit_is_stated(run, tmp_path):
    # Not the grid of the Gaia archive, which is known by itself.
    lines = [f"{w},1.{w % 7},0.1" for w in range(337, 1020, 2)]
    (tmp_path / "nm.csv").write_text("\n".join(["wavelength,flux,flux_error", *lines]))
    code, _, errors = run("predict", tmp_path / "nm.csv")
    assert code == 2
    assert "nanometres" in errors
    code, printed, errors = run("predict", tmp_path / "nm.csv", "--wavelength-unit", "nm")
    assert (code, errors) == (0, "")
    assert "flagged" not in printed


def test_bad_arguments_are_one_line_and_exit_code_2(capsys):
    for arguments in ([], ["predict"], ["fly"], ["data"], ["predict", "a.csv", "--batch-size", "0"], ["demo", "extra"]):
        try:
            code = main(arguments)
        except SystemExit as stopped:
            code = stopped.code
        assert code == 2
        assert one_line(capsys.readouterr().err)


def test_an_unknown_model_is_one_line_that_names_it(capsys):
    assert main(["predict", str(DEMO_STARS), "--model", "no-such-model"]) == 2
    errors = capsys.readouterr().err
    assert one_line(errors)
    assert "no-such-model" in errors


def test_demo_compares_with_apogee_and_draws_a_picture(run, tmp_path):
    code, printed, errors = run("demo", "--output", tmp_path / "new folder")
    assert (code, errors) == (0, "")
    stars = pq.read_table(DEMO_STARS)
    first = next(line for line in printed.splitlines() if line.startswith(stars["object_id"][0].as_py()))
    assert re.search(rf"± \d+ +{stars['teff'][0].as_py():.0f} ", first)
    heading, *summary = printed.splitlines()[-8:-3]
    assert heading.split() == ["label", "scatter", "(1.4826", "MAD)", "bias", "(median)", "scatter", "/", "sigma"]
    assert [line.split()[0] for line in summary] == LABELS
    picture = image.imread(tmp_path / "new folder" / "spectrafm-demo.png")
    assert picture.shape[1] > 2000
    assert [path.name for path in (tmp_path / "new folder").iterdir()] == ["spectrafm-demo.png"]


def test_data_reports_a_bad_source_in_one_line(run, tmp_path):
    (tmp_path / "other.whl").write_bytes(b"no archive")
    code, _, errors = run("data", "gaia-xp", "--out", tmp_path / "set", "--source", tmp_path / "other.whl")
    assert code == 2
    assert one_line(errors)
    assert errors.startswith("spectrafm data: ")
    assert not (tmp_path / "set").exists()


def test_only_the_first_of_many_failures_are_printed_and_all_are_kept(run, tmp_path):
    missing = [tmp_path / f"{number}.fits" for number in range(30)]
    code, _, errors = run("predict", DEMO_STARS, *missing)
    assert code == 1
    assert errors.splitlines()[0] == "30 failed, see failed.csv:"
    assert errors.splitlines()[1:] == [f"  30 like {missing[0]}: expected a file or a folder, got nothing of this name"]
    assert len((tmp_path / "here" / "failed.csv").read_text().splitlines()) == 31
    assert "failed.csv (in place of that of an earlier run):" in run("predict", DEMO_STARS, *missing)[2]
    # The next run, in which all is well, does not leave it there and says so; a table of somebody else stays.
    code, printed, _ = run("predict", DEMO_STARS)
    assert code == 0
    assert printed.splitlines()[-1] == "removed: failed.csv of an earlier run, as nothing failed in this one"
    assert not (tmp_path / "here" / "failed.csv").exists()
    (tmp_path / "here" / "failed.csv").write_text("my notes")
    assert run("predict", DEMO_STARS)[0] == 0
    assert (tmp_path / "here" / "failed.csv").read_text() == "my notes"


def test_bad_files_of_a_folder_are_counted_by_kind(run, tmp_path):
    (tmp_path / "bad").mkdir()
    for number in range(7):
        (tmp_path / "bad" / f"{number}.csv").write_text("a,b\n1,2\n3,4\n")
    for number in range(3):
        (tmp_path / "bad" / f"{number}.fits").write_bytes(b"")
    code, _, errors = run("predict", tmp_path / "bad")
    assert code == 2
    assert one_line(errors)
    assert "got 10 that cannot, see failed.csv: 7 like " in errors
    assert f"; 3 like {tmp_path / 'bad' / '0.fits'}: " in errors


@pytest.mark.parametrize("verb", ["predict", "data gaia-xp"])
def test_the_help_of_the_verb_is_named_where_its_arguments_are_wrong(verb, capsys):
    with pytest.raises(SystemExit) as raised:
        main([*verb.split(), *(["a.fits"] if verb == "predict" else ["--out", "a"]), "--out-put", "b"])
    assert raised.value.code == 2
    expected = f"spectrafm {verb}: unrecognized arguments: --out-put b (see spectrafm {verb} --help)\n"
    assert capsys.readouterr().err == expected


def test_a_table_of_stars_fits_the_screen():
    flags = "not_at_rest;unlike_training;bad_pixels;edge"
    header = ["object_id", *(f"label {number} [dex]" for number in range(8)), "flags"]
    rows = [["x" * 60, *["-1.23 ± 0.45"] * 8, flags], ["y", *["-1.23 ± 0.45"] * 8, ""]]
    (first, star, other), left_out = fitting(header, rows, ";")
    assert first[0] == "object_id" and first[-1] == "flags" and left_out == header[len(first) - 1 : -1] != []
    assert (star[-1], other[-1], other[0]) == ("not_at_rest +3", "", "y")
    assert len(star[0]) == 30 and "..." in star[0]
    assert sum(max(map(len, column)) + 2 for column in zip(first, star, other, strict=True)) - 2 <= 100
    # What fits is left as it is.
    narrow = [[line[0][:9], *line[1:3], line[-1]] for line in (header, *rows)]
    assert fitting(narrow[0], narrow[1:], ";") == (narrow, [])


def test_a_terminal_that_knows_ascii_only_does_not_stop_a_run(checkpoint, tmp_path, monkeypatch):
    table = pq.read_table(DEMO_STARS).slice(0, 1)
    pq.write_table(table.set_column(0, "object_id", pa.array(["HD ü"])), tmp_path / "star.parquet")
    terminal = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(terminal, encoding="ascii"))
    assert main(["predict", str(tmp_path / "star.parquet"), "--model", str(checkpoint)]) == 0
    sys.stdout.flush()
    assert b"HD ?" in terminal.getvalue()
