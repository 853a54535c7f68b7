"""A truncated, deleted or unreadable shard: the others are used, or one line names it; repaired, runs resume."""

import shutil
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import make_tiny_model
from fault_table import tried
from safetensors.torch import load_file
from test_trainer import make_stars, recipe_from_nothing
from test_upload import build
from warm import warm

from spectrafm_hf import SpectraFMTokenizer, save_checkpoint
from spectrafm_hf.inference.survey import ShardPredictor, list_shards
from spectrafm_hf.training.recipe import load_stars


@pytest.fixture(scope="module")
def forked():
    with warm() as server:
        yield server


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def close(path: Path) -> None:
    path.chmod(0)


def stars_in(folder: Path) -> list[str]:
    return pq.read_table(folder)["object_id"].to_pylist()


@pytest.mark.parametrize("spoil", [truncate, close, Path.unlink])
def test_an_unreadable_shard_is_reported_and_predicted_later(forked, tmp_path, spoil):
    survey = build(tmp_path / "survey", train=50)
    save_checkpoint(make_tiny_model(), SpectraFMTokenizer(), tmp_path / "tiny")
    shard = sorted((survey / "data").iterdir())[2]
    shutil.copy(shard, tmp_path / "copy")
    command = ["spectrafm", "predict", survey, "--model", tmp_path / "tiny", "--output", "labels"]
    what = {truncate: "truncated", close: "made unreadable", Path.unlink: "deleted"}[spoil]
    with tried(f"shard of a survey {what}", "nothing", 1):
        spoil(shard)
        code = forked.run(tmp_path, *command, closed=True)
        log = (tmp_path / "log").read_text()
        if spoil is Path.unlink:  # before it is listed, nobody can know of it
            assert code == 0 and "4 of 4 shards" in log
        else:
            assert code == 1 and shard.name in log and "Traceback" not in log
        assert len(stars_in(tmp_path / "labels")) == 40
        shutil.copy(tmp_path / "copy", tmp_path / "mended")
        (tmp_path / "mended").replace(shard)
        assert forked.run(tmp_path, *command, closed=True) == 0
        assert "5 of 5 shards in labels, 4 of them from before" in (tmp_path / "log").read_text()
        assert stars_in(tmp_path / "labels") == [f"train {i}" for i in range(50)]


def test_a_shard_that_is_deleted_after_it_was_listed_stops_no_other(tmp_path):
    survey = build(tmp_path / "survey", train=50)
    predictor = ShardPredictor(make_tiny_model(), SpectraFMTokenizer(), tmp_path / "labels")
    with tried("shard of a survey deleted between listing and reading", "its stars, which are nowhere", 1):
        shards = list_shards([survey])
        gone = Path(shards[1].files[0])
        gone.unlink()
        outcomes = [predictor.outcome(shard) for shard in shards]
        assert [outcome.written for outcome in outcomes] == [True, False, True, True, True]
        (failure,) = outcomes[1].failures
        assert failure.file == gone and failure.cause and "\n" not in failure.cause
        assert len(stars_in(tmp_path / "labels")) == 40


@pytest.mark.parametrize("left", [0, 4, 0.5, -1])
def test_a_shard_of_predictions_that_is_truncated_is_made_again(tmp_path, left):
    survey = build(tmp_path / "survey", train=20)
    predictor = ShardPredictor(make_tiny_model(), SpectraFMTokenizer(), tmp_path / "labels")
    shards = list_shards([survey])
    with tried("shard of predictions truncated after it was written", "nothing: the next run makes it again", 1):
        for shard in shards:
            predictor(shard)
        path = predictor.path(shards[0])
        whole = path.read_bytes()
        path.write_bytes(whole[: int(left * len(whole)) if 0 < left < 1 else left or None] if left else b"")
        assert [predictor.is_done(shard) for shard in shards] == [False, True]
        predictor(shards[0])
        assert path.read_bytes() == whole


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "stars" / "data"
    folder.mkdir(parents=True)
    for i in range(4):
        make_stars(64, i).to_parquet(folder / f"train-{i:05d}-of-00004.parquet")
    make_stars(32, 9).to_parquet(folder / "validation-00000-of-00001.parquet")
    return folder


@pytest.mark.parametrize("streaming", [False, True])
def test_a_truncated_shard_of_training_data_is_named_before_the_training(data, streaming):
    shard = data / "train-00002-of-00004.parquet"
    with tried("shard of training data truncated", "nothing: told before the training", 1):
        truncate(shard)
        with pytest.raises(ValueError, match=r"data: expected Parquet files, got .*") as error:
            load_stars(recipe_from_nothing(data=str(data.parent), streaming=streaming), 0)
        assert shard.name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.slow
def test_a_shard_deleted_while_streaming_stops_the_training_which_resumes_from_its_checkpoint(data, forked, tmp_path):
    settings = {"per_device_train_batch_size": 32, "max_steps": 16, "report_to": "none", "save_strategy": "steps",
                "save_steps": 2, "logging_steps": 1, "disable_tqdm": True, "use_cpu": True}  # fmt: skip
    recipe = {**vars(recipe_from_nothing(data=str(data.parent), streaming=True)), **settings}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = ["train.py", "recipe.yaml", "--resume_from_checkpoint", "last", "--output_dir"]
    assert forked.run(tmp_path, *command, "whole") == 0, (tmp_path / "log").read_text()
    for name, spoil in (("deleted", Path.unlink), ("made unreadable", close)):
        with tried(f"shard of training data {name} while it is streamed", "the steps since the last checkpoint", 1):
            copy = tmp_path / "copy"
            shard = data / "train-00002-of-00004.parquet"
            shutil.copy(shard, copy)
            output = tmp_path / name
            forked.start(tmp_path, *command, output, closed=True)
            while not (output / "checkpoint-2" / "trainer_state.json").exists():
                assert forked.process.poll() is None
            spoil(shard)
            code = forked.wait()
            copy.replace(shard)
            if code:  # else it had opened the file by then
                assert code == 2, (tmp_path / "log").read_text()
                assert not (output / "final").exists()
                assert forked.run(tmp_path, *command, output) == 0
            weights = [load_file(folder / "final" / "model.safetensors") for folder in (tmp_path / "whole", output)]
            assert all(weights[0][key].equal(weights[1][key]) for key in weights[0])
