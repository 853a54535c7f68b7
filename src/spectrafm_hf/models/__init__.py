"""The modules that a checkpoint carries. They import nothing else of the package."""

from .configuration_emulator import SpectrumEmulatorConfig
from .configuration_spectrafm import SpectraFMConfig
from .modeling_emulator import SpectrumEmulator, default_vmicro
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
    "SpectrumEmulator",
    "SpectrumEmulatorConfig",
    "StellarLabelsPipeline",
    "air_to_vacuum",
    "default_vmicro",
    "vacuum_to_air",
]
