"""One of the processes that share a survey is killed: the others do theirs, and the next run does the rest."""

import pyarrow.parquet as pq
from conftest import make_tiny_model
from fault_table import tried
from test_hub import build
from warm import warm

from spectrafm_hf import SpectraFMTokenizer, save_checkpoint


def test_of_two_processes_that_share_a_survey_one_may_be_killed(tmp_path, monkeypatch):
    survey = build(tmp_path / "survey", train=200)
    save_checkpoint(make_tiny_model(), SpectraFMTokenizer(patch_size=4), tmp_path / "tiny")
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
