"""Saving and loading checkpoints."""

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_tiny_evidence, make_tiny_model
from forked import run_forked
from safetensors.torch import load_file, save_file
from transformers import AutoModelForTimeSeriesPrediction

from spectrafm_hf import SpectraFMModel, SpectraFMTokenizer, load_checkpoint, save_checkpoint
from spectrafm_hf.synthesis.synthetic import load_emulator


@pytest.fixture
def checkpoint(tmp_path, tiny_model, tiny_tokenizer) -> Path:
    save_checkpoint(tiny_model, tiny_tokenizer, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def rewrite_weights(folder: Path, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_save_load_save_gives_the_same_bytes(tmp_path, checkpoint):
    save_checkpoint(*load_checkpoint(checkpoint), tmp_path / "again")
    assert contents(tmp_path / "again") == contents(checkpoint)
    assert set(contents(checkpoint)) == {
        "config.json",
        "basis_spectrafm.py",
        "configuration_emulator.py",
        "correction_spectrafm.py",
        "evidence_spectrafm.py",
        "flags_spectrafm.py",
        "modeling_emulator.py",
        "refinement_spectrafm.py",
        "rungs_spectrafm.py",
        "spectrum_spectrafm.py",
        "star_model_spectrafm.py",
        "configuration_spectrafm.py",
        "gate_spectrafm.py",
        "inputs_spectrafm.py",
        "likelihood_spectrafm.py",
        "objects_spectrafm.py",
        "model.safetensors",
        "modeling_spectrafm.py",
        "pipeline_spectrafm.py",
        "preprocessor_config.json",
        "products_spectrafm.py",
        "tokenization_spectrafm.py",
        "tokenizer_config.json",
        "tokens_spectrafm.py",
        "velocity_spectrafm.py",
    }


def test_a_setting_that_the_trainer_leaves_is_not_saved(tmp_path, checkpoint, tiny_model, tiny_tokenizer):
    tiny_model.config.use_cache = False
    save_checkpoint(tiny_model, tiny_tokenizer, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(checkpoint)


def test_plain_save_pretrained_of_model_and_tokenizer_writes_the_same_checkpoint(
    tmp_path, checkpoint, tiny_model, tiny_tokenizer
):
    tiny_model.save_pretrained(tmp_path / "plain")
    tiny_tokenizer.save_pretrained(tmp_path / "plain")
    assert contents(tmp_path / "plain") == contents(checkpoint)


def test_a_config_names_the_code_of_all_classes_whichever_of_them_saved_it(tmp_path, tiny_model):
    tiny_model.save_pretrained(tmp_path / "with head")
    tiny_model.model.save_pretrained(tmp_path / "without head")
    tiny_model.config.save_pretrained(tmp_path / "config")
    for folder in tmp_path.iterdir():
        config = json.loads((folder / "config.json").read_text())
        assert config["auto_map"] == {
            "AutoConfig": "configuration_spectrafm.SpectraFMConfig",
            "AutoModel": "modeling_spectrafm.SpectraFMModel",
            "AutoModelForTimeSeriesPrediction": "modeling_spectrafm.SpectraFMForPrediction",
        }
        assert config["custom_pipelines"] == {
            "stellar-labels": {
                "impl": "pipeline_spectrafm.StellarLabelsPipeline",
                "pt": ["AutoModelForTimeSeriesPrediction"],
            }
        }


def test_saving_over_a_checkpoint_replaces_it_and_keeps_its_card(checkpoint, tiny_tokenizer):
    (checkpoint / "README.md").write_text("A card that a person wrote.")
    (checkpoint / "model-00001-of-00002.safetensors").write_bytes(b"a part of older, larger weights")
    other = make_tiny_model(seed=1)
    save_checkpoint(other, tiny_tokenizer, checkpoint)
    loaded, _ = load_checkpoint(checkpoint)
    assert all(a.equal(b) for a, b in zip(loaded.parameters(), other.parameters(), strict=True))
    assert (checkpoint / "README.md").read_text() == "A card that a person wrote."
    assert [path.name for path in checkpoint.glob("*.safetensors")] == ["model.safetensors"]


def test_a_save_that_fails_leaves_the_old_checkpoint_and_no_other_file(checkpoint, tiny_tokenizer):
    before = contents(checkpoint)
    tiny_tokenizer.seed = object()  # JSON cannot hold it
    with pytest.raises(TypeError):
        save_checkpoint(make_tiny_model(seed=1), tiny_tokenizer, checkpoint)
    assert contents(checkpoint) == before
    assert list(checkpoint.parent.iterdir()) == [checkpoint]


SAVE_AND_FAIL = """
    import os, signal, sys
    from conftest import make_tiny_model
    from spectrafm_hf import SpectraFMTokenizer, save_checkpoint

    failed = []

    def fail(event, arguments):
        if event == "os.rename" and str(arguments[1]) == sys.argv[1] and not failed:
            failed.append(event)
            {failure}

    sys.addaudithook(fail)
    save_checkpoint(make_tiny_model(seed=1), SpectraFMTokenizer(), sys.argv[1])
"""


@pytest.mark.parametrize(
    "failure", ["raise KeyboardInterrupt", "raise OSError('no')", "os.kill(os.getpid(), signal.SIGKILL)"]
)
def test_a_save_killed_between_its_last_two_steps_loses_nothing(checkpoint, tiny_tokenizer, failure):
    (checkpoint / "README.md").write_text("A card that a person wrote.")
    before = contents(checkpoint)
    run = run_forked(SAVE_AND_FAIL.format(failure=failure), checkpoint)
    assert run.returncode != 0
    killed = run.returncode == -signal.SIGKILL
    assert killed == ("KILL" in failure), run.stderr
    left = checkpoint.with_name(".checkpoint.old") if killed else checkpoint
    assert contents(left) == before
    save_checkpoint(make_tiny_model(seed=1), tiny_tokenizer, checkpoint)
    assert (checkpoint / "README.md").read_text() == "A card that a person wrote."
    assert contents(checkpoint)["model.safetensors"] != before["model.safetensors"]
    assert not checkpoint.with_name(".checkpoint.old").exists()


def test_saving_over_a_link_replaces_its_target(checkpoint, tiny_tokenizer):
    link = checkpoint.with_name("link")
    link.symlink_to(checkpoint)
    save_checkpoint(make_tiny_model(seed=1), tiny_tokenizer, link)
    assert link.is_symlink() and contents(link) == contents(checkpoint)
    assert sorted(path.name for path in checkpoint.parent.iterdir()) == ["checkpoint", "link"]


def test_a_folder_that_holds_something_else_is_not_overwritten(tmp_path, tiny_model, tiny_tokenizer):
    (tmp_path / "thesis.tex").write_text("Years of work.")
    for target in (tmp_path, tmp_path / "thesis.tex"):
        with pytest.raises(ValueError, match="folder: expected a new or empty folder, or a checkpoint to replace, got"):
            save_checkpoint(tiny_model, tiny_tokenizer, target)
    assert contents(tmp_path) == {"thesis.tex": b"Years of work."}


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.1, 0.5, 0.999])
def test_a_truncated_weight_file_is_a_clear_error(checkpoint, kept):
    weights = checkpoint / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError, match=r"checkpoint '.*': the weight file is truncated or damaged") as error:
        load_checkpoint(checkpoint)
    assert "\n" not in str(error.value)
    # The Auto classes pass on what safetensors says.
    with pytest.raises(Exception, match="Error while deserializing header"):
        AutoModelForTimeSeriesPrediction.from_pretrained(checkpoint)


