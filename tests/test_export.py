"""Checkpoints as ONNX: ONNX Runtime answers as the model does, whatever is asked of it."""

import contextlib
import io
import json
import re
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import spectrafm_cli
import spectrafm_hf
from spectrafm_hf import SpectraFMConfig, SpectraFMForPrediction, SpectraFMTokenizer, load_checkpoint, save_checkpoint
from spectrafm_hf.checkpoints import BASE_CHECKPOINT
from spectrafm_hf.data.readers import read_spectra
from spectrafm_hf.data.synthetic import SyntheticStars
from spectrafm_hf.export import INPUTS, OPSET, TOLERANCE, export_onnx


RESOURCES = Path(spectrafm_hf.__file__).parent / "resources"


def session_of(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def assert_same(session, model, inputs, tolerance=TOLERANCE):
    """ONNX Runtime given what the tokenizer returned, as it is; differences in units of the error."""
    values, errors = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    with torch.no_grad():
        expected = model(**inputs)
    scale = expected.errors.numpy()
    assert values.shape == errors.shape == tuple(inputs["request_ids"].shape)
    np.testing.assert_array_less(np.abs(values - expected.values.numpy()) / scale, tolerance)
    np.testing.assert_array_less(np.abs(errors / scale - 1), tolerance)


SMALL = "spectrafm-gaia-xp-small"
COLUMNS = ("wavelength", "flux", "flux_error", "mask")


def export_by_command(name: str, path: Path) -> str:
    """What it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert spectrafm_cli.main(["export", name, "--output", str(path)]) == 0
    return printed.getvalue()


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> tuple[Path, str]:
    """A bundled checkpoint as ONNX, and what the command line said."""
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    return path, export_by_command(SMALL, path)


@pytest.fixture(scope="module")
def demo() -> list[dict]:
    return list(read_spectra([RESOURCES / "gaia_xp_demo.parquet"]))


def cut(row: dict, *windows: tuple[int, int]) -> dict:
    """Only these pixels; between two windows is a gap, which no token bridges."""
    return {name: np.concatenate([np.asarray(row[name])[low:high] for low, high in windows]) for name in COLUMNS}


def test_any_number_of_stars_tokens_and_requests_is_answered_as_by_the_model(exported, demo):
    model, tokenizer = load_checkpoint(SMALL)
    session = session_of(exported[0])
    generator = np.random.default_rng(0)
    one_token = [cut(row, (0, 150)) for row in demo[:7]]
    four_tokens = [cut(row, (0, 40), (50, 100), (110, 150), (200, 343)) for row in demo[:7]]
    masked = [{**row, "mask": generator.random(len(row["mask"])) < 0.4} for row in demo[:20]]
    moved = [{**row, "wavelength": row["wavelength"] * (1 + 1e-4 * generator.normal())} for row in demo[:20]]
    unequal = [demo[0], one_token[1], four_tokens[2], masked[3]]
    tokens = []
    for rows in (demo, demo[:2], demo[:1], masked, moved, unequal, one_token, one_token[:1], four_tokens):
        inputs = tokenizer([{name: row[name] for name in COLUMNS} for row in rows])
        tokens.append(inputs["flux"].shape[1])
        assert_same(session, model, inputs)
    assert set(tokens) == {1, 2, 4}
    for requests in (["fe_h"], ["logg", "teff", "logg"], [["logg", "fe_h"], ["teff"]]):
        assert_same(session, model, tokenizer(demo[:2], requests=requests))
    assert_same(session, model, tokenizer(demo[0]["wavelength"], demo[0]["flux"]))


def test_the_command_line_says_what_was_found(exported):
    path, printed = exported
    found = re.fullmatch(
        rf"written: {re.escape(str(path))} \(ONNX, opset 20\); ONNX Runtime's answers to 64 spectra differ from "
        r"PyTorch's by at most (\d\.\de-\d\d) of their errors\n",
        printed,
    )
    assert found and 0 < float(found[1]) < TOLERANCE


def test_the_file_is_whole_valid_and_says_what_it_answers(exported):
    path, _ = exported
    assert list(path.parent.iterdir()) == [path]
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert [(item.domain, item.version) for item in model.opset_import] == [("", OPSET)]
    session = session_of(path)
    assert [item.name for item in session.get_inputs()] == list(INPUTS)
    assert [(item.name, item.shape) for item in session.get_outputs()] == [
        ("values", ["stars", "requests"]),
        ("errors", ["stars", "requests"]),
    ]
    about = session.get_modelmeta().custom_metadata_map
    assert about["checkpoint"] == SMALL
    assert json.loads(about["labels"]) == {
        "teff": {"request_id": 2, "unit": "K"},
        "logg": {"request_id": 3, "unit": "dex"},
        "fe_h": {"request_id": 4, "unit": "dex"},
        "alpha_m": {"request_id": 5, "unit": "dex"},
    }


def test_the_file_holds_no_path_of_the_machine_that_wrote_it(exported):
    content = exported[0].read_bytes()
    for path in (RESOURCES.parents[1], Path(torch.__file__).parents[1], exported[0].parent):
        assert str(path).encode() not in content


@pytest.mark.slow
def test_a_file_whose_answers_differ_is_not_left_and_an_earlier_one_stays(tiny_model, tiny_tokenizer, stars, tmp_path):
    save_checkpoint(tiny_model, tiny_tokenizer, tmp_path / "tiny")
    path = tmp_path / "model.onnx"
    path.write_bytes(b"earlier")
    with pytest.raises(
        RuntimeError, match=r"not written, as ONNX Runtime differs from PyTorch by \d.*more than 1.0e-12"
    ):
        export_onnx(tmp_path / "tiny", path, stars, tolerance=1e-12)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["model.onnx", "tiny"]
    assert path.read_bytes() == b"earlier"


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name in spectrafm_hf.bundled_names("spectrafm") if name not in (SMALL, BASE_CHECKPOINT)]
)
def test_every_other_bundled_checkpoint_is_exported_too(name, demo, tmp_path):
    """The answers are compared on spectra that the export did not see."""
    export_by_command(name, tmp_path / "model.onnx")
    model, tokenizer = load_checkpoint(name)
    session = session_of(tmp_path / "model.onnx")
    rows = list(islice(SyntheticStars("apogee", seed=5), 12)) if name == "spectrafm-apogee" else demo
    generator = np.random.default_rng(1)
    for n_stars in (1, 3, len(rows)):
        changed = [
            {
                **{column: row[column] for column in COLUMNS},
                "wavelength": row["wavelength"] * (1 + 1e-5 * generator.normal()),
                "mask": generator.random(len(row["flux"])) < 0.2,
            }
            for row in rows[:n_stars]
        ]
        assert_same(session, model, tokenizer(changed))


@pytest.mark.slow
def test_the_published_architecture_is_exported_too(tmp_path, stars):
    torch.manual_seed(0)
    small = {"hidden_size": 16, "encoder_ffn_dim": [16, 16], "decoder_ffn_dim": [16] * 3, "readout_dims": [16]}
    config = SpectraFMConfig.original(**small, initializer_range=0.3)
    model = SpectraFMForPrediction(config).eval()
    tokenizer = SpectraFMTokenizer(config.label_names, patch_size=1, standardize_scale=0.1)
    save_checkpoint(model, tokenizer, tmp_path / "original")
    found = export_onnx(tmp_path / "original", tmp_path / "original.onnx", stars)
    assert found.n_spectra == len(stars)
    assert_same(session_of(found.path), model, tokenizer(stars[:2], requests=["o_fe"]))


@pytest.mark.slow
def test_the_same_checkpoint_gives_the_same_bytes(exported, demo, tmp_path):
    assert export_onnx(SMALL, tmp_path / "again.onnx", demo[:5]).path.read_bytes() == exported[0].read_bytes()


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("model.pt", "output: expected a name that ends in .onnx, got "),
        ("nowhere/model.onnx", "output: expected a folder that exists, got "),
        ("folder.onnx", "output: expected the name of a file, got the folder "),
    ],
)
def test_an_output_that_cannot_be_is_one_line_and_exit_code_2(output, message, tmp_path, capsys):
    (tmp_path / "folder.onnx").mkdir()
    assert spectrafm_cli.main(["export", "spectrafm-gaia-xp-small", "--output", str(tmp_path / output)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"spectrafm export: --{message}") and error.count("\n") == 1


def test_a_checkpoint_that_is_none_is_one_line_and_exit_code_2(tmp_path, capsys):
    assert spectrafm_cli.main(["export", "no-such-model", "--output", str(tmp_path / "model.onnx")]) == 2
    assert "checkpoint: expected one of the bundled" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_spectra_that_the_checkpoint_cannot_read_are_an_error(tmp_path, stars):
    with pytest.raises(ValueError, match=r"wavelength: expected valid pixels within \[\[15152.1"):
        export_onnx("spectrafm-apogee", tmp_path / "model.onnx", stars)
    assert list(tmp_path.iterdir()) == []


def test_a_spectrum_without_a_pixel_that_counts_is_an_error_that_says_so(tmp_path, demo):
    rows = [demo[0], {**demo[1], "flux": np.full_like(demo[1]["flux"], np.nan)}]
    with pytest.raises(ValueError, match="flux: expected at least one valid pixel in each spectrum, got none in spec"):
        export_onnx(SMALL, tmp_path / "model.onnx", rows)
    assert not list(tmp_path.iterdir())


def test_without_the_extra_the_command_says_what_to_install(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.delitem(sys.modules, "spectrafm_hf.export")
    assert spectrafm_cli.main(["export", "spectrafm-gaia-xp-small", "--output", str(tmp_path / "model.onnx")]) == 2
    assert capsys.readouterr().err == (
        'spectrafm export: ONNX needs its libraries: pip install ".[onnx]" in a clone of the repository\n'
    )


def test_a_checkpoint_on_evidence_is_refused_in_one_line(tmp_path, capsys):
    assert spectrafm_cli.main(["export", BASE_CHECKPOINT, "--output", str(tmp_path / "model.onnx")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "expected a checkpoint whose tokens are pixels to export" in error
