"""README and pages: their commands are understood, their Python runs, and the files that they name are there."""

import argparse
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import spectrafm_cli
from spectrafm_hf import bundled, load_checkpoint, save_checkpoint
from spectrafm_hf.files import DEMO_STARS
from spectrafm_hf.models.flags_spectrafm import FLAGS
from spectrafm_hf.models.gate_spectrafm import FRAME_UNSTATED, MEDIUM_UNSTATED, NOT_AT_REST
from spectrafm_hf.training.recipe import read_recipe


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
#: In the order in which they are to be read: what a page uses, an earlier one has made.
PAGES = [
    ROOT / "README.md",
    *(
        ROOT / "docs" / f"{name}.md"
        for name in (
            *(
                "predict",
                "flags",
                "surveys",
                "finetune",
                "libraries",
                "devices",
                "spectra",
                "data",
                "train",
                "accuracy",
            ),
            *("paper", "own-instrument"),
        )
    ),
]
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)


def test_the_first_two_commands_install_and_run_the_demo_and_the_tests():
    first, second = (block.strip() for block in blocks("bash")[:2])
    assert "\n" not in first + second
    assert first.startswith("python3 -m venv") and first.endswith("spectrafm demo")
    assert second.startswith("python3 -m venv") and second.endswith("pytest -n 2")


def commands() -> list[str]:
    """Each line that is for a shell, without its comment."""
    lines = "\n".join(blocks("bash")).splitlines()
    return [line.partition(" #")[0].strip() for line in lines if line.strip()]


#: What takes too long, or reaches other machines, by how it begins, and the test that runs the same with less.
ELSEWHERE = {
    "spectrafm predict bulk/": "tests/data/readers/test_read_gaia_continuous.py"
    "::test_a_folder_of_bulk_files_is_a_survey",
    "spectrafm predict --gaia-ids": "tests/data/test_gaia_archive.py::test_the_command_line_predicts_them",
    "python3 -m venv": ".ci/run",
    'pip install ".[': ".ci/run",
    "spectrafm plot": "tests/cli/test_cli_files.py::test_plot_draws_the_selected_star_and_range",
    "spectrafm spectrum": "tests/cli/test_cli_spectrum.py::test_a_file_gives_spectra_on_the_pixels_of_an_instrument",
    "accelerate launch": "tests/inference/test_survey.py::test_processes_share_the_shards",
    "spectrafm predict survey/ --output labels --ray": "tests/inference/test_survey_ray.py"
    "::test_ray_writes_the_same_files_as_one_process_and_resumes",
    "spectrafm predict hf://": "tests/inference/test_survey.py"
    "::test_a_data_set_on_the_hub_is_read_shard_by_shard_and_not_kept",
    "spectrafm data miles": "tests/data/test_miles.py"
    "::test_the_data_set_holds_the_spectra_in_vacuum_with_the_labels_of_the_table",
    "python scripts/calibrate_survey.py": "tests/scripts/test_calibrate_survey.py"
    "::test_the_command_changes_errors_of_the_optical_and_nothing_else",
    "python scripts/pretrain": "tests/scripts/test_pretrain.py"
    "::test_the_three_commands_make_a_checkpoint_that_predicts",
    "spectrafm data gaia-xp": "tests/data/test_gaia_xp.py::test_the_data_set_has_the_values_of_the_source",
    "spectrafm finetune": "tests/cli/test_cli_finetune.py::test_a_group_gets_a_checkpoint_that_predicts",
    "spectrafm predict others/": "tests/cli/test_cli_finetune.py::test_a_scalar_that_helps_is_needed_by_predict",
    "spectrafm app": "tests/show/test_app_browser.py::test_an_example_shows_labels_pictures_and_neighbours",
    "python scripts/benchmarks/benchmark.py": "tests/scripts/benchmarks/test_benchmark.py"
    "::test_it_prints_a_table_and_saves_the_figures_of_each_round",
    "python scripts/benchmarks/benchmark_survey.py": "tests/scripts/benchmarks/test_benchmark_survey.py"
    "::test_the_memory_of_a_survey_is_that_of_a_quarter_of_it",
    "python scripts/checks/fault_table.py": "tests/scripts/checks/test_fault_table.py"
    "::test_it_prints_the_tested_faults_and_returns_the_exit_code_of_pytest",
    "python scripts/checks/fuzz.py": "tests/scripts/checks/test_fuzz.py::test_each_target_has_no_fault_in_a_few_inputs",
    "python scripts/synthesize_grid.py": ".ci/run",
    "python scripts/train_emulator.py": "tests/synthesis/test_emulation.py::test_the_script_measures_the_saved_one",
    "python scripts/train.py": "tests/scripts/test_train_accelerate.py"
    "::test_both_scripts_give_the_same_curves_and_the_same_weights_to_the_last_bit",
    "python scripts/paper/evaluate.py": "tests/scripts/paper/test_evaluate.py"
    "::test_one_command_compares_a_checkpoint_with_all_baselines",
    "python scripts/paper/evaluate_robustness.py": "tests/scripts/paper/test_evaluate_robustness.py"
    "::test_one_command_makes_the_table_and_files_of_it",
    "python scripts/paper/cramer_rao.py": "tests/scripts/paper/test_cramer_rao.py"
    "::test_a_checkpoint_is_compared_with_the_bound_on_the_same_stars",
    "python scripts/convert_original_checkpoint.py": "tests/hub/test_conversion.py"
    "::test_the_command_converts_a_fixture",
    "spectrafm push CHECKPOINT OWNER/NAME --private": "tests/hub/test_upload.py"
    "::test_the_command_line_pushes_pulls_and_predicts",
    "spectrafm predict spectra/ --model OWNER/NAME": "tests/hub/test_upload.py"
    "::test_the_command_line_pushes_pulls_and_predicts",
    "python scripts/benchmarks/compare_dtypes.py": "tests/scripts/benchmarks/test_compare_dtypes.py"
    "::test_the_bundled_checkpoint_changes_by_a_tenth_of_its_errors_at_most",
    "python scripts/benchmarks/check_gpu.py": "tests/scripts/benchmarks/test_check_gpu.py"
    "::test_all_of_it_runs_on_the_cpu",
    "spectrafm data push": "tests/hub/test_upload.py"
    "::test_a_data_set_is_loaded_and_streamed_from_the_hub_as_it_was_written",
}