def test_a_very_long_setting_is_an_error_of_one_short_line_that_names_it(checkpoint):
    settings = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(settings | {"flux_softening": ["nan", *[10**400] * 40]}))
    with pytest.raises(ValueError, match="checkpoint '.*': .*flux_softening") as error:
        load_checkpoint(checkpoint)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1200


def test_a_weight_file_with_a_very_long_name_is_an_error_of_one_short_line(checkpoint):
    header = json.dumps({"T" * 100_000: {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}).encode()
    (checkpoint / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match=r"checkpoint '.*': the weight file is truncated or damaged") as error:
        load_checkpoint(checkpoint)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda weights: weights.pop("readout.mean.bias"), "some are missing: readout.mean.bias"),
        (lambda weights: weights.update(more=torch.ones(1)), "some are unexpected: more"),
        (
            lambda weights: weights.update({"readout.mean.bias": torch.ones(3)}),
            r"some are of the wrong shape: readout.mean.bias \(3,\) instead of \(1,\)",
        ),
    ],
)
def test_weights_that_do_not_match_the_config_are_an_error_of_one_line(checkpoint, change, complaint, caplog):
    rewrite_weights(checkpoint, change)
    with pytest.raises(ValueError, match=f"expected the weights that config.json describes, {complaint}$") as error:
        load_checkpoint(checkpoint)
    assert "\n" not in str(error.value)
    assert caplog.records == []


def test_weights_without_the_read_out_are_an_error(tmp_path, tiny_model, tiny_tokenizer):
    tiny_model.model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    assert isinstance(SpectraFMModel.from_pretrained(tmp_path), SpectraFMModel)
    with pytest.raises(ValueError, match=r"some are missing: readout\.layers\.0\.bias and 5 more"):
        load_checkpoint(tmp_path)


