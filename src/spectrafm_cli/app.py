# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""`spectrafm app`: the page in the browser."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .arguments import MODEL_HELP, positive


def add(verbs: Any) -> None:
    app = verbs.add_parser(
        "app",
        help="web page: upload a spectrum, get labels, best fit and sensitivity",
        description="Serve a web page. Upload a spectrum or select an example. The page shows labels with errors, "
        "the best fit, the sensitivity of each label and similar stars. Needs Gradio (extra `app`). Stop with Ctrl-C.",
    )
    app.add_argument("--model", metavar="NAME_OR_PATH", help=MODEL_HELP)
    app.add_argument(
        "--known",
        type=Path,
        metavar="FILE",
        help="output of `spectrafm embed`: reference stars for similarity (default: bundled stars)",
    )
    app.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, for this machine only")
    app.add_argument("--port", type=positive, default=7860, metavar="N", help="default: 7860")
    app.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    from spectrafm_hf.show.app import launch

    launch(arguments.model, arguments.known, arguments.host, arguments.port)
