# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""The documentation: `pip install ".[docs]" && sphinx-build -W docs docs/_build`."""

import argparse
import os
import re
from pathlib import Path

import spectrafm_hf
from spectrafm_cli.commands import _parser


project = "spectrafm_hf"
author = "The spectrafm_hf authors"
release = version = spectrafm_hf.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "jupyter_execute", "**.ipynb_checkpoints"]
# Attributes of several classes have one name.
suppress_warnings = ["mystnb.unknown_mime_type", "ref.python"]

html_theme = "furo"
html_title = f"spectrafm_hf {release}"

# The notebooks are kept with their outputs; a test runs them.
nb_execution_mode = "off"
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

autosummary_generate = True
autodoc_typehints = "none"
autodoc_default_options = {"members": True, "show-inheritance": False}
napoleon_google_docstring = False
napoleon_use_rtype = False


def _options(parser: argparse.ArgumentParser) -> str:
    return f"```text\n{parser.format_help().strip()}\n```\n"


def _write_verbs(folder: Path) -> None:
    """What `--help` says of every verb, as one page."""
    (verbs,) = (action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction))
    parts = ["# Every verb\n", "What `spectrafm VERB --help` says.\n"]
    for name, parser in verbs.choices.items():
        parts += [f"## spectrafm {name}\n", _options(parser)]
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for inner, own in action.choices.items():
                    parts += [f"### spectrafm {name} {inner}\n", _options(own)]
    (folder / "verbs.md").write_text("\n".join(parts), encoding="utf-8")


def _read(app, name: str, source: list[str]) -> None:
    """The README begins the first page; a link to a page elsewhere in the repository becomes its path."""
    folder = Path(app.srcdir)
    text = source[0]
    if name == "index":
        readme = (folder.parent / "README.md").read_text(encoding="utf-8")
        readme = re.sub(r"\]\((?!docs/|https?:)", "](../", readme).replace("](docs/", "](")
        text = f"{readme}\n{text}"
    source[0] = re.sub(r"\[([^\]]+)\]\(\.\./([^)]+\.(?:md|cff|ipynb))\)", r"\1 (`\2`)", text)


def setup(app):
    # argparse breaks lines at the width of the terminal.
    os.environ["COLUMNS"] = "100"
    _write_verbs(Path(app.srcdir))
    app.connect("source-read", _read)
