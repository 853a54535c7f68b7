"""The modules that a checkpoint carries. They import nothing else of the package."""

from typing import TYPE_CHECKING

from ..lazy import names_of


if TYPE_CHECKING:
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

_MODULES = {
    "configuration_emulator": ("SpectrumEmulatorConfig",),
    "configuration_spectrafm": ("SpectraFMConfig",),
    "modeling_emulator": ("SpectrumEmulator", "default_vmicro"),
    "modeling_spectrafm": (
        "SpectraFMForPrediction",
        "SpectraFMModel",
        "SpectraFMModelOutput",
        "SpectraFMPredictionOutput",
        "SpectraFMPreTrainedModel",
    ),
    "pipeline_spectrafm": ("StellarLabelsPipeline",),
    "tokenization_spectrafm": ("SpectraFMTokenizer", "air_to_vacuum", "vacuum_to_air"),
}
__getattr__ = names_of(__name__, _MODULES)

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
