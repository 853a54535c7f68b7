"""
The four ways to load a checkpoint, each in a fresh process: with the package, with nothing but the code in the
checkpoint, over HTTP from a hub, and by the name of a bundled checkpoint.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_tiny_model
from hub_server import serve

import spectrafm_hf
from spectrafm_hf import bundled, bundled_names, load_checkpoint, save_checkpoint


SCRIPT = Path(__file__).parent / "loading" / "load_everything.py"
PACKAGE = Path(spectrafm_hf.__file__).parent
TOKENIZER_CLASSES = ("AutoTokenizer", "AutoProcessor", "AutoFeatureExtractor")
EXPECTED_CLASSES = {
    "AutoConfig": "SpectraFMConfig",
    "AutoModel": "SpectraFMModel",
    "AutoModelForTimeSeriesPrediction": "SpectraFMForPrediction",
    **dict.fromkeys(TOKENIZER_CLASSES, "SpectraFMTokenizer"),
}


def load_in_new_process(
    home: Path,
    stars,
    *,
    python_path: Path | None = PACKAGE.parent,
    env=(),
    revisions=(None,),
    script: Path = SCRIPT,
    **arguments,
) -> list[dict]:
    """
    Reports of `load_everything.py`, one a revision, with a Hugging Face home (cache of files and of remote code) of its
    own; or of another script.
    """
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "PYTHONPATH"))}
    if python_path is not None:
        clean["PYTHONPATH"] = str(python_path)
    home.mkdir(exist_ok=True)
    rows = [{key: np.asarray(value).tolist() for key, value in star.items()} for star in stars]
    finished = subprocess.run(
        [sys.executable, str(script)],
        input=json.dumps({"stars": rows, "revisions": revisions, **arguments}),
        env={**clean, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1", **dict(env)},
        cwd=home,
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


def check_predictions(report: dict, model, tokenizer, stars):
    """The other process predicted what this one predicts, and its pipeline said the same by name."""
    with torch.no_grad():
        expected = model(**tokenizer(stars))
    values, errors = expected.predictions.numpy(), expected.prediction_errors.numpy()
    assert [star["object_id"] for star in report["pipeline"]] == [star["object_id"] for star in stars]
    names = tokenizer.label_names
    by_name = {end: [[star[f"{name}{end}"] for name in names] for star in report["pipeline"]] for end in ("", "_err")}
    for found in (report["values"], by_name[""]):
        np.testing.assert_array_less(np.abs(found - values) / errors, 1e-3)
    for found in (report["errors"], by_name["_err"]):
        np.testing.assert_allclose(found, errors, rtol=1e-3)
    assert report["classes"] == EXPECTED_CLASSES


@pytest.mark.timeout(300)
def test_every_auto_class_and_the_pipeline_load_with_the_package(tmp_path, tiny_model, tiny_tokenizer, stars):
    save_checkpoint(tiny_model, tiny_tokenizer, tmp_path / "checkpoint")
    [report] = load_in_new_process(tmp_path / "home", stars, package=True, source=str(tmp_path / "checkpoint"))
    check_predictions(report, tiny_model, tiny_tokenizer, stars)
    assert set(report["from_package"].values()) | {report["pipeline_from"]} == {"spectrafm_hf"}
    assert report["load_checkpoint"] == report["values"]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["value", "basis"])
def test_everything_loads_from_the_code_in_the_checkpoint_where_the_package_cannot_be_imported(
    kind, tmp_path, tiny_model, tiny_tokenizer, tiny_evidence, stars
):
    model, tokenizer = tiny_evidence if kind == "basis" else (tiny_model, tiny_tokenizer)
    save_checkpoint(model, tokenizer, tmp_path / "checkpoint")
    [report] = load_in_new_process(
        tmp_path / "home", stars, python_path=None, package=False, source=str(tmp_path / "checkpoint")
    )
    check_predictions(report, model, tokenizer, stars)
    assert set(report["from_package"].values()) | {report["pipeline_from"]} == {"transformers_modules"}
    saved_again = tmp_path / "home" / "saved-again"
    assert contents(saved_again) == contents(tmp_path / "checkpoint")


@pytest.mark.timeout(600)
def test_a_checkpoint_loads_over_http_at_a_revision_then_from_the_cache_then_offline(tmp_path, tiny_tokenizer, stars):
    first, second = make_tiny_model(seed=1), make_tiny_model(seed=2)
    remote = {"package": False, "python_path": None, "source": "tester/spectrafm-tiny"}
    home = tmp_path / "home"
    with serve() as hub:
        save_checkpoint(first, tiny_tokenizer, tmp_path / "first")
        save_checkpoint(second, tiny_tokenizer, tmp_path / "second")
        old = hub.commit("tester/spectrafm-tiny", tmp_path / "first", "main", "v1")
        hub.commit("tester/spectrafm-tiny", tmp_path / "second", "main")
        online = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}

        reports = load_in_new_process(home, stars, env=online, revisions=[None, "v1"], **remote)
        check_predictions(reports[0], second, tiny_tokenizer, stars)
        check_predictions(reports[1], first, tiny_tokenizer, stars)
        # Each file once, those of the same content only once, and of the other revision only what differs.
        fetched = [path.split("/resolve/")[1] for path in hub.downloads()]
        files = len(set(contents(tmp_path / "second").values()))
        assert len(fetched) == len(set(fetched)) == files + 1
        assert fetched[files:] == [f"{old}/model.safetensors"]

        hub.log.clear()
        [report] = load_in_new_process(home, stars, env=online, **remote)
        check_predictions(report, second, tiny_tokenizer, stars)
        assert hub.log, "a second load asks whether there is something new"
        assert hub.downloads() == []

    reports = load_in_new_process(home, stars, env={"HF_ENDPOINT": hub.url}, revisions=["v1", None], **remote)
    check_predictions(reports[0], first, tiny_tokenizer, stars)
    check_predictions(reports[1], second, tiny_tokenizer, stars)


def make_another_version(folder: Path) -> None:
    """The code of a checkpoint as a version that answers 1000 more, leaves out a pixel and writes ids in capitals."""
    keep = 'return {"flux": flux, "wavelength": wavelength, "attention_mask": keep}'
    changes = {
        "configuration_spectrafm.py": (f'PACKAGE_VERSION = "{spectrafm_hf.__version__}"', 'PACKAGE_VERSION = "99.0.0"'),
        "modeling_spectrafm.py": ("predictions=values,", "predictions=values + 1000.0,"),
        "tokens_spectrafm.py": (f"    {keep}", f"    keep[:, 0] = False\n    {keep}"),
        "pipeline_spectrafm.py": ('else {"object_id": object_id},', 'else {"object_id": object_id.upper()},'),
    }
    for file, (old, new) in changes.items():
        text = (folder / file).read_text()
        assert text.count(old) == 1, (file, old)
        (folder / file).write_text(text.replace(old, new))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("order", [(0, 1, 0), (1, 0, 1)], ids=["older first", "newer first"])
def test_two_versions_of_the_code_in_one_process_answer_each_by_its_own(
    order, tmp_path, tiny_model, tiny_tokenizer, stars
):
    """Both folders have the same name, by which transformers calls their code."""
    folders = [tmp_path / version / "checkpoint" for version in ("this", "other")]
    for folder in folders:
        save_checkpoint(tiny_model, tiny_tokenizer, folder)
    make_another_version(folders[1])
    reports = load_in_new_process(
        tmp_path / "home",
        stars,
        python_path=None,
        script=SCRIPT.with_name("load_two.py"),
        folders=[str(folders[i]) for i in order],
    )
    inputs = tiny_tokenizer(stars)
    with torch.no_grad():
        this = tiny_model(**inputs).predictions
        inputs["attention_mask"][:, 0] = False
        other = tiny_model(**inputs).predictions + 1000.0
    for i, report in zip(order, reports, strict=True):
        expected = (this, other)[i]
        assert report["versions"] == [(spectrafm_hf.__version__, "99.0.0")[i]] * 2
        assert report["object_id"] == [(star["object_id"], star["object_id"].upper())[i] for star in stars]
        np.testing.assert_allclose(report["values"], expected, rtol=1e-4)
        np.testing.assert_allclose(report["pipeline"], expected[:, 0], rtol=1e-4)


@pytest.mark.timeout(300)
def test_everything_loads_by_the_name_of_a_bundled_checkpoint(tmp_path, tiny_model, tiny_tokenizer, stars):
    # A copy of the package with a checkpoint of this test bundled.
    copy = tmp_path / "site" / "spectrafm_hf"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("resources", "__pycache__"))
    save_checkpoint(tiny_model, tiny_tokenizer, copy / "resources" / "checkpoints" / "tiny")
    [report] = load_in_new_process(
        tmp_path / "home", stars, python_path=copy.parent, package=True, source="tiny", bundled=True
    )
    check_predictions(report, tiny_model, tiny_tokenizer, stars)
    assert set(report["from_package"].values()) | {report["pipeline_from"]} == {"spectrafm_hf"}


@pytest.mark.parametrize("name", bundled_names("spectrafm"))
def test_each_bundled_checkpoint_is_complete_and_saves_to_the_same_bytes(tmp_path, name):
    model, tokenizer = load_checkpoint(name)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    save_checkpoint(model, tokenizer, tmp_path / name)
    again, original = contents(tmp_path / name), contents(Path(bundled(name)))
    assert not any(path.endswith(".py") for path in original), "code belongs to checkpoints outside of the package"
    for files in (again, original):
        for file in [path for path in files if path.endswith("config.json")]:
            settings = json.loads(files[file])
            # What is installed here, and where the code is, which a bundled one does not bring.
            for key in ("transformers_version", "auto_map", "custom_pipelines"):
                settings.pop(key, None)
            files[file] = settings
    different = [path for path, content in again.items() if original.get(path) != content and path[-3:] != ".py"]
    assert different == [], "save the bundled checkpoint again: save_checkpoint(*load_checkpoint(name), folder)"


def test_an_unknown_bundled_name_is_an_error_that_names_the_known():
    with pytest.raises(ValueError, match=r"name: expected one of the bundled checkpoints \[.*\], got 'spectrafm-huge'"):
        bundled("spectrafm-huge")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
