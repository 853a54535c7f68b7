# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Makes the classes known to transformers."""

from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForTimeSeriesPrediction,
    AutoProcessor,
    AutoTokenizer,
)
from transformers.pipelines import PIPELINE_REGISTRY

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
