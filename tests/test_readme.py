"""The README: its commands come first, its Python runs, and the files that it names are there."""

import re
from pathlib import Path

import spectrafm_cli


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_first_two_commands_install_and_run_the_demo_and_the_tests():
    first, second = (block.strip() for block in blocks("bash")[:2])
    assert "\n" not in first + second
    assert first.startswith("python3 -m venv") and first.endswith("spectrafm demo")
    assert second.startswith("python3 -m venv") and second.endswith("pytest")


def test_the_python_of_the_readme_runs_from_top_to_bottom():
    names: dict = {}
    for block in blocks("python"):
        exec(block, names)
    assert names["outputs"].values.shape == (1, 4)
    assert (names["outputs"].errors > 0).all()


def test_the_commands_of_the_readme_are_known_to_the_command_line():
    verbs = set(re.findall(r"spectrafm (\w+)", "\n".join(blocks("bash"))))
    help_text = spectrafm_cli._parser().format_help()
    assert verbs and all(verb in help_text for verb in verbs)


def test_the_files_that_the_readme_names_exist():
    named = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    named += re.findall(r"\b(?:scripts|model_cards)/[\w./-]+\.\w+", README)
    missing = [name for name in named if not (ROOT / name).exists()]
    assert named and not missing
