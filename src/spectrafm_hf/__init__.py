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
from .lazy import names_for_types


#: The one place where it stands; pyproject.toml reads it, tests hold CITATION.cff and CHANGELOG.md to it.
__version__ = "0.2.0"

if TYPE_CHECKING:
    from .checkpoints import bundled as bundled
    from .checkpoints import bundled_names as bundled_names
    from .checkpoints import load_checkpoint as load_checkpoint
    from .checkpoints import save_checkpoint as save_checkpoint
    from .models import SpectraFMConfig as SpectraFMConfig
    from .models import SpectraFMForPrediction as SpectraFMForPrediction
    from .models import SpectraFMModel as SpectraFMModel
    from .models import SpectraFMTokenizer as SpectraFMTokenizer
    from .models import SpectrumEmulator as SpectrumEmulator
    from .models import SpectrumEmulatorConfig as SpectrumEmulatorConfig
    from .models import StellarLabelsPipeline as StellarLabelsPipeline

__getattr__, __all__ = names_for_types(__name__, __file__)

moved.redirect()

# The command line imports torch and transformers for the verbs that need them. Everybody else expects the Auto classes
# to know ours.
if "spectrafm_cli" not in sys.modules:
    from . import auto  # noqa: F401