def elsewhere(command: str) -> str | None:
    return next((where for begin, where in ELSEWHERE.items() if command.startswith(begin)), None)


class Understood(Exception):
    """Raised in place of what a script does once it has read its arguments."""


@pytest.fixture
def read_arguments(monkeypatch):
    """Run a script as far as that: either of these reads the arguments of each of them."""

    def stop_after(read):
        def stop(*args, **kwargs):
            read(*args, **kwargs)
            raise Understood

        return stop

    def run(script: str, *arguments: str):
        with monkeypatch.context() as patch:
            patch.chdir(ROOT)
            patch.setattr(sys, "argv", [script, *arguments])
            # Its neighbours; last, as one has the name of a library, evaluate.
            patch.setattr(sys, "path", [*sys.path, str((ROOT / script).parent)])
            patch.setattr(argparse.ArgumentParser, "parse_args", stop_after(argparse.ArgumentParser.parse_args))
            patch.setattr("spectrafm_hf.training.recipe.read_recipe", stop_after(read_recipe))
            runpy.run_path(str(ROOT / script), run_name="__main__")

    return run


def test_every_command_is_understood(read_arguments):
    assert len(commands()) > 25
    for command in commands():
        program, *arguments = shlex.split(re.sub(r"^accelerate launch .* -m spectrafm_cli", "spectrafm", command))
        if program == "spectrafm":
            spectrafm_cli.commands._parser().parse_args(arguments)
        elif program == "python":
            with pytest.raises(Understood):
                read_arguments(*arguments)
        else:
            assert program in ("python3", "pip")


def test_an_option_that_a_script_does_not_have_is_seen(read_arguments):
    with pytest.raises(SystemExit):
        read_arguments("scripts/paper/evaluate.py", "--modle", "none")
    with pytest.raises(SystemExit):
        read_arguments("scripts/train.py", "scripts/recipes/gaia-xp-ak.yaml", "--output_dri", "runs/mine")


def test_every_command_that_is_run_elsewhere_is_named_there():
    for begin, where in ELSEWHERE.items():
        assert any(command.startswith(begin) for command in commands()), begin
        file, _, test = where.partition("::")
        if file != ".ci/run":
            assert f"def {test}(" in (ROOT / file).read_text(encoding="utf-8"), begin


