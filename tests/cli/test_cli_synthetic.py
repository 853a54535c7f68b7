"""`spectrafm data synthetic`."""

import pyarrow.parquet as pq
import pytest

from spectrafm_cli import main
from spectrafm_hf.synthesis.instruments import INSTRUMENTS, instrument_names


def run(capsys, *arguments) -> tuple[int, str, str]:
    code = main(["data", "synthetic", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_data_set_is_written(tmp_path, capsys):
    out = tmp_path / "stars"
    options = ["--instrument", "gaia-xp", "--out", out, "--seed", 3, "--splits", 50, 25, 25, "--workers", 1]
    code, printed, _ = run(capsys, "--n", 8, *options, "--range", "teff", 4000, 5000)
    assert code == 0
    assert printed == f"{out}: 4 train, 2 validation, 2 test\n"
    sizes = {path.name.partition("-")[0]: pq.read_metadata(path).num_rows for path in (out / "data").iterdir()}
    assert sizes == {"train": 4, "validation": 2, "test": 2}
    teff = pq.read_table(out / "data")["teff"].to_numpy()
    assert 4000 <= teff.min() <= teff.max() <= 5000


def test_help_names_the_options(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["data", "synthetic", "--help"])
    assert stopped.value.code == 0
    assert all(option in capsys.readouterr().out for option in ("--n N",))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            ["--instrument", "hubble"],
            f"instrument: expected one of {instrument_names()} or a YAML file, got 'hubble'",
        ),
        (["--range", "teff", "4000", "9e9"], "teff: expected a range within"),
        (["--range", "p_fe", "0", "1"], "label_ranges: expected labels out of"),
        (["--range", "teff", "cool", "hot"], "--range: expected a label and two numbers, got teff cool hot"),
        (["--splits", "0", "0", "0"], "splits: expected three shares"),
        (["--seed", "-1"], "seed: expected at least 0, got -1"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys, options, expected):
    code, printed, errors = run(
        capsys, "--n", 8, "--instrument", "gaia-xp", "--out", tmp_path / "stars", "--workers", 1, *options
    )
    assert (code, printed) == (2, "")
    assert errors.startswith("spectrafm data: ")
    assert errors.count("\n") == 1
    assert expected in errors
    assert not list(tmp_path.iterdir())


def test_an_error_in_an_instrument_file_names_file_and_field(tmp_path, capsys):
    text = (INSTRUMENTS / "miles.yaml").read_text().replace("fwhm: 2.5", "fwhm: sharp")
    (tmp_path / "mine.yaml").write_text(text)
    code, _, errors = run(capsys, "--n", 8, "--instrument", tmp_path / "mine.yaml", "--out", tmp_path / "stars")
    assert code == 2
    assert "mine.yaml: line_spread.fwhm: expected a number from 1e-09 to inf, got 'sharp'" in errors
