"""A hub that returns 500, stalls or truncates files, and a damaged cache: a retry works, or an error of one line."""

import re
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import make_tiny_model
from fault_table import tried
from huggingface_hub import constants
from test_upload import build, checkpoint, hub, pushed_files  # noqa: F401

import spectrafm_cli
from spectrafm_hf import SpectraFMTokenizer, load_checkpoint, save_checkpoint
from spectrafm_hf.inference.training_range import TrainingRange


pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")
SHARD = "GET .*/resolve/.*train-00001"
FAULTS = {"500": "answers 500", "stall": "stalls", "cut": "cuts the body"}


@pytest.fixture
def impatient(monkeypatch):
    """Time-outs of a second, and no waiting before the client asks again."""
    for name in ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT"):
        monkeypatch.setattr(constants, name, 0.3)
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))


@pytest.fixture
def tiny(hub, tmp_path):  # noqa: F811
    """A checkpoint, on the hub as somebody/tiny."""
    save_checkpoint(make_tiny_model(), SpectraFMTokenizer(), tmp_path / "tiny")
    hub.commit("somebody/tiny", tmp_path / "tiny")
    return tmp_path / "tiny"


def is_right(name: str) -> bool:
    expected = make_tiny_model().state_dict()
    return all(value.equal(expected[key]) for key, value in load_checkpoint(name)[0].state_dict().items())


def one_line(capsys, verb: str, *mentioned: str) -> None:
    captured = capsys.readouterr().err
    error = re.findall(r"spectrafm .*", captured)  # the bar of an upload may stand before it
    assert len(error) == 1 and error[0].startswith(f"spectrafm {verb}: "), captured
    assert any(name in error[0] for name in mentioned), error


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("what", FAULTS)
@pytest.mark.parametrize("times", [1, float("inf")])
def test_a_checkpoint_is_pulled_completely_or_not_at_all(hub, tiny, impatient, tmp_path, capsys, what, times, file):  # noqa: F811
    often = "once" if times == 1 else "always"
    lost = "nothing" if times == 1 else "nothing; one line, the next run loads it"
    with tried(f"the hub {FAULTS[what]} ({often}): a checkpoint", lost, 1):
        hub.fail(f"GET .*/resolve/.*{file}", what, times)
        spectra = build(tmp_path / "stars", test=3)
        command = ["predict", str(spectra), "--model", "somebody/tiny", "--output", str(tmp_path / "labels.csv")]
        code = spectrafm_cli.main(command)
        assert hub.faults[0].times < times or times > 1, "a fault that nobody met"
        assert code == (0 if times == 1 else 2)
        if code:
            one_line(capsys, "predict", "somebody/tiny")
            assert not (tmp_path / "labels.csv").exists()
            hub.faults.clear()
            assert spectrafm_cli.main(command) == 0
        assert (tmp_path / "labels.csv").exists() and is_right("somebody/tiny")


@pytest.mark.parametrize("what", ["500", "cut"])
def test_without_an_answer_about_the_training_range_no_star_is_predicted_unflagged(
    hub,  # noqa: F811
    tiny,
    impatient,
    tmp_path,
    capsys,
    what,
):
    with tried(f"the hub {FAULTS[what]} (always): a training range", "nothing; one line, the next run flags", 1):
        TrainingRange({"teff": (0.0, 1.0)}).save(tiny)
        hub.commit("somebody/tiny", tiny)
        hub.fail("training_range", what)
        command = ["predict", str(build(tmp_path / "survey", train=5)), "--model", "somebody/tiny"]
        command += ["--output", str(tmp_path / "labels")]
        assert spectrafm_cli.main(command) == 2
        one_line(
            capsys, "predict", "somebody/tiny: expected the hub, or its cache, to know whether there is a training"
        )
        assert not list(tmp_path.glob("labels/**/*.parquet"))
        hub.faults.clear()
        assert spectrafm_cli.main(command) == 0
        assert pq.read_table(tmp_path / "labels")["flags"].to_pylist() == ["teff>1"] * 5
        # From now on the cache knows it.
        hub.fail("training_range", what)
        assert TrainingRange.load("somebody/tiny") == TrainingRange.load(tiny)


@pytest.mark.parametrize("spoil", ["truncated", "changed"])
@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_damaged_file_in_the_cache_of_the_hub_is_fetched_again(hub, tiny, tmp_path, caplog, spoil, file):  # noqa: F811
    with tried(f"a file in the cache of the hub {spoil}", "nothing: its hash is checked, it is fetched again", 1):
        assert is_right("somebody/tiny")
        (cached,) = Path(constants.HF_HUB_CACHE).rglob(f"snapshots/*/{file}")
        whole = cached.read_bytes()
        damaged = whole[: len(whole) // 2] if spoil == "truncated" else whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]
        cached.resolve().write_bytes(damaged)
        before = len(hub.downloads())
        assert is_right("somebody/tiny")
        assert cached.read_bytes() == whole
        assert [path for path in hub.downloads()[before:] if file in path], "from the hub"
        before = len(hub.downloads())
        assert is_right("somebody/tiny") and len(hub.downloads()) == before, "and only then"


@pytest.mark.parametrize(("what", "pattern"), [*((what, SHARD) for what in FAULTS), ("500", "GET /api/datasets")])
def test_a_survey_on_the_hub_recovers_every_shard(hub, tiny, impatient, tmp_path, capsys, what, pattern):  # noqa: F811
    with tried(f"the hub {FAULTS[what]} (always): a survey", "nothing; the next run predicts the shard", 1):
        survey = build(tmp_path / "survey", train=30)
        hub.commit("datasets/somebody/survey", survey)
        hub.fail(pattern, what)
        command = ["predict", "hf://datasets/somebody/survey", "--model", str(tiny), "--output"]
        command.append(str(tmp_path / "labels"))
        code = spectrafm_cli.main(command)
        if "resolve" in pattern:
            assert code == 1 and "2 of 3 shards" in capsys.readouterr().out
            assert len(pq.read_table(tmp_path / "labels")) == 20
        else:
            assert code == 2
            one_line(capsys, "predict", "somebody/survey")
        hub.faults.clear()
        assert spectrafm_cli.main(command) == 0
        assert pq.read_table(tmp_path / "labels")["object_id"].to_pylist() == [f"train {i}" for i in range(30)]


@pytest.mark.parametrize(
    "pattern", ["POST /api/repos/create", pytest.param("PUT /lfs", marks=pytest.mark.slow), "POST .*/commit/"]
)
def test_a_push_is_one_commit_or_none(hub, checkpoint, impatient, capsys, pattern):  # noqa: F811
    with tried("the hub answers 500 (always): a push", "nothing: no commit, the next push makes it", 1):
        hub.fail(pattern, "500")
        assert spectrafm_cli.main(["push", str(checkpoint), "somebody/pushed"]) == 2
        one_line(capsys, "push", "somebody/pushed", "/lfs/", "/api/repos/create", "model.safetensors")
        repository = hub.repositories.get("somebody/pushed")
        assert repository is None or list(repository.commits.values()) == [{}]
        hub.faults.clear()
        assert spectrafm_cli.main(["push", str(checkpoint), "somebody/pushed"]) == 0
        pushed = pushed_files(hub, "somebody/pushed")
        assert pushed["model.safetensors"] == (checkpoint / "model.safetensors").read_bytes()
