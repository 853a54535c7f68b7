"""Two processes that write the same output: it is complete and right, or the second process is refused."""

import shutil

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
from spectrafm_hf.files import only_writer
from spectrafm_hf.free_text import free_part


@pytest.fixture(scope="module")
def two():
    with warm() as one, warm() as other:
        yield one, other


def both(two, folder, *command) -> list[int]:
    """Exit codes of two processes that are started together."""
    for server in two:
        server.start(folder, *command)
    return [server.wait() for server in two]


@pytest.mark.parametrize(
    "output", [pytest.param("labels", marks=pytest.mark.slow), "labels.csv", "labels.parquet", "labels.fits"]
)
def test_two_simultaneous_predictions_leave_a_complete_file(two, tmp_path, output):
    survey = build(tmp_path / "survey", train=200)
    save_checkpoint(make_tiny_model(), SpectraFMTokenizer(), tmp_path / "tiny")
    command = ["spectrafm", "predict", survey, "--model", tmp_path / "tiny", "--output"]
    with tried("two processes predict into the same output", "nothing", 3):
        assert two[0].run(tmp_path, *command, f"one-{output}") == 0
        for _ in range(3):
            codes, printed = both(two, tmp_path, *command, output), (tmp_path / "log").read_text()
            # One that begins when the other has ended finds its output, and refuses to replace it.
            late = sorted(codes) == [0, 2] and "which exists; --overwrite replaces it" in printed
            assert late or codes == [0, 0], printed
            one, found = tmp_path / f"one-{output}", tmp_path / output
            if found.is_dir():
                assert pq.read_table(found).equals(pq.read_table(one))
                assert not [path for path in found.rglob(".*")]
                shutil.rmtree(found)
            else:
                assert found.read_bytes() == one.read_bytes()
                found.unlink()


def test_the_second_build_of_the_same_data_set_is_refused(two, tmp_path):
    command = [
        "spectrafm",
        "data",
        "synthetic",
        "--instrument",
        "gaia-xp",
        "--n",
        100,
        "--shard-rows",
        20,
        "--workers",
        1,
        "--out",
    ]
    with tried("two processes build the same data set", "nothing: the second is told", 1):
        assert sorted(both(two, tmp_path, *command, "set")) == [0, 2]
        log = (tmp_path / "log").read_text()
        assert "spectrafm data: --output: expected a folder that no other process writes at this time, got" in log
        assert two[0].run(tmp_path, *command, "one") == 0
        for path in (tmp_path / "one" / "data").iterdir():
            assert (tmp_path / "set" / "data" / path.name).read_bytes() == path.read_bytes()
        assert not (tmp_path / ".set.partial").exists()


def test_the_second_training_into_the_same_folder_is_refused(two, tmp_path):
    (tmp_path / "data").mkdir()
    for split in ("train", "validation"):
        make_stars(64, 1).to_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    settings = {"max_steps": 20, "save_steps": 2, "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    recipe = {**vars(recipe_from_nothing(data=str(tmp_path / "data"))), **settings}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with tried("two processes train into the same folder", "nothing: the second is told", 1):
        assert two[0].run(tmp_path, "train.py", "recipe.yaml", "--output_dir", "one") == 0
        assert sorted(both(two, tmp_path, "train.py", "recipe.yaml", "--output_dir", "run")) == [0, 2]
        assert "train.py: output: expected a folder that no other process writes" in (tmp_path / "log").read_text()
        one, run = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("one", "run"))
        assert all(one[name].equal(run[name]) for name in one)


def test_a_folder_is_free_again_when_its_writer_is_done_or_dead(tmp_path):
    folder = tmp_path / "out"
    refused = pytest.raises(ValueError, match=r"output: expected a folder that no other process writes .* got .*out")
    with only_writer(folder), refused, only_writer(folder):
        pass
    with only_writer(tmp_path / "out"):
        pass


def test_free_text_survives_a_build_killed_between_its_last_two_steps(tmp_path):
    folder = build(tmp_path / "stars", train=3)
    card = folder / "README.md"
    card.write_text(card.read_text().replace(free_part("notes"), free_part("notes", "Mind the third star.")))
    with tried("building a data set anew killed between its two renames", "nothing", 1):
        folder.rename(tmp_path / ".stars.old")
        with pytest.raises(ValueError, match="out_dir: expected a build with"):
            build(folder, train=4)
        build(folder, overwrite=True, train=4)
        assert "Mind the third star." in card.read_text()
        assert [path.name for path in tmp_path.iterdir()] == ["stars"]
