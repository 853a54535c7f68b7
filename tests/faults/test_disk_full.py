"""A full disk (a real one, of at most a megabyte): one line, no incomplete file, and runs resume."""

import subprocess
from pathlib import Path

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


@pytest.fixture(scope="module")
def forked():
    with warm() as server:
        yield server


@pytest.fixture
def disk(tmp_path):
    """`disk(size)`: a folder in memory that holds so many kB; told again, it grows."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(kilobytes: int) -> Path:
        remount = "remount," if folder.is_mount() else ""
        command = ["mount", "-t", "tmpfs", "-o", f"{remount}size={kilobytes}k", "tmpfs", str(folder)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("a disk of its own takes the right to mount one")
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def visible(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]


@pytest.mark.slow
def test_predictions_and_data_sets_resume_when_there_is_space(forked, tmp_path, disk):
    survey = build(tmp_path / "survey", train=100)
    save_checkpoint(make_tiny_model(), SpectraFMTokenizer(), tmp_path / "tiny")
    predict = ["spectrafm", "predict", survey, "--model", tmp_path / "tiny", "--output"]
    cases = {
        "predicting a survey": (12, [*predict, "disk/labels"]),
        "predicting into a table": (4, [*predict, "disk/labels.csv"]),
        "building a data set": (12, ["spectrafm", "data", "from-files", survey, "--out", "disk/set"]),
    }
    for name, (kilobytes, command) in cases.items():
        with tried(f"disk full: {name}", "nothing; one line, the next run goes on", 1):
            disk(kilobytes)
            code = forked.run(tmp_path, *command)
            log = (tmp_path / "log").read_text()
            (tmp_path / "log").unlink()
            assert code in (1, 2) and "No space left on device" in log and "Traceback" not in log, (name, log)
            for path in visible(tmp_path / "disk"):
                assert path.suffix != ".parquet" or pq.read_table(path).num_rows
            assert not (tmp_path / "disk" / "set").exists() and not (tmp_path / "disk" / "labels.csv").exists()
            disk(4000)
            assert forked.run(tmp_path, *command) == 0, (tmp_path / "log").read_text()
            for path in sorted(tmp_path.glob("disk/*")):
                subprocess.run(["rm", "-r", str(path)], check=True)


@pytest.mark.slow
def test_a_training_resumes_from_the_last_complete_checkpoint(forked, tmp_path, disk):
    (tmp_path / "data").mkdir()
    for split in ("train", "validation"):
        make_stars(64, 1).to_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": 2, "logging_steps": 1, "report_to": "none",
                "disable_tqdm": True, "use_cpu": True}  # fmt: skip
    recipe = {**vars(recipe_from_nothing(data=str(tmp_path / "data"))), **settings}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = ["train.py", "recipe.yaml", "--resume_from_checkpoint", "last", "--output_dir"]
    assert forked.run(tmp_path, *command, "whole") == 0, (tmp_path / "log").read_text()
    used = sum(path.stat().st_size for path in (tmp_path / "whole" / "checkpoint-2").iterdir()) // 1024
    for kilobytes in (used // 3, 3 * used // 2, 2 * used - 8, 5 * used // 2):
        with tried("disk full: saving a checkpoint", "the steps since the last checkpoint that is whole", 1):
            (tmp_path / "log").unlink()
            assert forked.run(tmp_path, *command, disk(kilobytes) / "run") == 2, (tmp_path / "log").read_text()
            log = (tmp_path / "log").read_text()
            assert "Traceback" not in log and log.splitlines()[-1].startswith("train.py: "), log
            assert not (tmp_path / "disk" / "run" / "final").exists()
            disk(40 * used)
            assert forked.run(tmp_path, *command, "disk/run") == 0, (tmp_path / "log").read_text()
            one, other = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("whole", "disk/run"))
            assert all(one[key].equal(other[key]) for key in one)
            subprocess.run(["rm", "-r", str(tmp_path / "disk" / "run")], check=True)
