"""The modules that a checkpoint carries. They import nothing else of the package."""

from .configuration_spectrafm import SpectraFMConfig
from .modeling_spectrafm import (
    SpectraFMForPrediction,
    SpectraFMModel,
    SpectraFMModelOutput,
    SpectraFMPredictionOutput,
    SpectraFMPreTrainedModel,
)
from .pipeline_spectrafm import StellarLabelsPipeline
from .tokenization_spectrafm import SpectraFMTokenizer, air_to_vacuum, vacuum_to_air


__all__ = [
    "SpectraFMConfig",
    "SpectraFMForPrediction",
    "SpectraFMModel",
    "SpectraFMModelOutput",
    "SpectraFMPreTrainedModel",
    "SpectraFMPredictionOutput",
    "SpectraFMTokenizer",
    "StellarLabelsPipeline",
    "air_to_vacuum",
    "vacuum_to_air",
]
