"""Push and pull of models and data sets: the real client with a hub on localhost."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import yaml
from conftest import make_tiny_model
from hub_server import TOKEN, Hub, serve
from huggingface_hub import HfApi, ModelCard, constants
from test_cards import RECIPE, make_checkpoint, make_evaluation

import spectrafm_cli
import spectrafm_hf
from spectrafm_hf import load_checkpoint
from spectrafm_hf.data.building import Card, write_dataset
from spectrafm_hf.data.schema import pixel_column, spectrum_features
from spectrafm_hf.free_text import free_part, free_texts
from spectrafm_hf.hub.cards import write_model_card
from spectrafm_hf.hub.upload import checkpoint_upload, push_checkpoint, push_dataset
from spectrafm_hf.inference.training_range import TrainingRange


# The client's own way to send a large file where there is no Xet.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")

FEATURES = spectrum_features(["teff"])
CARD = Card(title="Stars", description="Some.", command="none", license="cc0-1.0", source="Made up.")
FOLDER_CODE, HUB_CODE = 'load_checkpoint("spectrafm-tiny")', 'load_checkpoint("somebody/tiny")'


def build(out: Path, overwrite: bool = False, **sizes: int) -> Path:
    def table(split: str, n: int) -> pa.Table:
        flux = np.random.default_rng(n).normal(1, 0.1, (n, 30))
        columns = {
            "object_id": [f"{split} {i}" for i in range(n)],
            "survey": ["test"] * n,
            "wavelength": pixel_column(np.broadcast_to(np.arange(5000.0, 5030), flux.shape)),
            "flux": pixel_column(flux),
            "flux_error": pixel_column(np.full_like(flux, 0.1)),
            "mask": pixel_column(flux > 1.1),
        }
        return pa.table(columns | {name: np.arange(n, dtype=np.float32) for name in ("snr", "teff", "teff_err")})

    tables = [(split, table(split, n)) for split, n in sizes.items()]
    settings = {"builder": "test", **sizes}
    return write_dataset(
        out, tables, features=FEATURES, card=lambda: CARD, settings=settings, shard_rows=10, overwrite=overwrite
    )


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """With a card."""
    folder = make_checkpoint(tmp_path / "spectrafm-tiny")
    write_model_card(folder, recipe=RECIPE, evaluations=[make_evaluation(folder)])
    return folder


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub for this process, which is told of it by the settings that HF_ENDPOINT makes in others."""
    with serve() as running:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, running.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield running


