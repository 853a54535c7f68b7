# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""`spectrafm export`: a checkpoint as ONNX."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .arguments import MODELS, add_revision


def add(verbs: Any) -> None:
    export = verbs.add_parser(
        "export",
        help="export a checkpoint to ONNX",
        description="Export the network (tokens to labels) as one ONNX file, with dynamic numbers of stars, intervals "
        "and requests. The result is checked against PyTorch. The H-band refinement fit is not exported. Needs the "
        "extra `onnx`.",
    )
    export.add_argument("checkpoint", metavar="CHECKPOINT", help=MODELS)
    export.add_argument("--output", type=Path, required=True, metavar="FILE", help="a .onnx file")
    add_revision(export)
    export.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    from spectrafm_hf.hub.export import OPSET, export_onnx

    exported = export_onnx(arguments.checkpoint, arguments.output, revision=arguments.revision)
    print(
        f"written: {exported.path} (ONNX, opset {OPSET}); ONNX Runtime's answers to {exported.n_spectra} spectra "
        f"differ from PyTorch's by at most {exported.deviation:.1e} of their errors"
    )
    if exported.left_out:
        print(
            f"it answers {', '.join(exported.labels)} as the network does alone; the fit that refines them in the H "
            f"band is not in it, nor what that adds: {', '.join(exported.left_out)}"
        )
