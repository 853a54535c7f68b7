# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""The command line `spectrafm`, a module for each verb.

It stands beside the package, whose import takes seconds, and imports it where a verb needs it: `--help` and errors in
arguments are answered at once.
"""

from .commands import main


__all__ = ["main"]