def in_new_process(hub: Hub, home: Path, script: str, *arguments: object) -> str:
    """The endpoint is read when the library is imported, so a fresh process; without Xet, which is no HTTP."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    home.mkdir(exist_ok=True)
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        env={**clean, **settings, "HF_HUB_DISABLE_TELEMETRY": "1"},
        cwd=home,
        text=True,
        capture_output=True,
        timeout=200,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def pushed_files(hub: Hub, repo: str, ref: str = "main") -> dict[str, bytes]:
    repository = hub.repositories[repo]
    return repository.commits[repository.refs[ref]]


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# -------------------------------------------------------------------------------------------------------------- models


def test_a_checkpoint_is_pushed_in_one_commit_and_pulled_unchanged(hub, checkpoint, stars, caplog):
    left_out = ("optimizer.pt", "secret.json", "evil_spectrafm.py", ".git/config")
    (checkpoint / ".git").mkdir()
    for name in left_out:
        (checkpoint / name).write_bytes(b"not for others")
    address = push_checkpoint(checkpoint, "somebody/tiny", private=True, message="First")
    repository = hub.repositories["somebody/tiny"]
    assert repository.private
    commit = repository.refs["main"]
    assert address == f"{hub.url}/somebody/tiny/commit/{commit}"
    assert list(repository.messages.values()) == ["First"]
    here = files_in(checkpoint)
    for name in left_out:
        del here[name]
    assert caplog.messages[0] == (
        f"{checkpoint}: left out, as nothing that belongs on the hub: .git/, evil_spectrafm.py, optimizer.pt, "
        "secret.json"
    )
    pushed = dict(repository.commits[commit])
    card = pushed.pop("README.md").decode()
    assert FOLDER_CODE not in card and HUB_CODE in card
    about = ModelCard(card).data
    assert (about.base_model, about.datasets) == ("somebody/spectrafm-gaia-xp", ["somebody/gaia-xp"])
    own = card.replace("somebody/tiny", "spectrafm-tiny").replace("somebody/", "")
    assert own == here.pop("README.md").decode()
    assert pushed == here

    model, tokenizer = load_checkpoint("somebody/tiny")
    expected = load_checkpoint(checkpoint)[0](**tokenizer(stars))
    outputs = model(**tokenizer(stars))
    np.testing.assert_array_equal(outputs.predictions.detach(), expected.predictions.detach())
    np.testing.assert_array_equal(outputs.prediction_errors.detach(), expected.prediction_errors.detach())
    assert TrainingRange.load("somebody/tiny") == TrainingRange.load(checkpoint)


def test_a_revision_is_a_branch_of_its_own_and_is_pulled_by_its_name(hub, checkpoint, tmp_path):
    push_checkpoint(checkpoint, "somebody/tiny")
    make_checkpoint(checkpoint, seed=1)
    write_model_card(
        checkpoint, recipe={**RECIPE, "data": "miles"}, evaluations=[make_evaluation(checkpoint, data="miles")]
    )
    first = hub.repositories["somebody/tiny"].refs["main"]
    push_checkpoint(checkpoint, "somebody/tiny", revision="bright/v2")
    push_checkpoint(checkpoint, "somebody/tiny", revision="bright/v2")
    assert hub.repositories["somebody/tiny"].refs["main"] == first
    results = {path for path in pushed_files(hub, "somebody/tiny", "bright/v2") if path.startswith(".eval_results")}
    assert results == {".eval_results/miles.yaml"}, "those of other weights are gone"
    for revision, seed in (("main", 0), ("bright/v2", 1), (first, 0)):
        model, _ = load_checkpoint("somebody/tiny", revision)
        expected = make_tiny_model(seed).state_dict()
        assert all(value.equal(expected[name]) for name, value in model.state_dict().items())


def test_private_repositories_need_the_token(hub, checkpoint, monkeypatch, capsys):
    push_checkpoint(checkpoint, "somebody/tiny", private=True)
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    with pytest.raises(OSError, match="somebody/tiny"):
        load_checkpoint("somebody/tiny")
    capsys.readouterr()  # progress of the first push
    assert spectrafm_cli.main(["push", str(checkpoint), "somebody/tiny"]) == 2
    assert capsys.readouterr().err == (
        "spectrafm push: somebody/tiny: the hub asks for a token that may write: `hf auth login`, or HF_TOKEN\n"
    )
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    push_checkpoint(checkpoint, "somebody/open")
    with pytest.raises(
        ValueError, match="REPO: expected a private repository, got somebody/open, which is there and pub"
    ):
        push_checkpoint(checkpoint, "somebody/open", private=True)
    assert len(hub.repositories["somebody/open"].commits) == 2


def test_a_dry_run_shows_files_and_card_and_changes_nothing_on_the_hub(hub, checkpoint, capsys):
    assert spectrafm_cli.main(["push", str(checkpoint), "somebody/tiny", "--private", "--dry-run"]) == 0
    listing, _, card = capsys.readouterr().out.partition("\n\n")
    shown = {line.split()[1]: int(line.split()[0].replace(",", "")) for line in listing.splitlines()[:-1]}
    here = {path: len(content) for path, content in files_in(checkpoint).items()}
    del here["README.md"], shown["README.md"]
    assert shown == here
    assert listing.splitlines()[-1].endswith("total for somebody/tiny")
    assert HUB_CODE in card and "# spectrafm-tiny" in card
    assert hub.repositories == {}


def test_data_of_any_name_make_metadata_that_the_hub_takes(hub, checkpoint):
    evaluation = make_evaluation(checkpoint, data="My stars (2026), -- part..2 ")
    write_model_card(checkpoint, recipe=RECIPE, evaluations=[evaluation])
    push_checkpoint(checkpoint, "somebody/tiny")
    [results] = [text for path, text in pushed_files(hub, "somebody/tiny").items() if path.startswith(".eval_results/")]
    assert yaml.safe_load(results)[0]["dataset"]["id"] == "My-stars-2026-part-2"


def test_metadata_refused_by_the_hub_are_one_line(hub, checkpoint, capsys):
    write_model_card(checkpoint, recipe=RECIPE, evaluations=[make_evaluation(checkpoint)], license="as-you-like")
    assert spectrafm_cli.main(["push", str(checkpoint), "somebody/tiny"]) == 2
    error = capsys.readouterr().err
    assert error.startswith('spectrafm push: Invalid metadata in README.md. - "license" must be one of ')
    assert error.count("\n") == 1


def write_on_the_hub(hub: Hub, repo: str, name: str, text: str, ref: str = "main") -> None:
    """What a person does who edits a card in the browser."""
    files = dict(pushed_files(hub, repo, ref))
    card = files["README.md"].decode()
    old = free_texts(card)[name]
    files["README.md"] = card.replace(free_part(name, old), free_part(name, text)).encode()
    assert text in files["README.md"].decode()
    hub.commit_files(repo, files, ref)


def pushed_texts(hub: Hub, repo: str, ref: str = "main") -> dict[str, str]:
    return free_texts(pushed_files(hub, repo, ref)["README.md"].decode())


@pytest.mark.parametrize("revision", [None, "bright/v2"])
def test_free_text_in_the_card_on_the_hub_survives_a_push(hub, checkpoint, capsys, revision):
    ref = revision or "main"
    command = ["push", str(checkpoint), "somebody/tiny", "--private", *(["--revision", revision] if revision else [])]
    assert spectrafm_cli.main(command) == 0
    write_on_the_hub(hub, "somebody/tiny", "uses", "Written on the hub.", ref)
    write_on_the_hub(hub, "somebody/tiny", "data", "As well.", ref)
    card = checkpoint / "README.md"
    card.write_text(card.read_text().replace(free_part("figures"), free_part("figures", "Written here.")))
    make_checkpoint(checkpoint, seed=1)
    write_model_card(checkpoint, recipe=RECIPE, evaluations=[make_evaluation(checkpoint)])
    capsys.readouterr()
    assert spectrafm_cli.main([*command, "--dry-run"]) == 0
    shown = capsys.readouterr().out.partition("\n\n")[2]
    assert spectrafm_cli.main(command) == 0
    pushed = pushed_files(hub, "somebody/tiny", ref)["README.md"].decode()
    assert shown == f"{pushed}\n"
    texts = {name: text for name, text in free_texts(pushed).items() if text}
    assert texts == {"uses": "Written on the hub.", "data": "As well.", "figures": "Written here."}


def test_a_new_branch_has_the_texts_of_the_main_one(hub, checkpoint):
    push_checkpoint(checkpoint, "somebody/tiny")
    write_on_the_hub(hub, "somebody/tiny", "uses", "Written on the hub.")
    push_checkpoint(checkpoint, "somebody/tiny", revision="v2")
    assert pushed_texts(hub, "somebody/tiny", "v2")["uses"] == "Written on the hub."


def test_of_two_texts_none_is_lost_unless_one_is_chosen(hub, checkpoint, capsys):
    push_checkpoint(checkpoint, "somebody/tiny")
    write_on_the_hub(hub, "somebody/tiny", "uses", "Written on the hub.")
    card = checkpoint / "README.md"
    card.write_text(card.read_text().replace(free_part("uses"), free_part("uses", "Written here.")))
    commits = len(hub.repositories["somebody/tiny"].commits)
    command = ["push", str(checkpoint), "somebody/tiny"]
    for more in ([], ["--dry-run"], ["--revision", "v2"]):
        capsys.readouterr()
        assert spectrafm_cli.main([*command, *more]) == 2
        assert capsys.readouterr().err == (
            "spectrafm push: free text: expected 'uses' in README.md of somebody/tiny on the hub as in the folder, got "
            "another text; --free-text hub or --free-text folder says which to keep\n"
        )
    assert (
        len(hub.repositories["somebody/tiny"].commits) == commits and len(hub.repositories["somebody/tiny"].refs) == 1
    )
    for which, text in (("hub", "Written on the hub."), ("folder", "Written here.")):
        assert spectrafm_cli.main([*command, "--free-text", which]) == 0
        assert pushed_texts(hub, "somebody/tiny")["uses"] == text


@pytest.mark.parametrize("kind", ["", "datasets/"])
def test_a_card_that_is_all_of_a_person_is_not_replaced(hub, checkpoint, tmp_path, kind):
    hub.commit_files(f"{kind}somebody/tiny", {"README.md": b"---\nlicense: mit\n---\n# Written wholly by hand\n"})
    push = push_dataset if kind else push_checkpoint
    folder = build(tmp_path / "stars", train=3) if kind else checkpoint
    with pytest.raises(
        ValueError, match=r"^README.md of somebody/tiny on the hub: expected a card with marks"
    ) as error:
        push(folder, "somebody/tiny")
    assert "\n" not in str(error.value)
    assert list(pushed_files(hub, f"{kind}somebody/tiny")) == ["README.md"]


def test_commits_made_during_a_push_are_not_lost(hub, checkpoint, capsys, monkeypatch):
    push_checkpoint(checkpoint, "somebody/tiny")
    create_commit = HfApi.create_commit

    def late(self, *arguments, **settings):
        write_on_the_hub(hub, "somebody/tiny", "uses", "Written meanwhile.")
        return create_commit(self, *arguments, **settings)

    monkeypatch.setattr(HfApi, "create_commit", late)
    capsys.readouterr()
    assert spectrafm_cli.main(["push", str(checkpoint), "somebody/tiny"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "spectrafm push: somebody/tiny: somebody else has committed meanwhile, so nothing was: push again"
    )
    assert pushed_texts(hub, "somebody/tiny")["uses"] == "Written meanwhile."


def test_a_dry_run_offline_shows_the_card_of_the_folder_with_a_note(hub, checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert spectrafm_cli.main(["push", str(checkpoint), "somebody/tiny", "--dry-run"]) == 0
    shown = capsys.readouterr()
    assert HUB_CODE in shown.out
    assert shown.err.startswith(
        "without the free texts that are on the hub: somebody/tiny: the hub at http://127.0.0.1"
    )
    assert shown.err.count("\n") == 1


def test_pictures_are_pushed_with_their_card(checkpoint):
    for name in ("shown.png", "other.png"):
        (checkpoint / name).write_bytes(b"picture")
    card = checkpoint / "README.md"
    shown = "![A](shown.png) ![B](../other.png) ![C](https://example.org/other.png) ![D](.git/other.png)"
    card.write_text(card.read_text().replace(free_part("uses"), free_part("uses", shown)))
    files = checkpoint_upload(checkpoint, "somebody/tiny").files
    assert "shown.png" in files and not [name for name in files if "other" in name]


def other_weights(folder: Path) -> None:
    make_checkpoint(folder, seed=1)


def other_evaluation(folder: Path, of: str = "model_sha256") -> None:
    text = (folder / "evaluation.json").read_text()
    digest = json.loads(text)[0]["models"]["tiny"][of]
    (folder / "evaluation.json").write_text(text.replace(digest, "ab" * 32))


def other_figures(folder: Path) -> None:
    text = (folder / "evaluation.json").read_text()
    (folder / "evaluation.json").write_text(text.replace("0.125", "0.001"))


def set_in(file: str, **settings) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))

    return change


def other_tokenizer(folder: Path) -> None:
    for file in ("preprocessor_config.json", "tokenizer_config.json"):
        set_in(file, sampling="random")(folder)


def other_code(folder: Path) -> None:
    path = folder / "modeling_spectrafm.py"
    path.write_text(path.read_text() + "import os\n")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("README.md", "card: expected README.md in "),
        ("evaluation.json", "evaluation: expected evaluation.json in "),
        (".eval_results/gaia-xp.yaml", "evaluation: expected the figures of evaluation.json in "),
        ("modeling_spectrafm.py", "checkpoint: expected modeling_spectrafm.py in "),
        (other_code, "checkpoint: expected modeling_spectrafm.py in "),
        (set_in("config.json", auto_map={"AutoModel": "a/b--c.D"}), "checkpoint: expected config.json in "),
        (set_in("tokenizer_config.json", clip=1.0), "checkpoint: expected tokenizer_config.json in "),
        (set_in("config.json", label_scales=[2.0] * 4), "card: expected one of weights "),
        (set_in("training_range.json", wavelength=[1.0, 2.0]), "card: expected one of weights "),
        (other_tokenizer, "card: expected one of weights "),
        ("config.json", "PATH: expected a folder with a checkpoint, or a bundled one, got "),
        ("model.safetensors", "checkpoint "),
        (other_weights, "card: expected one of weights "),
        (other_evaluation, "evaluation: expected one of weights "),
        (partial(other_evaluation, of="settings_sha256"), "evaluation: expected one of weights "),
        (other_figures, "evaluation: expected the figures of evaluation.json in "),
    ],
)
def test_incomplete_or_wrong_folders_are_refused_in_one_line(checkpoint, spoil, message, capsys):
    if callable(spoil):
        spoil(checkpoint)
    else:
        (checkpoint / spoil).unlink()
    assert spectrafm_cli.main(["push", str(checkpoint), "somebody/tiny", "--dry-run"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"spectrafm push: {message}") and captured.err.count("\n") == 1


@pytest.mark.parametrize("repo", ["tiny", "/tiny", "a/b/c"])
def test_a_repository_has_an_owner_and_a_name(checkpoint, repo):
    with pytest.raises(ValueError, match="REPO: expected OWNER/NAME, got "):
        push_checkpoint(checkpoint, repo)


def test_an_unreachable_hub_is_one_line(checkpoint, hub, monkeypatch, capsys):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert spectrafm_cli.main(["push", str(checkpoint), "somebody/tiny"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("spectrafm push: somebody/tiny: the hub at http://127.0.0.1:9 cannot be reached (")
    assert error.count("\n") == 1


COMMANDS = """
    import json, sys
    from spectrafm_cli import main
    for command in json.loads(sys.argv[1]):
        assert main(command) == 0, command
