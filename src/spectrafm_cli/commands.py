# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""The command line, a module for each verb."""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import sys
from collections.abc import Sequence

from . import app, data, demo, embed, explain, export, finetune, formats, plot, predict, push, similar, spectrum
from .arguments import Parser
from .report import as_typed


#: In the order of `--help`.
VERBS = (demo, predict, spectrum, plot, explain, embed, similar, app, export, push, finetune, formats, data)


class _Version(argparse.Action):
    """The version action of argparse, with a late look-up."""

    def __call__(self, parser, namespace, values, option_string=None):
        print(importlib.metadata.version("spectrafm_hf"))
        parser.exit()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    The exit code: 0 if all is well, 1 if some of the input could not be used and the rest could, 2 if nothing was done
    (with one line on stderr that says why), 130 after Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that the terminal cannot write must not stop a run
            stream.reconfigure(errors="replace")
    arguments, unknown = _parser().parse_known_args(argv)
    if unknown:
        # Of argparse the program would say so, not the verb, whose options `--help` should show.
        name = " ".join(filter(None, (arguments.verb, getattr(arguments, "name", None))))
        Parser(prog=f"spectrafm {name}").error(f"unrecognized arguments: {' '.join(unknown)}")
    arguments.command_line = list(sys.argv[1:] if argv is None else argv)
    try:
        return arguments.run(arguments) or 0
    except BrokenPipeError:  # `| head` has seen enough
        sys.stdout = None  # type: ignore[assignment]  # nor is it written to at the end
        return 0
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        print(f"spectrafm {arguments.verb}: {as_typed(' '.join(str(error).split()))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"spectrafm {arguments.verb}: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="spectrafm", description="Stellar labels with errors, from spectra.")
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for verb in VERBS:
        verb.add(verbs)
    return parser
