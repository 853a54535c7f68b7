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
        help="a page in the browser: upload a spectrum, see its labels and what the model looks at",
        description="Serve a page on which a spectrum can be uploaded, or an example picked: labels with errors, "
        "masked pixels, what the model looks at, and the nearest known stars. Needs Gradio, the extra `app`. Ctrl-C "
        "ends it.",
    )
    app.add_argument("--model", metavar="NAME_OR_PATH", help=MODEL_HELP)
    app.add_argument(
        "--known",
        type=Path,
        metavar="FILE",
        help="what `spectrafm embed` wrote: stars to find the nearest among (default: those of the package)",
    )
    app.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, for this machine only")
    app.add_argument("--port", type=positive, default=7860, metavar="N", help="default: 7860")
    app.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    from spectrafm_hf.show.app import launch

    launch(arguments.model, arguments.known, arguments.host, arguments.port)