"""


@pytest.mark.timeout(300)
def test_the_command_line_pushes_pulls_and_predicts(checkpoint, tmp_path):
    spectra = build(tmp_path / "stars", test=3)
    columns = ["object_id", "teff", "teff_err", "logg", "logg_err"]
    tables = {name: tmp_path / f"{name}.csv" for name in ("here", "hub")}
    push = ["push", str(checkpoint), "somebody/tiny", "--private", "--revision", "v1", "--message", "Of v1"]
    predict = ["predict", str(spectra), "--model", "somebody/tiny", "--revision", "v1", "--output", str(tables["hub"])]
    with serve() as hub:
        in_new_process(hub, tmp_path / "home", COMMANDS, json.dumps([push, predict]))
        repository = hub.repositories["somebody/tiny"]
        assert repository.private and repository.messages == {repository.refs["v1"]: "Of v1"}
    assert (
        spectrafm_cli.main(["predict", str(spectra), "--model", str(checkpoint), "--output", str(tables["here"])]) == 0
    )
    pd.testing.assert_frame_equal(*(pd.read_csv(table)[columns] for table in tables.values()), check_exact=True)
    here, pulled = (pd.read_csv(table) for table in tables.values())
    assert list(here["flags"].fillna("")) == list(pulled["flags"].fillna("")) != ["", "", ""], (
        "the range was pulled, too"
    )


RUN_CARD = """
    import json, re, sys
    sys.modules["spectrafm_hf"] = None
    from huggingface_hub import ModelCard
    star = json.loads(sys.argv[1])
    names = {name: star[name] for name in ("wavelength", "flux", "flux_error")}
    code = re.findall(r"```python\\n(.*?)```", ModelCard.load("somebody/tiny").text, flags=re.DOTALL)[1]
    exec(code.replace("predict({", "answer = predict({"), names)
    print(json.dumps(names["answer"]))
