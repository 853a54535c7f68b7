# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""
SpectraFM, a Transformer for stellar spectra (Koblischke & Bovy 2024, arXiv 2411.04750), for Hugging Face.

Importing the package makes its classes known to transformers: `AutoConfig`, `AutoModel` (`SpectraFMModel`),
`AutoModelForTimeSeriesPrediction` (`SpectraFMForPrediction`), `AutoTokenizer`, `AutoProcessor` and
`AutoFeatureExtractor` (all three `SpectraFMTokenizer`), and `pipeline("stellar-labels")`.
"""

from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForTimeSeriesPrediction,
    AutoProcessor,
    AutoTokenizer,
)
from transformers.pipelines import PIPELINE_REGISTRY

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


AutoConfig.register(SpectraFMConfig.model_type, SpectraFMConfig)
AutoConfig.register(SpectrumEmulatorConfig.model_type, SpectrumEmulatorConfig)
AutoModel.register(SpectraFMConfig, SpectraFMModel)
AutoModel.register(SpectrumEmulatorConfig, SpectrumEmulator)
# The library has no class for "labels out of a spectrum"; this is the nearest: numbers out of a measured sequence.
AutoModelForTimeSeriesPrediction.register(SpectraFMConfig, SpectraFMForPrediction)
AutoTokenizer.register(SpectraFMConfig, SpectraFMTokenizer)
AutoProcessor.register(SpectraFMConfig, SpectraFMTokenizer)
AutoFeatureExtractor.register(SpectraFMConfig, SpectraFMTokenizer)
PIPELINE_REGISTRY.register_pipeline(
    "stellar-labels", pipeline_class=StellarLabelsPipeline, pt_model=AutoModelForTimeSeriesPrediction
)
SpectraFMConfig._pipeline_is_registered = True

#: The one place where it stands; pyproject.toml reads it, tests hold CITATION.cff and CHANGELOG.md to it.
__version__ = "0.1.0"

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
