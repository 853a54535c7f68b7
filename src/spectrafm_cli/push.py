# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""`spectrafm push`: a checkpoint with its card, on the hub."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from .arguments import pushing


def add(verbs: Any) -> None:
    push = verbs.add_parser(
        "push",
        parents=[pushing()],
        help="upload a checkpoint with its card to the Hugging Face hub",
        description="Upload a checkpoint in one commit: model, tokenizer, code, card, recipe and evaluation. Refused "
        "if card or evaluation are missing or belong to other weights or settings "
        "(scripts/generate/make_model_card.py writes both).",
    )
    push.add_argument("path", metavar="PATH", help="a folder, or a bundled checkpoint")
    push.add_argument("repo", metavar="REPO", help="OWNER/NAME of the model on the hub")
    push.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    from spectrafm_hf.hub.upload import checkpoint_upload, dataset_upload, preview, push

    prepare = checkpoint_upload if arguments.verb == "push" else dataset_upload
    upload = prepare(arguments.path, arguments.repo)
    settings = {"revision": arguments.revision, "free_text": arguments.free_text}
    if arguments.dry_run:
        try:
            upload = preview(upload, **settings)
        except OSError as error:
            print(f"without the free texts that are on the hub: {' '.join(str(error).split())}", file=sys.stderr)
        print(upload.describe())
    else:
        print(push(upload, private=arguments.private, message=arguments.message, **settings))
