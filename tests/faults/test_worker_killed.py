"""
One of the processes that share a survey is killed: the others do theirs, and the next run does the rest. A process
that makes batches for a training is killed: one line, and the next run goes on from the last checkpoint.
"""

import time

import psutil
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


@pytest.mark.slow
def test_of_two_processes_that_share_a_survey_one_may_be_killed(tmp_path, monkeypatch):
    survey = build(tmp_path / "survey", train=200)
    save_checkpoint(make_tiny_model(), SpectraFMTokenizer(), tmp_path / "tiny")
    command = ["spectrafm", "predict", survey, "--model", tmp_path / "tiny", "--output"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with warm() as one:
        monkeypatch.setenv("RANK", "1")
        fault = "one of two processes of a survey killed", "nothing: the next run does its rest"
        with warm() as other, tried(*fault) as tally:
            assert other.run(tmp_path, *command, "undisturbed") == 0, (tmp_path / "log").read_text()
            half = other.seconds / 2
            for tally.tried in (1, 2, 3):
                output = f"labels-{tally.tried}"
                one.start(tmp_path, *command, output)
                other.start(tmp_path, *command, output, after=half)
                assert (one.wait(), other.wait()) == (0, -9), (tmp_path / "log").read_text()
                assert 10 <= len(list((tmp_path / output).rglob("[!.]*.parquet"))) < 20
                assert other.run(tmp_path, *command, output) == 0, (tmp_path / "log").read_text()
                stars = pq.read_table(tmp_path / output)["object_id"].to_pylist()
                assert stars == [f"train {i}" for i in range(200)]
                tally.survived += 1


@pytest.mark.slow
def test_the_training_resumes_after_a_worker_was_killed(tmp_path):
    (tmp_path / "data").mkdir()
    for split, size, seed in (("train", 256, 1), ("validation", 32, 2)):
        make_stars(size, seed).to_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    settings = {"per_device_train_batch_size": 32, "max_steps": 60, "report_to": "none", "save_strategy": "steps",
                "save_steps": 2, "logging_steps": 1, "disable_tqdm": True, "use_cpu": True,
                "dataloader_num_workers": 2}  # fmt: skip
    recipe = {**vars(recipe_from_nothing(noise=0.5)), "data": str(tmp_path / "data"), **settings}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = ["train.py", "recipe.yaml", "--resume_from_checkpoint", "last", "--output_dir"]
    with warm() as one, tried("a process that makes batches killed", "the steps since the last checkpoint", 1):
        assert one.run(tmp_path, *command, "whole") == 0, (tmp_path / "log").read_text()
        one.start(tmp_path, *command, "run")
        while not (tmp_path / "run" / "checkpoint-2" / "trainer_state.json").exists():
            time.sleep(0.01)
        (training,) = psutil.Process(one.process.pid).children()
        makers = [process for process in training.children() if process.cmdline() == training.cmdline()]
        assert len(makers) == 2
        makers[0].kill()
        assert one.wait() == 2
        last = (tmp_path / "log").read_text().splitlines()[-1]
        # torch words it in one of several ways, by which of its threads notices first.
        assert "run: a data loading process ended (" in last and "--resume_from_checkpoint last" in last, last
        assert not (tmp_path / "run" / "final").exists()
        assert one.run(tmp_path, *command, "run") == 0, (tmp_path / "log").read_text()
    weights = [load_file(tmp_path / name / "final" / "model.safetensors") for name in ("whole", "run")]
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])
