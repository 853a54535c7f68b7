"""SIGKILL at random moments: a resumed run ends like an uninterrupted one."""

import csv
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import make_tiny_model
from fault_table import tried
from safetensors.torch import load_file
from test_trainer import make_stars, recipe_from_nothing
from test_upload import build
from warm import Warm, warm

from spectrafm_hf import SpectraFMTokenizer, save_checkpoint


KILLS = [4, pytest.param(20, marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def forked():
    with warm() as server:
        yield server


def contents(folder: Path, *hidden: str) -> dict[str, bytes]:
    """Files by their names, without what a killed process has left under names that begin with a dot."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    names = {path: path.relative_to(folder) for path in paths}
    return {
        str(name): path.read_bytes()
        for path, name in names.items()
        if not any(part.startswith(".") for part in name.parts)
    }


def kill_again_and_again(
    forked: Warm,
    folder: Path,
    command: list[object],
    kills: int,
    fault: str,
    lost: str,
    check: Callable[[], None],
    check_end: Callable[[], None],
    clear: Callable[[], None],
) -> None:
    """
    Run the command, killed at moments within the time that an undisturbed run takes; after each, `check` what is
    there, and after each run that came to its end, `check_end`, and begin with nothing.
    """
    clear()
    assert forked.run(folder, *command) == 0, (folder / "log").read_text()
    duration = forked.seconds
    check_end()
    clear()
    seed = random.randrange(1000)
    print(f"moments of seed {seed}, {duration:.2f} s undisturbed")  # pytest shows it where the test fails
    generator = random.Random(seed)
    with tried(fault, lost) as tally:
        while tally.tried < kills:
            code = forked.run(folder, *command, after=generator.uniform(0, duration))
            assert code in (0, -9), (folder / "log").read_text()[-3000:]
            if code:
                tally.tried += 1
                check()
                tally.survived += 1
            else:
                check_end()
                clear()
        assert forked.run(folder, *command) == 0, (folder / "log").read_text()[-3000:]
        check_end()


FROM_FILES = ["from-files", "survey"]
SYNTHETIC = ["synthetic", "--instrument", "gaia-xp", "--n", 200, "--shard-rows", 20, "--workers", 1]


@pytest.mark.parametrize(("builder", "kills"), [(FROM_FILES, 4), pytest.param(SYNTHETIC, 20, marks=pytest.mark.slow)])
def test_a_killed_build_leaves_a_complete_data_set_or_none(forked, tmp_path, builder, kills):
    build(tmp_path / "survey", train=200)
    arguments = ["data", *builder]
    assert forked.run(tmp_path, "spectrafm", *arguments, "--out", "whole") == 0, (tmp_path / "log").read_text()
    whole = contents(tmp_path / "whole")

    def check() -> None:
        if (tmp_path / "set").exists():
            assert contents(tmp_path / "set").keys() == whole.keys()
        for path in (tmp_path / ".set.partial").glob("data/[!.]*-of-*"):
            assert path.read_bytes() == whole[f"data/{path.name}"]

    def check_end() -> None:
        assert contents(tmp_path / "set") == whole
        assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "set", "survey", "whole"]

    def clear() -> None:
        for name in ("set", ".set.partial"):
            shutil.rmtree(tmp_path / name, ignore_errors=True)

    kill_again_and_again(forked, tmp_path, ["spectrafm", *arguments, "--out", "set"], kills,
                         "building a data set killed (SIGKILL)", "the shard that was being written",
                         check, check_end, clear)  # fmt: skip


@pytest.mark.parametrize("kills", KILLS)
def test_a_survey_whose_prediction_is_killed_has_each_star_once(forked, tmp_path, kills):
    survey = build(tmp_path / "survey", train=300)
    save_checkpoint(make_tiny_model(), SpectraFMTokenizer(), tmp_path / "tiny")
    command = ["spectrafm", "predict", survey, "--model", tmp_path / "tiny", "--output"]
    assert forked.run(tmp_path, *command, "whole") == 0, (tmp_path / "log").read_text()
    whole = contents(tmp_path / "whole")
    stars = {f"train {i}" for i in range(300)}

    def check() -> None:
        there = contents(tmp_path / "labels")
        assert all(content == whole[name] for name, content in there.items())

    def check_end() -> None:
        assert contents(tmp_path / "labels") == whole
        found = pq.read_table(tmp_path / "labels")["object_id"].to_pylist()
        assert len(found) == 300 and set(found) == stars

    kill_again_and_again(forked, tmp_path, [*command, "labels"], kills,
                         "predicting a survey killed (SIGKILL)", "the shard that was being predicted",
                         check, check_end, lambda: shutil.rmtree(tmp_path / "labels", ignore_errors=True))  # fmt: skip


@pytest.mark.parametrize("kills", KILLS)
def test_a_training_that_is_killed_ends_in_the_same_weights_to_the_last_bit(forked, tmp_path, kills):
    (tmp_path / "data").mkdir()
    for split, size, seed in (("train", 256, 1), ("validation", 64, 2)):
        make_stars(size, seed).to_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    settings = {"per_device_train_batch_size": 32, "num_train_epochs": 2, "learning_rate": 2e-3, "report_to": "none",
                "eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 2,
                "save_total_limit": 2, "logging_steps": 1, "disable_tqdm": True, "use_cpu": True}  # fmt: skip
    recipe = {**vars(recipe_from_nothing(noise=0.5, ema_decay=0.9)), "data": str(tmp_path / "data"), **settings}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = ["train.py", "recipe.yaml", "--resume_from_checkpoint", "last", "--output_dir"]
    assert forked.run(tmp_path, *command, "whole") == 0, (tmp_path / "log").read_text()

    def curves(folder: str) -> list[tuple[str, ...]]:
        with (tmp_path / folder / "curves.csv").open() as file:
            return [tuple(row[name] for name in ("step", "loss", "grad_norm", "eval_loss")) for row in
                    csv.DictReader(file)]  # fmt: skip

    whole, weights = curves("whole"), load_file(tmp_path / "whole" / "final" / "model.safetensors")
    assert [row[0] for row in whole] == [str(step) for step in range(1, 17)]

    def check() -> None:
        if (tmp_path / "run" / "final").exists():
            found = load_file(tmp_path / "run" / "final" / "model.safetensors")
            assert all(torch.equal(found[name], weights[name]) for name in weights)

    def check_end() -> None:
        check()
        assert (tmp_path / "run" / "final" / "training_range.json").is_file()
        assert curves("run") == whole

    kill_again_and_again(forked, tmp_path, [*command, "run"], kills,
                         "training killed (SIGKILL)", "the steps since the last checkpoint; loss and weights end the "
                         "same to the last bit",
                         check, check_end, lambda: shutil.rmtree(tmp_path / "run", ignore_errors=True))  # fmt: skip
