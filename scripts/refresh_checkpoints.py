# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""
Save the bundled checkpoints again, with the code and the settings of today; their weights stay.

    python scripts/refresh_checkpoints.py

For developers, after a change of src/spectrafm_hf/models. Tests say when it is needed.
"""

import shutil
import sys
from pathlib import Path

from spectrafm_hf import SpectrumEmulator, bundled, bundled_names, load_checkpoint, save_checkpoint


def main() -> int:
    for name in bundled_names("spectrafm"):
        for code in Path(bundled(name)).glob("*.py"):
            code.unlink()  # of a module that has gone
        save_checkpoint(*load_checkpoint(name), bundled(name))
        print(name)
    for name in bundled_names("spectrafm-emulator"):
        folder = Path(bundled(name))
        models = Path(sys.modules[SpectrumEmulator.__module__].__file__ or "").parent
        for code in folder.glob("*.py"):
            shutil.copyfile(models / code.name, code)
        print(name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