def test_pickled_weights_are_not_read(checkpoint):
    torch.save(load_file(checkpoint / "model.safetensors"), checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        load_checkpoint(checkpoint)


@pytest.mark.parametrize(
    ("tokenizer", "complaint"),
    [
        (SpectraFMTokenizer(["logg", "teff"]), r"expected label_names=\['teff', .*, got \['logg', 'teff'\]"),
        (make_tiny_evidence()[1], "expected one without, as the model has it, got one with a basis"),
    ],
)
def test_a_tokenizer_that_does_not_fit_the_model_is_an_error(tmp_path, checkpoint, tiny_model, tokenizer, complaint):
    with pytest.raises(ValueError, match=f"tokenizer: {complaint}"):
        save_checkpoint(tiny_model, tokenizer, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    tokenizer.save_pretrained(checkpoint)
    with pytest.raises(ValueError, match=f"tokenizer: {complaint}"):
        load_checkpoint(checkpoint)


@pytest.mark.parametrize(
    ("config", "error", "complaint"),
    [
        ('{"model_type": "bert"}', ValueError, "expected a config.json of model_type 'spectrafm', got 'bert'"),
        ('{"model_type": "spectrafm", "hidden_size": 7}', ValueError, "hidden_size: expected an even number, got 7"),
        ('{"model_type": "spec', OSError, "not a valid JSON file"),
    ],
)
def test_a_wrong_config_is_an_error_of_one_line(checkpoint, config, error, complaint):
    (checkpoint / "config.json").write_text(config)
    with pytest.raises(error, match=complaint) as raised:
        load_checkpoint(checkpoint)
    assert "\n" not in str(raised.value)


def test_a_checkpoint_without_a_tokenizer_is_an_error_that_names_the_file(checkpoint):
    (checkpoint / "preprocessor_config.json").unlink()
    with pytest.raises(OSError, match=r"preprocessor_config\.json"):
        load_checkpoint(checkpoint)


def test_an_unknown_checkpoint_name_is_an_error_with_the_possible_names(tmp_path):
    for name in ("spectrafm-huge", str(tmp_path / "nowhere"), tmp_path / "nowhere"):
        with pytest.raises(
            ValueError, match="expected one of the bundled .*, a folder, or a hub repository owner/name"
        ):
            load_checkpoint(name)


def test_a_repository_that_cannot_be_had_is_an_error_of_one_line():
    with pytest.raises(OSError, match="checkpoint 'nobody/nothing': ") as error:
        load_checkpoint("nobody/nothing")
    assert "\n" not in str(error.value)


def test_a_copied_checkpoint_loads_without_its_code(tmp_path, checkpoint, tiny_model):
    shutil.copytree(checkpoint, tmp_path / "copy", ignore=shutil.ignore_patterns("*.py"))
    loaded, _ = load_checkpoint(tmp_path / "copy")
    assert not loaded.training
    assert all(a.equal(b) for a, b in zip(loaded.parameters(), tiny_model.parameters(), strict=True))


def test_weights_that_are_not_finite_are_an_error(checkpoint):
    rewrite_weights(checkpoint, lambda weights: weights["readout.mean.bias"].fill_(np.nan))
    with pytest.raises(ValueError, match=r"expected finite weights, got others in readout\.mean\.bias$"):
        load_checkpoint(checkpoint)


@pytest.mark.parametrize("index", ["[]", "{}", '{"metadata": {}, "weight_map": 5}'])
def test_an_invalid_index_of_shards_is_an_error_of_one_line(checkpoint, index):
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match="expected the files of a checkpoint, got ") as error:
        load_checkpoint(checkpoint)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["spectrafm-apogee", "spectrafm-gaia-xp-small"])
def test_an_old_checkpoint_name_loads_its_replacement_with_a_warning(name):
    with pytest.warns(FutureWarning, match=f"{name} was replaced by spectrafm-base, which is loaded instead"):
        model, _ = load_checkpoint(name)
    assert model.config.token_embedding == "basis"


def test_an_earlier_name_of_an_emulator_loads_the_present_one_with_a_warning():
    with pytest.warns(FutureWarning, match="emulator-survey was replaced by emulator-optical, which is loaded instead"):
        emulator = load_emulator("emulator-survey")
    assert emulator.config.num_pixels == load_emulator("emulator-optical").config.num_pixels
    with pytest.raises(ValueError, match="checkpoint: expected one of the bundled"):
        load_checkpoint("emulator-survey")