"""


@pytest.mark.slow
def test_the_code_of_the_card_predicts_where_the_package_is_not_installed(checkpoint, tmp_path, stars):
    star = {name: np.asarray(stars[0][name]).tolist() for name in ("wavelength", "flux", "flux_error")}
    with serve() as hub:
        in_new_process(hub, tmp_path / "home", COMMANDS, json.dumps([["push", str(checkpoint), "somebody/tiny"]]))
        answer = json.loads(in_new_process(hub, tmp_path / "new", RUN_CARD, json.dumps(star)).splitlines()[-1])
    model, tokenizer = load_checkpoint(checkpoint)
    outputs = model(**tokenizer({name: np.array(value) for name, value in star.items()}))
    for i, name in enumerate(tokenizer.label_names):
        np.testing.assert_allclose(answer[name], outputs.predictions[0, i].item(), rtol=1e-5)
        np.testing.assert_allclose(answer[f"{name}_err"], outputs.prediction_errors[0, i].item(), rtol=1e-5)


@pytest.mark.parametrize("name", spectrafm_hf.bundled_names("spectrafm"))
def test_the_bundled_checkpoints_are_ready_to_be_pushed(name, capsys):
    assert spectrafm_cli.main(["push", name, "somebody/model", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert 'model="somebody/model"' in shown and " model.safetensors\n" in shown


# ----------------------------------------------------------------------------------------------------------- data sets


LOAD = """
    import json
    from datasets import load_dataset
    loaded, streamed = (load_dataset("somebody/stars", streaming=streaming) for streaming in (False, True))
    features = [{split: data[split].features.to_dict() for split in data} for data in (loaded, streamed)]
    rows = [{split: list(data[split]) for split in data} for data in (loaded, streamed)]
    print(json.dumps({"features": features, "rows": rows}))
