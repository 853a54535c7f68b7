# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""
SpectraFM, a Transformer for stellar spectra (Koblischke & Bovy 2024, arXiv 2411.04750), for Hugging Face.

Importing the package makes its classes known to transformers: `AutoConfig`, `AutoModel` (`SpectraFMModel`),
`AutoModelForTimeSeriesPrediction` (`SpectraFMForPrediction`), `AutoTokenizer`, `AutoProcessor` and
`AutoFeatureExtractor` (all three `SpectraFMTokenizer`), and `pipeline("stellar-labels")`.
"""

import sys
from typing import TYPE_CHECKING

from . import moved
from .lazy import names_of


#: The one place where it stands; pyproject.toml reads it, tests hold CITATION.cff and CHANGELOG.md to it.
__version__ = "0.2.0"

if TYPE_CHECKING:
    from .checkpoints import bundled, bundled_names, load_checkpoint, save_checkpoint
    from .models import (
        SpectraFMConfig,
        SpectraFMForPrediction,
        SpectraFMModel,
        SpectraFMTokenizer,
        SpectrumEmulator,
        SpectrumEmulatorConfig,
        StellarLabelsPipeline,
    )

__getattr__ = names_of(
    __name__,
    {
        "checkpoints": ("bundled", "bundled_names", "load_checkpoint", "save_checkpoint"),
        "models": (
            "SpectraFMConfig",
            "SpectraFMForPrediction",
            "SpectraFMModel",
            "SpectraFMTokenizer",
            "SpectrumEmulator",
            "SpectrumEmulatorConfig",
            "StellarLabelsPipeline",
        ),
    },
)

moved.redirect()

# The command line imports torch and transformers for the verbs that need them. Everybody else expects the Auto classes
# to know ours.
if "spectrafm_cli" not in sys.modules:
    from . import auto  # noqa: F401

__all__ = [
    "SpectraFMConfig",
    "SpectraFMForPrediction",
    "SpectraFMModel",
    "SpectraFMTokenizer",
    "SpectrumEmulator",
    "SpectrumEmulatorConfig",
    "StellarLabelsPipeline",
    "bundled",
    "bundled_names",
    "load_checkpoint",
    "save_checkpoint",
]
