"""Conversion of original checkpoints: the same predictions, atomic folders, clear errors."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from spectrafm_hf.hub.conversion import convert_original_checkpoint, published_wavelengths, read_wavelengths
from spectrafm_hf.models import SpectraFMConfig, SpectraFMForPrediction, SpectraFMTokenizer


FIXTURES = Path(__file__).parents[1] / "fixtures"
SCRIPT = "convert_original_checkpoint.py"
NAMES = ("original_tiny", "original_tiny_ddp")


@pytest.fixture(scope="module", params=NAMES)
def converted(request, tmp_path_factory):
    """Model, tokenizer and what the original answered."""
    source, target = FIXTURES / request.param, tmp_path_factory.mktemp("converted") / request.param
    expected = dict(np.load(source / "expected.npz"))
    convert_original_checkpoint(source, target, expected["wavelength"])
    model, info = SpectraFMForPrediction.from_pretrained(target, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model, SpectraFMTokenizer.from_pretrained(target), expected


@pytest.fixture
def original(tmp_path) -> Path:
    """A copy that tests may spoil."""
    return Path(shutil.copytree(FIXTURES / "original_tiny", tmp_path / "original"))


def wavelengths_of(folder: Path) -> np.ndarray:
    return np.load(folder / "expected.npz")["wavelength"]


def change_config(folder: Path, section: str, **fields):
    settings = json.loads((folder / "config.json").read_text())
    settings[section].update(fields)
    (folder / "config.json").write_text(json.dumps(settings))


def change_weights(folder: Path, change):
    checkpoint = torch.load(folder / "weights.pt", weights_only=True)
    change(checkpoint["model_state_dict"])
    torch.save(checkpoint, folder / "weights.pt")


def fed_pixels(expected) -> tuple[np.ndarray, np.ndarray]:
    """Wavelength and flux in the order in which the original was fed."""
    index = expected["pixel_index"]
    return expected["wavelength"][index], np.take_along_axis(expected["flux"], index, axis=1)


# ------------------------------------------------------------------------------------------------------------- parity


def test_predictions_agree_with_the_original(converted):
    model, tokenizer, expected = converted
    assert [f"{name}_error" for name in expected["columns"][:5]] == list(expected["columns"][5:])
    assert list(model.config.label_names) == [name.lower() for name in expected["columns"][:5]]
    with torch.no_grad():
        outputs = model(**tokenizer(*fed_pixels(expected)))
    got = torch.cat((outputs.predictions, outputs.prediction_errors), dim=1).double().numpy()
    np.testing.assert_allclose(got, expected["prediction"], rtol=1e-5)


def test_encoder_output_agrees_with_the_original_token_by_token(converted):
    model, tokenizer, expected = converted
    wavelength, flux = fed_pixels(expected)
    inputs = tokenizer(wavelength, flux)
    with torch.no_grad():
        got = model(**inputs).encoder_last_hidden_state
    n_compared = 0
    for star, valid in enumerate(expected["token_valid"]):
        # The original keeps the order of its input and pads at the end; here tokens are sorted by wavelength.
        theirs = np.flatnonzero(valid)
        ours = torch.nonzero(inputs["attention_mask"][star])[:, 0].numpy()
        order = np.argsort(wavelength[star][theirs])
        np.testing.assert_allclose(wavelength[star][theirs][order], inputs["wavelength"][star, ours], rtol=1e-6)
        difference = got[star, ours].numpy() - expected["encoder_output"][star, theirs][order]
        # Relative to the size of the vector: single numbers of it may be next to zero.
        size = np.linalg.norm(expected["encoder_output"][star, theirs], axis=1).min()
        assert np.linalg.norm(difference, axis=1).max() < 1e-5 * size
        n_compared += len(ours)
    assert n_compared == expected["token_valid"].sum() > 0


def test_the_stars_with_invalid_pixels_are_where_the_original_differs_from_itself(converted):
    """So the parity above is one of masking, too: NaN and outliers are in the input."""
    model, tokenizer, expected = converted
    wavelength, flux = fed_pixels(expected)
    mixed = ~expected["all_pixels_valid"]
    assert mixed.any() and not mixed.all()
    tokens = tokenizer(wavelength, flux)["attention_mask"].sum(dim=1).numpy()
    np.testing.assert_array_equal(tokens, expected["token_valid"].sum(axis=1))
    assert (tokens[mixed] < wavelength.shape[1]).all() and (tokens[~mixed] == wavelength.shape[1]).all()
    with torch.no_grad():
        values = model(**tokenizer(wavelength, flux)).predictions.numpy()
    attending = expected["prediction_attending_invalid"][:, :5]
    np.testing.assert_allclose(values[~mixed], attending[~mixed], rtol=1e-5)
    assert (np.abs(values[mixed] / attending[mixed] - 1).max(axis=1) > 1e-4).all()


def test_both_forms_of_saving_give_the_same_parameter_names(tmp_path):
    keys = []
    for name in NAMES:
        convert_original_checkpoint(FIXTURES / name, tmp_path / name, wavelengths_of(FIXTURES / name))
        keys.append(load_file(tmp_path / name / "model.safetensors").keys())
    assert keys[0] == keys[1]


# ----------------------------------------------------------------------------------------------- what comes out of it


def test_the_settings_of_the_original_come_along(converted):
    model, tokenizer, expected = converted
    config = model.config
    assert list(config.label_units) == ["K", "dex (cm s-2)", "dex", "dex", "dex"]
    assert list(config.label_centers) == [4702.5, 2.478, 0.0876, 0.067, -0.159]
    assert (config.dropout, config.attention_dropout) == (0.05, 0.05)
    assert (tokenizer.sampling, tokenizer.clip) == ("random", 10)
    assert tokenizer.max_length == expected["encoder_output"].shape[1]
    assert tokenizer.valid_flux is None
    np.testing.assert_array_equal(tokenizer.standardize_wavelength, expected["wavelength"])


def test_config_weights_and_tokenizer_survive_load_and_save_byte_by_byte(tmp_path):
    source = FIXTURES / "original_tiny"
    convert_original_checkpoint(source, tmp_path / "first", wavelengths_of(source))
    SpectraFMForPrediction.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    SpectraFMTokenizer.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    first, second = (
        {path.name: path.read_bytes() for path in (tmp_path / part).iterdir()} for part in ("first", "second")
    )
    assert first == second


def test_the_published_pixels_have_the_wavelengths_of_the_apstar_grid():
    wavelength = published_wavelengths()
    assert wavelength.shape == (7514,)
    np.testing.assert_allclose(np.log10(wavelength[[0, 3027, 3028]]), [4.180476, 4.198638, 4.20051], rtol=1e-12)
    assert (wavelength[0].round(1), wavelength[-1].round(1)) == (15152.2, 16943.5)
    # The fixtures are the first pixels of it.
    np.testing.assert_allclose(wavelengths_of(FIXTURES / "original_tiny"), wavelength[:40], rtol=1e-12)


def test_a_checkpoint_with_the_published_pixels_needs_no_wavelengths_and_gets_the_limits_on_flux(original, tmp_path):
    """The fixture with the published number of pixels in place of its own."""
    settings = json.loads((original / "config.json").read_text())
    n_pixels, labels = 7514, settings["tokenizer_config"]["vocabs"][-5:]
    settings["tokenizer_config"] = {
        "vocabs": [f"syn_apogee{i}" for i in range(n_pixels)] + labels,
        "vocab_tokens": list(range(1, n_pixels + 6)),
    }
    norm = settings["norm_config"]
    center = np.linspace(0.8, 1.0, n_pixels).tolist()
    norm["_input_mean"] = [0.0, *center, *norm["_input_mean"][-5:]]
    norm["_input_std"] = [1.0, *[0.1] * n_pixels, *norm["_input_std"][-5:]]
    norm["_input_standardized"] = [False] + [True] * (n_pixels + 5)
    settings["nn_config"]["context_length"] = 512
    (original / "config.json").write_text(json.dumps(settings))
    label_rows = list(range(n_pixels + 1, n_pixels + 6))
    np.savez(original / "embed_map.npz", keys=np.arange(n_pixels + 6), values=[0] + [1] * n_pixels + label_rows)

    def widen(weights):
        for name in ("embedding_layer.embeddings", "embedding_layer.bias"):
            table = weights[name]
            weights[name] = torch.cat((table[:2], torch.full((n_pixels - 1, table.shape[1]), 9.0), table[-5:]))

    change_weights(original, widen)
    convert_original_checkpoint(original, tmp_path / "out")
    tokenizer = SpectraFMTokenizer.from_pretrained(tmp_path / "out")
    np.testing.assert_array_equal(tokenizer.standardize_wavelength, published_wavelengths())
    assert tokenizer.max_length == 512
    np.testing.assert_array_equal(tokenizer.standardize_center, center)
    assert tokenizer.valid_flux == [0.05, 1.2]
    flux = np.ones(n_pixels)
    flux[0], flux[1] = 0.01, 1.3
    assert tokenizer(published_wavelengths(), flux)["flux"].shape == (1, 512)
    every = tokenizer(published_wavelengths(), flux, max_length=n_pixels)["wavelength"]
    np.testing.assert_array_equal(every[0], published_wavelengths()[2:].astype(np.float32))
    # The rows of padding, flux and labels are where they belong; no row of an unused pixel is left.
    convert_original_checkpoint(
        FIXTURES / "original_tiny", tmp_path / "small", wavelengths_of(FIXTURES / "original_tiny")
    )
    big, small = (load_file(tmp_path / part / "model.safetensors") for part in ("out", "small"))
    assert all(torch.equal(big[name], small[name]) for name in small)
    assert list(SpectraFMConfig.from_pretrained(tmp_path / "out").label_names) == [name.lower() for name in labels]


# -------------------------------------------------------------------------------------------- whole folders or nothing


def test_an_output_folder_that_is_not_empty_is_refused_and_left_as_it_is(original, tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match=r"^output_dir: expected a new or empty folder, got "):
        convert_original_checkpoint(original, target, wavelengths_of(original))
    assert [path.name for path in target.iterdir()] == ["mine.txt"]


def test_an_empty_output_folder_and_missing_parents_are_fine(original, tmp_path):
    (tmp_path / "empty").mkdir()
    for target in (tmp_path / "empty", tmp_path / "new" / "deep"):
        convert_original_checkpoint(original, target, wavelengths_of(original))
        assert (target / "model.safetensors").is_file()


def test_a_failure_while_writing_leaves_no_file(original, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(SpectraFMTokenizer, "save_pretrained", full)  # a full disk cannot be had here
    with pytest.raises(OSError, match="No space left"):
        convert_original_checkpoint(original, tmp_path / "parent" / "out", wavelengths_of(original))
    assert list((tmp_path / "parent").iterdir()) == []


# -------------------------------------------------------------------------------------------------------- clear errors


def delete(name):
    return lambda folder: (folder / name).unlink()


def truncate(name):
    def spoil(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return spoil


def config(section, **fields):
    return lambda folder: change_config(folder, section, **fields)


def weights(change):
    return lambda folder: change_weights(folder, change)


def rename_weight(state):
    state["torch_encoder.new_part.weight"] = state.pop("torch_decoder.decoder_out.bias")


class RunsCode:
    """Unpickling it would run code."""

    def __reduce__(self):
        return (print, ("this must not run",))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (delete("config.json"), "input_dir: expected config.json, weights.pt and embed_map.npz, found no .*g.json"),
        (delete("weights.pt"), "input_dir: expected .* found no .*weights.pt"),
        (delete("embed_map.npz"), "input_dir: expected .* found no .*embed_map.npz"),
        (truncate("config.json"), "config.json: expected JSON, got "),
        (truncate("weights.pt"), "weights.pt: expected a whole file of weights with `model_state_dict`, got "),
        (truncate("embed_map.npz"), "embed_map.npz: expected an .npz file with `keys` and `values`, got "),
        (lambda folder: torch.save({"epoch": 1}, folder / "weights.pt"), "weights.pt: expected a whole file"),
        (lambda folder: torch.save({"model_state_dict": RunsCode()}, folder / "weights.pt"), "expected a whole file"),
        (lambda folder: (folder / "config.json").write_text("[]"), "expected .* in nn_config, found none"),
        (config("nn_config", encoder_head_num="8"), "expected a whole number in nn_config.encoder_head_num, got '8'"),
        (config("nn_config", encoder_head_num=7), "config.json: .*encoder_attention_heads: expected divisors of"),
        (config("nn_config", decoder_activation="relu"), "nn_config: expected equal encoder_activation, .*'relu'"),
        (config("nn_config", embedding_dim=64), r"weights.pt: expected shape \(.*64.*\) for .* by config.json, got \("),
        (config("tokenizer_config", vocabs=["TEFF"]), "expected as many vocabs as vocab_tokens, got 1 and 45"),
        (config("norm_config", _input_mean=[0.0] * 45), "norm_config: expected 46 numbers in _input_mean, got 45"),
        (config("norm_config", _input_std=[0.0] * 46), "norm_config: expected a finite mean and a positive std"),
        (config("norm_config", _input_standardized=[False] * 46), "norm_config: expected a finite mean"),
        (weights(lambda s: s.pop("torch_decoder.decoder_out.bias")), "a parameter for readout.mean.bias, found none"),
        (weights(lambda s: s.update(extra=torch.ones(1))), "expected no parameter but SpectraFM's, got extra"),
        (weights(rename_weight), "expected a parameter for readout.mean.bias"),
        (weights(lambda s: s["torch_decoder.decoder_out.bias"].fill_(float("nan"))), "finite numbers in readout.mean"),
        (
            weights(lambda s: s.update({"embedding_layer.bias": s["embedding_layer.bias"][:20]})),
            "expected 46 or more rows in embedding_layer.bias, got 20",
        ),
    ],
)
def test_a_damaged_checkpoint_is_an_error_with_the_reason(original, tmp_path, capsys, spoil, message):
    wavelengths = wavelengths_of(original)
    spoil(original)
    with pytest.raises(ValueError, match=message):
        convert_original_checkpoint(original, tmp_path / "out", wavelengths)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["original"]
    assert "must not run" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: None, "wavelengths: expected those of the 40 pixels of this checkpoint, got none"),
        (lambda w: w[:-1], r"wavelengths: expected 40, one for each pixel, got shape \(39,\)"),
        (lambda w: w[::-1], "wavelengths: expected increasing numbers"),
        (lambda w: np.where(w > w[20], w, w[20]), "wavelengths: expected increasing numbers .* least step 0"),
        (lambda w: w / 1e4, "wavelengths: expected increasing numbers between 1000 and 300000 Angstrom, got 1.515"),
        (lambda w: np.where(w > w[20], w, np.nan), "wavelengths: expected increasing numbers"),
    ],
)
def test_wavelengths_that_do_not_fit_are_a_clear_error(original, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        convert_original_checkpoint(original, tmp_path / "out", change(wavelengths_of(original)))


@pytest.mark.parametrize("kind", ["npy", "npz", "txt"])
def test_wavelengths_are_read_from_three_kinds_of_files(tmp_path, kind):
    wavelength, path = np.linspace(15100, 15200, 5), tmp_path / f"grid.{kind}"
    if kind == "npy":
        np.save(path, wavelength)
    elif kind == "npz":
        np.savez(path, wavelength=wavelength, flux=np.zeros(3))
    else:
        np.savetxt(path, wavelength)
    np.testing.assert_array_equal(read_wavelengths(path), wavelength)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.npy", None, "wavelengths: expected a file, found no .*missing.npy"),
        ("broken.npy", b"no numbers", "wavelengths: expected .npy, .npz with `wavelength`, or text, got .*broken.npy"),
        ("broken.npz", b"no numbers", "wavelengths: expected .npy, .npz with `wavelength`, or text, got .*broken.npz"),
        (
            "broken.txt",
            b"15100\nred\n",
            "wavelengths: expected .npy, .npz with `wavelength`, or text, got .*broken.txt",
        ),
    ],
)
def test_a_file_without_wavelengths_is_a_clear_error(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_wavelengths(tmp_path / name)


# -------------------------------------------------------------------------------------------------------- command line


def test_the_command_converts_a_fixture(tmp_path, run_script):
    source = FIXTURES / "original_tiny_ddp"
    result = run_script(SCRIPT, source, tmp_path / "out", "--wavelengths", source / "expected.npz")
    assert result[:2] == (0, f"wrote {tmp_path / 'out'}\n")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_bad_input_is_one_line_with_exit_code_2(tmp_path, run_script):
    code, printed, errors = run_script(SCRIPT, FIXTURES / "original_tiny", tmp_path / "out")
    assert (code, printed) == (2, "")
    assert errors.startswith("error: wavelengths: expected those of the 40 pixels")
    assert errors.count("\n") == 1
    assert not (tmp_path / "out").exists()
