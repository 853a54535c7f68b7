"""SIGKILL at random moments, again and again: whoever begins anew gets what an undisturbed run would have made."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import make_tiny_model
from fault_table import tried
from test_hub import build
from warm import Warm, warm

from spectrafm_hf import SpectraFMTokenizer, save_checkpoint


KILLS = [20, pytest.param(60, marks=pytest.mark.slow)]


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


@pytest.mark.parametrize("kills", KILLS)
def test_a_survey_whose_prediction_is_killed_has_each_star_once(forked, tmp_path, kills):
    survey = build(tmp_path / "survey", train=300)
    save_checkpoint(make_tiny_model(), SpectraFMTokenizer(patch_size=4), tmp_path / "tiny")
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
