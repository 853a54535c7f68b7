"""Checkpoints as ONNX: predictions of ONNX Runtime agree with the model."""

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
from spectrafm_hf import load_checkpoint, save_checkpoint
from spectrafm_hf.checkpoints import BASE_CHECKPOINT
from spectrafm_hf.data.readers import read_spectra
from spectrafm_hf.hub.export import INPUTS, LEFT_OUT, OPSET, TOLERANCE, export_onnx
from spectrafm_hf.synthesis.synthetic import SyntheticStars


RESOURCES = Path(spectrafm_hf.__file__).parent / "resources"


def session_of(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def assert_same(session, model, tokenizer, rows, requests, tolerance=TOLERANCE):
    """ONNX Runtime given what the tokenizer returned, against the network alone; differences in units of the error."""
    found = tokenizer([{name: row[name] for name in COLUMNS} for row in rows], requests=requests)
    inputs = {name: found[name] for name in INPUTS}
    values, errors = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    with torch.no_grad():
        expected = model(**inputs)
    scale = expected.prediction_errors.numpy()
    assert values.shape == errors.shape == tuple(inputs["request_ids"].shape)
    np.testing.assert_array_less(np.abs(values - expected.predictions.numpy()) / scale, tolerance)
    np.testing.assert_array_less(np.abs(errors / scale - 1), tolerance)


NETWORK = ["teff", "logg", "fe_h", "alpha_m"]
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
    return path, export_by_command(BASE_CHECKPOINT, path)


@pytest.fixture(scope="module")
def demo() -> list[dict]:
    return list(read_spectra([RESOURCES / "gaia_xp_demo.parquet"]))


def test_any_number_of_stars_intervals_and_requests_is_answered_as_by_the_network(exported, demo):
    model, tokenizer = load_checkpoint(BASE_CHECKPOINT)
    session = session_of(exported[0])
    generator = np.random.default_rng(0)
    masked = [{**row, "mask": generator.random(len(row["mask"])) < 0.4} for row in demo[:20]]
    moved = [{**row, "wavelength": row["wavelength"] * (1 + 1e-4 * generator.normal())} for row in demo[:20]]
    part = [{**row, "mask": np.arange(len(row["mask"])) < 200} for row in demo[:7]]
    h_band = list(islice(SyntheticStars("apogee", seed=5), 12))
    for rows in (demo, demo[:1], masked, moved, part, h_band, h_band[:1], [demo[0], h_band[1], part[2]]):
        assert_same(session, model, tokenizer, rows, NETWORK)
    for requests in (["fe_h"], ["logg", "teff", "logg"], [["logg", "fe_h"], ["teff", "alpha_m"]]):
        assert_same(session, model, tokenizer, demo[:2], requests)


def test_a_label_that_the_network_does_not_answer_and_a_star_without_pixels_are_nan(exported, demo):
    _, tokenizer = load_checkpoint(BASE_CHECKPOINT)
    found = tokenizer([{name: row[name] for name in COLUMNS} for row in demo[:2]], requests=["teff", "mg_fe"])
    inputs = {name: found[name].numpy() for name in INPUTS}
    inputs["attention_mask"][1] = False
    values, errors = session_of(exported[0]).run(None, inputs)
    np.testing.assert_array_equal(np.isfinite(values), [[True, False], [False, False]])
    np.testing.assert_array_equal(np.isfinite(errors), [[True, False], [False, False]])


def test_the_command_line_prints_the_result(exported):
    path, printed = exported
    found = re.fullmatch(
        rf"written: {re.escape(str(path))} \(ONNX, opset 20\); ONNX Runtime's answers to 128 spectra differ "
        r"from PyTorch's by at most (\d\.\de-\d\d) of their errors\n"
        r"it answers teff, logg, fe_h, alpha_m as the network does alone; the fit that refines them in the H band "
        r"is not in it, nor what that adds: c_fe, n_fe, [\w, ]+\n",
        printed,
    )
    assert found and 0 < float(found[1]) < TOLERANCE


def test_the_file_is_complete_and_valid_and_states_its_outputs(exported):
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
    assert about["checkpoint"] == BASE_CHECKPOINT
    assert json.loads(about["labels"]) == {
        "teff": {"request_id": 2, "unit": "K"},
        "logg": {"request_id": 3, "unit": "dex"},
        "fe_h": {"request_id": 4, "unit": "dex"},
        "alpha_m": {"request_id": 5, "unit": "dex"},
    }
    assert about["left_out"] == LEFT_OUT


def test_the_file_holds_no_path_of_the_machine_that_wrote_it(exported):
    content = exported[0].read_bytes()
    for path in (RESOURCES.parents[1], Path(torch.__file__).parents[1], exported[0].parent):
        assert str(path).encode() not in content


@pytest.mark.slow
def test_a_file_whose_answers_differ_is_not_left_and_an_earlier_one_stays(tiny_evidence, stars, tmp_path):
    save_checkpoint(*tiny_evidence, tmp_path / "tiny")
    path = tmp_path / "model.onnx"
    path.write_bytes(b"earlier")
    with pytest.raises(
        RuntimeError, match=r"not written, as ONNX Runtime differs from PyTorch by \d.*more than 1.0e-12"
    ):
        export_onnx(tmp_path / "tiny", path, stars, tolerance=1e-12)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["model.onnx", "tiny"]
    assert path.read_bytes() == b"earlier"


@pytest.mark.slow
def test_a_model_without_a_star_model_leaves_nothing_out_and_gives_the_same_bytes_again(tiny_evidence, stars, tmp_path):
    save_checkpoint(*tiny_evidence, tmp_path / "tiny")
    first, second = (export_onnx(tmp_path / "tiny", tmp_path / name, stars) for name in ("a.onnx", "b.onnx"))
    assert (first.labels, first.left_out) == (NETWORK, [])
    assert "left_out" not in session_of(first.path).get_modelmeta().custom_metadata_map
    assert first.path.read_bytes() == second.path.read_bytes()


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
    assert spectrafm_cli.main(["export", BASE_CHECKPOINT, "--output", str(tmp_path / output)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"spectrafm export: --{message}") and error.count("\n") == 1


def test_an_invalid_checkpoint_is_one_line_and_exit_code_2(tmp_path, capsys):
    assert spectrafm_cli.main(["export", "no-such-model", "--output", str(tmp_path / "model.onnx")]) == 2
    assert "checkpoint: expected one of the bundled" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_spectra_that_the_checkpoint_cannot_read_are_an_error(tmp_path, stars):
    far = [{**star, "wavelength": star["wavelength"] * 10} for star in stars]
    with pytest.raises(ValueError, match="wavelength: expected some of "):
        export_onnx(BASE_CHECKPOINT, tmp_path / "model.onnx", far)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_whose_tokens_are_pixels_is_refused(tiny_model, tiny_tokenizer, tmp_path):
    save_checkpoint(tiny_model, tiny_tokenizer, tmp_path / "tiny")
    with pytest.raises(ValueError, match="^model: expected a checkpoint on evidence to export"):
        export_onnx(tmp_path / "tiny", tmp_path / "model.onnx")


def test_a_spectrum_without_a_usable_pixel_is_a_clear_error(tmp_path, demo):
    rows = [demo[0], {**demo[1], "flux": np.full_like(demo[1]["flux"], np.nan)}]
    with pytest.raises(ValueError, match="flux: expected at least one valid pixel in each spectrum, got none in spec"):
        export_onnx(BASE_CHECKPOINT, tmp_path / "model.onnx", rows)
    assert not list(tmp_path.iterdir())


def test_without_an_extra_the_message_names_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.delitem(sys.modules, "spectrafm_hf.hub.export")
    assert spectrafm_cli.main(["export", BASE_CHECKPOINT, "--output", str(tmp_path / "model.onnx")]) == 2
    assert capsys.readouterr().err == (
        'spectrafm export: ONNX needs its libraries: pip install ".[onnx]" in a clone of the repository\n'
    )
