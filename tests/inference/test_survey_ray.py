"""A survey on Ray (on this machine): the same files as without Ray, even if processes are killed."""

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import make_tiny_model
from test_upload import build

import spectrafm_cli
from spectrafm_hf import SpectraFMTokenizer, save_checkpoint


pytest.importorskip("ray", reason="needs the extra `ray`")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}


@pytest.fixture(autouse=True)
def one_thread():
    """A process of Ray's has one thread; with more, sums are taken in another order, which changes the last digits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    save_checkpoint(make_tiny_model(), SpectraFMTokenizer(), tmp_path / "tiny")
    return tmp_path / "tiny"


def command(*options: object) -> list[str]:
    return ["predict", "survey", "--model", "tiny", *map(str, options)]


def tables(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.parquet")}


@pytest.mark.slow
def test_ray_writes_the_same_files_as_one_process_and_resumes(checkpoint, tmp_path, monkeypatch, capsys):
    """Paths are relative, and Ray's processes start elsewhere; a shard is broken, and mended for one process."""
    monkeypatch.chdir(tmp_path)
    build(tmp_path / "survey", train=25, test=12)
    assert spectrafm_cli.main(command("--output", "one")) == 0
    shard = next((tmp_path / "survey" / "data").glob("test-00000*"))
    content, times = shard.read_bytes(), shard.stat()

    shard.write_bytes(content[: len(content) // 2])
    on_ray = [sys.executable, "-m", "spectrafm_cli", *command("--output", "ray", "--ray")]
    run = subprocess.run(on_ray, capture_output=True, text=True, timeout=200, env=ENVIRONMENT, cwd=tmp_path)
    assert run.returncode == 1 and "4 of 5 shards in ray, 0 of them from before" in run.stdout, run.stderr
    assert shard.name in (tmp_path / "ray" / "_failed.csv").read_text()
    first, one = tables(tmp_path / "ray"), tables(tmp_path / "one")
    assert len(one) == 5 and len(first) == 4 and first == {name: one[name] for name in first}

    shard.write_bytes(content)
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    capsys.readouterr()
    assert spectrafm_cli.main(command("--output", "ray")) == 0
    assert "5 of 5 shards in ray, 4 of them from before" in capsys.readouterr().out
    assert tables(tmp_path / "ray") == one


KILLED = """
import json, os, signal, sys, time
from pathlib import Path
from spectrafm_hf.data.readers import Failure
from spectrafm_hf.inference.survey import list_shards
from spectrafm_hf.inference import survey_ray

class Killed(survey_ray.ShardActor):
    def __call__(self, row):
        if "test-00001" in row["shard"] and not Path("killed").exists():
            Path("killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(row)

survey_ray.ShardActor = Killed
outcomes = list(survey_ray.predict_on_ray(list_shards(["survey"]), "tiny", "killed-once", batch_size=4))
print(sum(outcome.stars for outcome in outcomes), all(outcome.written for outcome in outcomes))
"""


@pytest.mark.slow
def test_a_shard_whose_process_is_killed_is_predicted_by_another(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    build(tmp_path / "survey", train=25, test=12)
    run = subprocess.run(
        [sys.executable, "-c", KILLED.replace('Path("killed")', f'Path({str(tmp_path / "killed")!r})')],
        capture_output=True, text=True, timeout=200, env=ENVIRONMENT, cwd=tmp_path,
    )  # fmt: skip
    assert run.returncode == 0 and run.stdout.splitlines()[-1] == "37 True", run.stderr
    assert (tmp_path / "killed").exists()
    assert spectrafm_cli.main(command("--output", "one")) == 0
    pd.testing.assert_frame_equal(
        pd.read_parquet(tmp_path / "killed-once"), pd.read_parquet(tmp_path / "one"), check_exact=False, rtol=1e-5
    )


def test_options_that_ray_does_not_use_are_refused(tmp_path, monkeypatch, capsys):
    assert spectrafm_cli.main(["predict", "x", "--output", str(tmp_path / "labels.csv"), "--ray"]) == 2
    assert "--ray: expected a folder as the output" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert spectrafm_cli.main(["predict", "x", "--output", str(tmp_path / "labels"), "--ray"]) == 2
    assert "--ray: expected one process, which Ray makes more of, got 2" in capsys.readouterr().err