"""


@pytest.mark.timeout(300)
def test_a_data_set_is_loaded_and_streamed_from_the_hub_as_it_was_written(tmp_path):
    folder = build(tmp_path / "stars", train=25, test=4)
    command = ["data", "push", str(folder), "somebody/stars", "--private", "--message", "Stars"]
    with serve() as hub:
        script = f"{textwrap.dedent(COMMANDS)}\n{textwrap.dedent(LOAD)}"
        address, report = in_new_process(hub, tmp_path / "home", script, json.dumps([command])).splitlines()
        repository = hub.repositories["datasets/somebody/stars"]
        assert repository.private and list(repository.messages.values()) == ["Stars"]
        assert address == f"{hub.url}/datasets/somebody/stars/commit/{repository.refs['main']}"
        pushed, here = pushed_files(hub, "datasets/somebody/stars"), files_in(folder)
    card = pushed.pop("README.md").decode()
    assert 'load_dataset("somebody/stars")' in card
    assert card.replace("somebody/stars", "DIR") == here.pop("README.md").decode()
    assert pushed == here
    written = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    for features, rows in zip(*json.loads(report).values(), strict=True):
        assert list(rows) == list(features) == ["train", "test"]
        for split in written:
            assert datasets.Features.from_dict(features[split]) == FEATURES
            np.testing.assert_equal(rows[split], written[split].to_list())


def test_a_push_of_fewer_shards_deletes_old_shards_and_keeps_other_files(hub, tmp_path):
    many, few = build(tmp_path / "many", train=25, test=4), build(tmp_path / "few", train=15)
    hub.commit_files("datasets/somebody/stars", {"LICENSE": b"free"})
    push_dataset(many, "somebody/stars")
    push_dataset(few, "somebody/stars")
    assert len(hub.repositories["datasets/somebody/stars"].commits) == 3
    assert sorted(pushed_files(hub, "datasets/somebody/stars")) == [
        "LICENSE",
        "README.md",
        "build.json",
        "data/train-00000-of-00002.parquet",
        "data/train-00001-of-00002.parquet",
    ]


def test_files_that_are_not_part_of_a_data_set_are_not_pushed_and_listed(hub, tmp_path, caplog):
    folder = build(tmp_path / "stars", train=3)
    (folder / ".git").mkdir()
    for name in (".git/config", "notes.txt", "data/notes.txt", "instrument.yaml", "labels.png"):
        (folder / name).write_bytes(b"mine")
    card = folder / "README.md"
    card.write_text(card.read_text().replace("Some.", "![Labels](labels.png)"))
    push_dataset(folder, "somebody/stars")
    assert sorted(pushed_files(hub, "datasets/somebody/stars")) == [
        "README.md",
        "build.json",
        "data/train-00000-of-00001.parquet",
        "instrument.yaml",
        "labels.png",
    ]
    assert caplog.messages[0] == (
        f"{folder}: left out, as nothing that belongs on the hub: .git/, data/notes.txt, notes.txt"
    )


def test_free_text_in_the_card_of_a_data_set_on_the_hub_survives_a_push(hub, tmp_path):
    push_dataset(build(tmp_path / "stars", train=3), "somebody/stars", private=True)
    write_on_the_hub(hub, "datasets/somebody/stars", "notes", "Mind the third star.")
    push_dataset(build(tmp_path / "more", train=4), "somebody/stars", private=True)
    assert pushed_texts(hub, "datasets/somebody/stars") == {"notes": "Mind the third star."}
    assert "| train | 4 |" in pushed_files(hub, "datasets/somebody/stars")["README.md"].decode()


def test_a_data_set_is_built_and_pushed_by_one_command(hub, tmp_path, capsys):
    spectra = build(tmp_path / "stars", train=3)
    out = tmp_path / "mine"
    command = ["data", "from-files", str(spectra), "--out", str(out), "--push-to-hub", "somebody/mine"]
    assert spectrafm_cli.main(command) == 0
    commit = hub.repositories["datasets/somebody/mine"].refs["main"]
    assert capsys.readouterr().out.splitlines()[-1] == f"{hub.url}/datasets/somebody/mine/commit/{commit}"


def test_a_dry_run_of_a_data_set_sends_nothing(hub, tmp_path, capsys):
    folder = build(tmp_path / "stars", train=3)
    assert spectrafm_cli.main(["data", "push", str(folder), "somebody/stars", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert " data/train-00000-of-00001.parquet\n" in shown and 'load_dataset("somebody/stars")' in shown
    assert hub.repositories == {}


def test_a_folder_without_a_build_or_with_the_wrong_card_is_not_pushed(tmp_path):
    (tmp_path / "README.md").write_text("# Mine")
    with pytest.raises(ValueError, match="folder: expected a built data set, got "):
        push_dataset(tmp_path, "somebody/stars")
    folder, other = build(tmp_path / "a", train=3), build(tmp_path / "b", train=4)
    shutil.copy(other / "README.md", folder)
    with pytest.raises(ValueError, match=r"card: expected the spectra of the files, \{'train': 3\}, in .*'train': 4\}"):
        push_dataset(folder, "somebody/stars")


def test_free_text_in_the_card_of_a_data_set_survives_a_new_build(tmp_path):
    folder = build(tmp_path / "stars", train=3)
    card = folder / "README.md"
    card.write_text(card.read_text().replace(free_part("notes"), free_part("notes", "Mind the third star.")))
    build(folder, overwrite=True, train=4)
    assert free_part("notes", "Mind the third star.") in card.read_text()
    assert "| train | 4 |" in card.read_text()
    card.write_text(card.read_text().replace("<!-- end of free text -->", ""))
    with pytest.raises(ValueError, match="free text: expected "):
        build(folder, overwrite=True, train=5)
    assert "Mind the third star." in card.read_text()
