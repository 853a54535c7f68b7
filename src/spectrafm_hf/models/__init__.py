"""The modules that a checkpoint carries. They import nothing else of the package."""

from typing import TYPE_CHECKING

from ..lazy import names_for_types


if TYPE_CHECKING:
    from .configuration_emulator import SpectrumEmulatorConfig as SpectrumEmulatorConfig
    from .configuration_spectrafm import SpectraFMConfig as SpectraFMConfig
    from .modeling_emulator import SpectrumEmulator as SpectrumEmulator
    from .modeling_emulator import default_vmicro as default_vmicro
    from .modeling_spectrafm import SpectraFMForPrediction as SpectraFMForPrediction
    from .modeling_spectrafm import SpectraFMModel as SpectraFMModel
    from .modeling_spectrafm import SpectraFMModelOutput as SpectraFMModelOutput
    from .modeling_spectrafm import SpectraFMPredictionOutput as SpectraFMPredictionOutput
    from .modeling_spectrafm import SpectraFMPreTrainedModel as SpectraFMPreTrainedModel
    from .pipeline_spectrafm import StellarLabelsPipeline as StellarLabelsPipeline
    from .tokenization_spectrafm import SpectraFMTokenizer as SpectraFMTokenizer
    from .tokenization_spectrafm import air_to_vacuum as air_to_vacuum
    from .tokenization_spectrafm import vacuum_to_air as vacuum_to_air

__getattr__, __all__ = names_for_types(__name__, __file__)