def test_every_command_that_is_left_to_ci_is_run_there():
    if not (ROOT / ".ci").is_dir():
        pytest.skip("the source distribution is without .ci")
    run = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    left = [command for command in commands() if elsewhere(command) == ".ci/run"]
    # It takes these from here, as they stand.
    begin = "python3 -m venv "
    first_two = [line for line in README.splitlines() if line.startswith(begin)]
    assert first_two == [command for command in left if command.startswith(begin)] and len(first_two) == 2
    assert f"grep -E '^{begin}' README.md | head -n 2" in run
    # The second of them installs all extras.
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    installed = re.search(r"spectrafm_hf\[(.*)\]", " ".join(groups["test"]))[1].split(",")
    for command in left:
        if command.startswith("pip install"):
            assert re.search(r'"\.\[(.*)\]"', command)[1] in installed
        elif not command.startswith(begin):
            assert command.rpartition(" ")[0] in run  # into another folder


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_other_commands_run_in_order(tmp_path, monkeypatch, capsys):
    """In a folder with what they name: spectra, a data set, a checkpoint, a recipe and an evaluation."""
    stars = pq.read_table(DEMO_STARS)
    for name, begin, end in (
        ("spectra/stars", 0, 12),
        ("survey/a", 0, 20),
        ("survey/b", 20, 40),
        ("gaia-xp/data/train-00000-of-00001", 0, 30),
        ("gaia-xp/data/validation-00000-of-00001", 30, 40),
        ("gaia-xp/data/test-00000-of-00001", 40, 64),
    ):
        path = tmp_path / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(stars.slice(begin, end - begin), path)
    shutil.copytree(bundled("spectrafm-base"), tmp_path / "CHECKPOINT")
    save_checkpoint(*load_checkpoint("spectrafm-base"), tmp_path / "CHECKPOINT")  # with its code
    shutil.copy(ROOT / "scripts" / "recipes" / "base.yaml", tmp_path / "RECIPE.yaml")
    shutil.copy(ROOT / "model_cards" / "evaluations" / "spectrafm-base.json", tmp_path / "evaluation.json")
    monkeypatch.chdir(tmp_path)
    run = 0
    for command in filter(lambda command: elsewhere(command) is None, commands()):
        program, *arguments = shlex.split(command)
        if program == "spectrafm":
            code = spectrafm_cli.main(arguments)
            assert code == 0, (command, capsys.readouterr())
        else:
            script = str(ROOT / arguments[0])
            subprocess.run([sys.executable, script, *arguments[1:]], check=True, timeout=300)
        run += 1
    assert run >= 11


@pytest.mark.slow
def test_the_python_of_the_readme_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in blocks("python"):
        # What `spectrafm export` has written before.
        if "model.onnx" in block:
            spectrafm_cli.main(["export", "spectrafm-base", "--output", "model.onnx"])
        exec(block, names)
    assert names["outputs"].predictions.shape == (1, 4)
    assert (names["outputs"].prediction_errors > 0).all()


def test_the_readme_is_short_and_leads_to_every_page():
    assert len(README.splitlines()) <= 200
    # Those that are made of other files are for the pages that Sphinx builds.
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"index.md", "api.md", "changelog.md", "verbs.md"}
    assert {page for page in pages if f"](docs/{page}" not in README} == set()


def test_the_files_and_headings_that_are_named_exist():
    missing = []
    for page in [*PAGES, *(ROOT / "docs").glob("*.md")]:
        text = page.read_text(encoding="utf-8")
        links = [(page.parent / name, anchor) for name, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", text)]
        links += [(ROOT / name, "") for name in re.findall(r"(?<![\w/])(?:scripts|model_cards)/[\w./-]+\.\w+", text)]
        for path, anchor in links:
            path = page if path == page.parent else path
            if not path.exists() or (anchor and f"# {anchor}" not in path.read_text(encoding="utf-8").lower()):
                missing.append((page.name, path.name, anchor))
    assert not missing


def test_every_flag_is_in_the_table():
    table = re.findall(r"^\| `(\w+)`[^|]*\|", TEXT, re.MULTILINE)
    assert {*FLAGS, NOT_AT_REST, FRAME_UNSTATED, MEDIUM_UNSTATED} <= set(table)
