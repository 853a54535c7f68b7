"""`spectrafm explain`, `embed` and `similar` with the bundled model on real stars."""

import csv
import re
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from matplotlib import image

from spectrafm_cli import main
from spectrafm_hf.files import DEMO_STARS
from spectrafm_hf.synthesis.synthetic import SyntheticStars


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, re.sub(r"\r[^\n]*\n?", "", captured.err)

    return call


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Nine of the demo stars, one of them without a pixel that counts."""
    table = pq.read_table(DEMO_STARS).slice(0, 9)
    masks = table["mask"].to_pylist()
    masks[4] = [True] * len(masks[4])
    path = tmp_path_factory.mktemp("few") / "few.parquet"
    pq.write_table(table.set_column(table.schema.get_field_index("mask"), "mask", pa.array(masks)), path)
    return path


def rows_of(path):
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("verb", ["explain", "embed", "similar"])
def test_the_verbs_have_help(verb, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([verb, "--help"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: spectrafm {verb}")


def test_explain_writes_pictures_and_tables(run, tmp_path):
    code, printed, errors = run("explain", DEMO_STARS, "--output", "why", "--labels", "teff", "--by-type")
    assert (code, errors) == (0, "")
    names = {path.name for path in (tmp_path / "why").iterdir()}
    pictures = {f"teff{kind}.png" for kind in ("", "-giants", "-dwarfs", "-cool", "-hot")}
    assert pictures | {"curves.csv", "intervals.csv", "peaks.csv"} == names
    assert image.imread(tmp_path / "why" / "teff.png").shape == (1125, 1999, 4)
    curves = rows_of(tmp_path / "why" / "curves.csv")
    assert {row["stars"] for row in curves} == {"all", "giants", "dwarfs", "cool", "hot"}
    everything = [row for row in curves if row["stars"] == "all"]
    assert len(everything) == 343
    intervals = [row for row in rows_of(tmp_path / "why" / "intervals.csv") if row["stars"] == "all"]
    assert sum(float(row["teff"]) for row in intervals) == pytest.approx(1.0, abs=1e-3)
    assert re.search(r"^all +64 +teff +\d,\d{3}-\d,\d{3} Å: \d\d% +10 +\d+ of 15; random", printed, re.MULTILINE)
    # Deeper Balmer lines mean a hotter star.
    at = {float(row["wavelength"]): float(row["teff_response"]) for row in everything}
    assert at[6560.0] > 0
    assert at[4860.0] > 0


def test_a_star_without_pixels_is_listed_and_the_others_explained(run, few, tmp_path):
    code, printed, errors = run("explain", few, "--output", "why", "--labels", "logg")
    assert code == 1
    assert "no valid pixel" in errors
    assert len(rows_of(tmp_path / "why" / "failed.csv")) == 1
    assert re.search(r"^all +8 +logg", printed, re.MULTILINE)
    assert (tmp_path / "why" / "logg.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--labels", "age"], "expected names out of"),
        (["--line-width", "-1"], "line_width: expected a positive number"),
        (["--labels", "teff", "mg_fe"], "no answer from this spectrum: mg_fe"),
    ],
)
def test_missing_input_is_one_line_and_writes_nothing(run, tmp_path, arguments, message):
    code, _, errors = run("explain", DEMO_STARS, "--output", "why", *arguments)
    assert code == 2
    assert message in errors
    assert errors.count("\n") == 1
    assert not (tmp_path / "why").exists()


def test_embed_and_similar_find_stars_that_are_alike(run, tmp_path):
    code, printed, errors = run("embed", DEMO_STARS, "--output", "e.parquet")
    assert (code, errors) == (0, "")
    assert re.fullmatch(
        r"written: e.parquet, 64 vectors of 192 numbers, of spectra of 3,3\d\d-10,\d{3} Å\ndevice: cpu\n", printed
    )
    code, printed, errors = run("similar", DEMO_STARS, "--to", "e.parquet", "-n", 2, "--output", "near.csv")
    assert (code, errors) == (0, "")
    near = rows_of(tmp_path / "near.csv")
    assert len(near) == 128
    assert all(row["object_id"] != row["neighbour"] for row in near)
    ratio = float(re.search(r"ratio (\d\.\d+)", printed)[1])
    assert ratio < 0.6
    # The same from the spectra as from their vectors.
    run("similar", DEMO_STARS, "--to", DEMO_STARS, "-n", 2, "--output", "again.csv")
    assert (tmp_path / "again.csv").read_text() == (tmp_path / "near.csv").read_text()


def test_spectra_of_other_wavelengths_are_refused_in_one_line(run, tmp_path):
    (star,) = islice(SyntheticStars("apogee", seed=3), 1)
    columns = {name: [np.asarray(star[name])] for name in ("wavelength", "flux", "flux_error", "mask")}
    pq.write_table(pa.table({"object_id": ["h"], **columns}), tmp_path / "h.parquet")
    code, _, errors = run("similar", "h.parquet", "--to", DEMO_STARS)
    assert code == 2
    assert re.fullmatch(r"spectrafm similar: embeddings: expected spectra with the same wavelengths, .*\n", errors)


def test_a_comma_in_an_identifier_makes_no_column(run, tmp_path):
    table = pq.read_table(DEMO_STARS).slice(0, 3)
    names = pa.array(["a,b", 'c "d"', "e"])
    pq.write_table(table.set_column(table.schema.get_field_index("object_id"), "object_id", names), "named.parquet")
    assert run("similar", "named.parquet", "--to", "named.parquet", "-n", 2, "--output", "near.csv")[0] == 0
    near = rows_of(tmp_path / "near.csv")
    assert [row["object_id"] for row in near] == ["a,b"] * 2 + ['c "d"'] * 2 + ["e"] * 2
    assert all(None not in row for row in near)


def test_similar_skips_unusable_stars(run, few):
    code, printed, errors = run("similar", few, "--to", DEMO_STARS, "-n", 1)
    assert code == 1
    assert "no valid pixel" in errors
    assert len([line for line in printed.splitlines() if re.match(r"\d+ +1 ", line)]) == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["embed", DEMO_STARS, "--output", "e.csv"], "output: expected the name of a .parquet file"),
        (["embed", "nothing", "--output", "e.parquet"], "expected a file or a folder"),
        (["similar", DEMO_STARS, "--to", "nothing"], "expected a file or a folder"),
        (["similar", DEMO_STARS, "--to", DEMO_STARS, "--output", "no/near.csv"], "output: expected a folder"),
    ],
)
def test_files_that_cannot_be_are_one_line(run, tmp_path, arguments, message):
    code, _, errors = run(*arguments)
    assert code == 2
    assert message in errors
    assert errors.count("\n") == 1
    assert not (tmp_path / "e.parquet").exists()
