# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""
SpectraFM, a Transformer for stellar spectra (Koblischke & Bovy 2024, arXiv 2411.04750).

A star is a set of tokens: pieces of its spectrum, and scalars such as a colour or a known abundance. An encoder reads
them. A decoder predicts any number of quantities ("requests": a stellar label, or the flux at a wavelength) and
answers each, independently of the others, with a mean and a log-variance.

The file reads in the order in which the data flow: wavelength encoding, embeddings, attention, layers, encoder,
decoder, model, prediction.
"""

import fnmatch
import functools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, ModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .configuration_spectrafm import FIRST_LABEL_ID, FLUX_ID, PADDING_ID, SpectraFMConfig
from .correction_spectrafm import SpectraFMCorrection, SpectraFMPixels, mixed
from .evidence_spectrafm import (
    InFullPrecision,
    SpectraFMMemberBlock,
    SpectraFMMemberHead,
    SpectraFMMemberLinear,
    SpectraFMRung,
)
from .refinement_spectrafm import Refined, SpectraFMRefinement, combinations
from .spectrum_spectrafm import whole_spectra


@dataclass
class SpectraFMModelOutput(ModelOutput):
    """
    Output of [`SpectraFMModel`]. B stars, R requests, T tokens (spectrum and scalars).

    Attributes
    ----------
    last_hidden_state : torch.FloatTensor of shape (B, R, hidden_size)
        The decoder's answer to each request.
    decoder_hidden_states : tuple of (B, R, hidden_size), on request
    cross_attentions : tuple of (B, heads, R, T + 1), on request
        The last key is the learnt one.
    encoder_last_hidden_state : torch.FloatTensor of shape (B, T, hidden_size)
    encoder_hidden_states : tuple of (B, T, hidden_size), on request
    encoder_attentions : tuple of (B, heads, T, T + 1), on request
    rung_seen : torch.BoolTensor of shape (B, rungs)
        For `token_embedding="basis"`: which rungs a star has intervals of. `last_hidden_state` is then (B, rungs,
        num_members, hidden_size), zero where a rung was not seen.
    cost : torch.FloatTensor of shape (B, rungs)
        For `token_embedding="basis"`: see [`SpectraFMCompletion`].
    unknown : torch.FloatTensor of shape (B, rungs)
        For `token_embedding="basis"`: mean of ln(1 - reliability) over all coefficients of a rung.
    """

    last_hidden_state: torch.Tensor | None = None
    decoder_hidden_states: tuple[torch.Tensor, ...] | None = None
    cross_attentions: tuple[torch.Tensor, ...] | None = None
    encoder_last_hidden_state: torch.Tensor | None = None
    encoder_hidden_states: tuple[torch.Tensor, ...] | None = None
    encoder_attentions: tuple[torch.Tensor, ...] | None = None
    rung_seen: torch.Tensor | None = None
    cost: torch.Tensor | None = None
    unknown: torch.Tensor | None = None


# Names of version 0.1.0, readable by `outputs["values"]`, `outputs["errors"]` and `outputs.errors` for one version;
# `outputs.values` is the method of dictionaries again, which the field had hidden.
OLD_NAMES = {"values": "predictions", "errors": "prediction_errors"}


@dataclass
class SpectraFMPredictionOutput(ModelOutput):
    """
    Output of [`SpectraFMForPrediction`]. B stars, R requests.

    Attributes
    ----------
    loss : torch.FloatTensor of shape (), if labels were given
    mean, log_variance : torch.FloatTensor of shape (B, R)
        In standardised units.
    predictions, prediction_errors : torch.FloatTensor of shape (B, R)
        The same in physical units; errors are one sigma. In version 0.1.0 they were called `values` and `errors`, by
        which they are still found, with a warning: `outputs["values"]`, `outputs["errors"]`, `outputs.errors`.
    rung_seen, cost
        With `token_embedding="basis"`, as in [`SpectraFMModelOutput`].
    refined : Refined
        Of a model with a star model, where the spectra have some of its intervals: what the fit found.
    decoder_hidden_states, cross_attentions, encoder_last_hidden_state, encoder_hidden_states, encoder_attentions
        As in [`SpectraFMModelOutput`].
    """

    loss: torch.Tensor | None = None
    mean: torch.Tensor | None = None
    log_variance: torch.Tensor | None = None
    predictions: torch.Tensor | None = None
    prediction_errors: torch.Tensor | None = None
    rung_seen: torch.Tensor | None = None
    cost: torch.Tensor | None = None
    unknown: torch.Tensor | None = None
    refined: Refined | None = None
    decoder_hidden_states: tuple[torch.Tensor, ...] | None = None
    cross_attentions: tuple[torch.Tensor, ...] | None = None
    encoder_last_hidden_state: torch.Tensor | None = None
    encoder_hidden_states: tuple[torch.Tensor, ...] | None = None
    encoder_attentions: tuple[torch.Tensor, ...] | None = None

    def __getitem__(self, key):
        if isinstance(key, str) and key in OLD_NAMES:
            warnings.warn(f"outputs[{key!r}] is called {OLD_NAMES[key]!r} now", FutureWarning, stacklevel=2)
            key = OLD_NAMES[key]
        if key == "logits":
            raise KeyError(
                "logits: there are none, as answers are numbers and no classes; label_smoothing_factor has to be 0"
            )
        return super().__getitem__(key)

    @property
    def errors(self):
        """See `OLD_NAMES`."""
        warnings.warn("outputs.errors is called prediction_errors now", FutureWarning, stacklevel=2)
        return self.prediction_errors


class SpectraFMWavelengthEncoding(nn.Module):
    """The paper's encoding: sines and cosines of 1000 (wavelength - 15000 A) / 2000 A times 10000^(-2i/d)."""

    def __init__(self, config: SpectraFMConfig):
        super().__init__()
        self.hidden_size = config.hidden_size

    def forward(self, wavelength: torch.Tensor) -> torch.Tensor:
        """(B, N) Angstrom -> (B, N, hidden_size), float32."""
        index = torch.arange(0, self.hidden_size, 2, device=wavelength.device, dtype=torch.float32)
        frequency = torch.exp(index * (-math.log(10000.0) / self.hidden_size))
        angle = (wavelength.float()[..., None] - 15000.0) / 2000.0 * 1000.0 * frequency
        return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-2)


class SpectraFMValueEmbedding(InFullPrecision):
    """
    The paper's embedding of a number: GELU(E[id] * value + b[id]), with one row of E and b for each quantity.

    A request for the quantity is E[id] alone. Always in float32, because measurements have more digits than half
    precision.
    """

    def __init__(self, config: SpectraFMConfig):
        super().__init__()
        rows = FIRST_LABEL_ID + len(config.label_names)
        self.weight = nn.Embedding(rows, config.hidden_size, padding_idx=PADDING_ID)
        self.bias = nn.Embedding(rows, config.hidden_size, padding_idx=PADDING_ID)
        self.activation_fn = ACT2FN[config.hidden_act]

    def forward(self, ids: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """(B, N) ids, (B, N) standardised values -> (B, N, hidden_size)."""
        return self.activation_fn(self.weight(ids) * values.float()[..., None] + self.bias(ids))


class SpectraFMEmbeddings(nn.Module):
    """Tokens of the encoder (spectrum, then scalars) and of the decoder (requests)."""

    def __init__(self, config: SpectraFMConfig):
        super().__init__()
        self.value_embedding = SpectraFMValueEmbedding(config)
        self.wavelength_encoding = SpectraFMWavelengthEncoding(config)

    def spectrum(self, flux: torch.Tensor, wavelength: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """(B, T) each -> (B, T, hidden_size)."""
        ids = torch.where(attention_mask, FLUX_ID, PADDING_ID)
        tokens = self.value_embedding(ids, torch.where(attention_mask, flux, 0.0))
        return tokens + self.wavelength_encoding(wavelength)

    def requests(self, ids: torch.Tensor, wavelength: torch.Tensor | None) -> torch.Tensor:
        """(B, R) ids; wavelengths count where the request is for flux -> (B, R, hidden_size)."""
        queries = self.value_embedding.weight(ids)
        if wavelength is None:
            return queries
        return queries + torch.where((ids == FLUX_ID)[..., None], self.wavelength_encoding(wavelength), 0.0)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, heads, N, head_dim) -> (B, N, heads, head_dim) and the attention weights (B, heads, N, keys)."""
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class SpectraFMAttention(nn.Module):
    """Multi-head attention of `hidden_states` to `key_value_states` (to themselves in the encoder)."""

    def __init__(self, config: SpectraFMConfig, num_heads: int):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // num_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = False
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)
        # An additional, learnt key and value.
        self.extra_key = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.extra_value = nn.Parameter(torch.zeros(1, 1, config.hidden_size))

    def forward(
        self,
        hidden_states: torch.Tensor,
        key_value_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        batch_size, length, hidden_size = hidden_states.shape
        key = torch.cat((self.k_proj(key_value_states), self.extra_key.expand(batch_size, -1, -1)), dim=1)
        value = torch.cat((self.v_proj(key_value_states), self.extra_value.expand(batch_size, -1, -1)), dim=1)
        heads = (batch_size, -1, hidden_size // self.head_dim, self.head_dim)

        implementation = self.config._attn_implementation
        if _is_flash(implementation) and attention_mask is not None and attention_mask.ndim == 4:
            implementation = "sdpa"
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        output, weights = attention(
            self,
            self.q_proj(hidden_states).view(heads).transpose(1, 2),
            key.view(heads).transpose(1, 2),
            value.view(heads).transpose(1, 2),
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(output.reshape(batch_size, length, hidden_size)), weights


def dtype_of_layers(layers: nn.ModuleList, default: torch.dtype) -> torch.dtype:
    """Dtype of their weights, or of their scales if the weights are integers."""
    return next((weight.dtype for weight in layers.parameters() if weight.is_floating_point()), default)


def _is_flash(implementation: str | None) -> bool:
    return implementation is not None and "flash" in implementation


def make_attention_mask(config: SpectraFMConfig, hidden_states, key_value_states, attention_mask):
    """(B, keys) boolean, or None -> the mask that the attention implementation needs, with the extra key."""
    if attention_mask is not None:
        attention_mask = nn.functional.pad(attention_mask.bool(), (0, 1), value=True)
        if _is_flash(config._attn_implementation):
            # The flash kernels drop padding from both keys and queries; here there is one key more than queries.
            return attention_mask[:, None, None, :].expand(-1, 1, hidden_states.shape[1], -1)
    return create_bidirectional_mask(
        config=config,
        inputs_embeds=hidden_states,
        attention_mask=attention_mask,
        encoder_hidden_states=key_value_states,
    )


class SpectraFMMLP(nn.Module):
    def __init__(self, config: SpectraFMConfig, ffn_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, ffn_dim)
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(ffn_dim, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation_fn(self.fc1(hidden_states)))


class SpectraFMLayer(GradientCheckpointingLayer):
    """Attention and feed-forward, each with a residual and a LayerNorm after it."""

    def __init__(self, config: SpectraFMConfig, num_heads: int, ffn_dim: int):
        super().__init__()
        self.attention = SpectraFMAttention(config, num_heads)
        self.attention_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = SpectraFMMLP(config, ffn_dim)
        self.mlp_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        key_value_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """(B, N, hidden_size) -> the same; attends to itself where `key_value_states` is None."""
        keys = hidden_states if key_value_states is None else key_value_states
        attended, _ = self.attention(hidden_states, keys, attention_mask, **kwargs)
        hidden_states = self.attention_layer_norm(hidden_states + self.dropout(attended))
        return self.mlp_layer_norm(hidden_states + self.dropout(self.mlp(hidden_states)))


class SpectraFMPreTrainedModel(PreTrainedModel):
    """Initialisation, and what the models support."""

    config: SpectraFMConfig
    config_class = SpectraFMConfig
    base_model_prefix = "model"
    main_input_name = "flux"
    input_modalities = ["time"]
    supports_gradient_checkpointing = True
    # The Trainer divides the sum of the losses by the number of labels in all batches of a step.
    accepts_loss_kwargs = True
    _no_split_modules = [
        "SpectraFMEmbeddings",
        "SpectraFMLayer",
        "SpectraFMRung",
    ]
    # Linear algebra, the first layer and the read-out need full precision: labels are known to one part in 1,000.
    _full_precision = (
        *("completion", "rungs.*.embedding", "value_embedding", "means", "log_variances", "start", "refinement"),
        *("corrections", "readout"),
    )
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @property
    def device(self) -> torch.device:
        """Device of the inputs: that of the weights, or that on which offloaded weights are used."""
        place = getattr(getattr(self, "_hf_hook", None), "execution_device", None)
        return super().device if place is None else torch.device(place)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights that are not kept in float32."""
        full = {
            id(weight) for part in self.modules() if isinstance(part, InFullPrecision) for weight in part.parameters()
        }
        return next((w.dtype for w in self.parameters() if w.is_floating_point() and id(w) not in full), torch.float32)

    def post_init(self):
        """As in the base class, after restoring full precision where it is needed, whatever the default dtype."""
        names = list(self.state_dict())
        for module in self.modules():
            if isinstance(module, InFullPrecision):
                module.float()
        self._keep_in_fp32_modules_strict = {
            part for part in self._full_precision if any(fnmatch.fnmatch(name, f"*{part}.*") for name in names)
        }
        # Quantisation skips this list; transformers wants no entry in both.
        self._keep_in_fp32_modules = {f"{part}.*" for part in self._keep_in_fp32_modules_strict}
        super().post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, InFullPrecision):
            module.reset()
        if isinstance(module, SpectraFMAttention):
            init.normal_(module.extra_key, std=self.config.initializer_range)
            init.normal_(module.extra_value, std=self.config.initializer_range)
        elif isinstance(module, SpectraFMMemberLinear):
            init.normal_(module.weight, std=module.weight.shape[1] ** -0.5)
            init.zeros_(module.bias)
        elif isinstance(module, SpectraFMMemberBlock):
            # At first, a block changes its input little.
            init.normal_(module.fc2.weight, std=self.config.initializer_range)
        elif isinstance(module, SpectraFMMemberHead):
            init.normal_(module.weight, std=0.5 * self.config.initializer_range)
            init.zeros_(module.bias)


class SpectraFMEncoder(SpectraFMPreTrainedModel):
    """Layers in which the tokens of a star attend to each other."""

    _can_record_outputs = {"hidden_states": SpectraFMLayer, "attentions": SpectraFMAttention}

    def __init__(self, config: SpectraFMConfig):
        super().__init__(config)
        sizes = zip(config.encoder_attention_heads, config.encoder_ffn_dim, strict=True)
        self.layers = nn.ModuleList(SpectraFMLayer(config, *size) for size in sizes)
        self.gradient_checkpointing = False
        self.post_init()

    @capture_outputs
    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutput:
        """Tokens (B, T, hidden_size) -> the same; `attention_mask` (B, T) is true where one counts."""
        hidden_states = hidden_states.to(dtype_of_layers(self.layers, hidden_states.dtype))
        mask = make_attention_mask(self.config, hidden_states, hidden_states, attention_mask)
        for layer in self.layers:
            hidden_states = layer(hidden_states, None, mask, **kwargs)
        return BaseModelOutput(last_hidden_state=hidden_states)


class SpectraFMDecoder(SpectraFMPreTrainedModel):
    """Layers in which requests attend to the tokens of a star, and not to each other."""

    _can_record_outputs = {"hidden_states": SpectraFMLayer, "attentions": SpectraFMAttention}

    def __init__(self, config: SpectraFMConfig):
        super().__init__(config)
        sizes = zip(config.decoder_attention_heads, config.decoder_ffn_dim, strict=True)
        self.layers = nn.ModuleList(SpectraFMLayer(config, *size) for size in sizes)
        self.gradient_checkpointing = False
        self.post_init()

    @capture_outputs
    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.Tensor,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutput:
        """Requests (B, R, hidden_size), tokens (B, T, hidden_size) and which of them count (B, T) -> as requests."""
        hidden_states = hidden_states.to(dtype_of_layers(self.layers, hidden_states.dtype))
        mask = make_attention_mask(self.config, hidden_states, encoder_hidden_states, encoder_attention_mask)
        for layer in self.layers:
            hidden_states = layer(hidden_states, encoder_hidden_states, mask, **kwargs)
        return BaseModelOutput(last_hidden_state=hidden_states)


def without_autocast(method: Callable) -> Callable:
    """A method of a model whose products stay in the dtype of its arguments."""

    @functools.wraps(method)
    def in_full(self, *args):
        device = next(value.device for value in args if isinstance(value, torch.Tensor))  # offloaded weights have none
        with torch.autocast(device.type, enabled=False):
            return method(self, *args)

    return in_full


def standardisation(config: SpectraFMConfig, ids: torch.Tensor, flux_center=None, flux_scale=None):
    """
    Centre and scale of the quantities `ids`, float32, in the shape of `ids`.

    They are read from the config at each call, so that the dtype of the model cannot round them. Flux stays
    standardised unless `flux_center` and `flux_scale` are set.
    """
    table = torch.tensor(
        [[0.0, 1.0]] * FIRST_LABEL_ID
        + [[float(c), float(s)] for c, s in zip(config.label_centers, config.label_scales, strict=True)],
        device=ids.device,
    )
    center, scale = table[ids].unbind(-1)
    if flux_center is not None:
        is_flux = ids == FLUX_ID
        center = torch.where(is_flux, flux_center.float(), center)
        scale = torch.where(is_flux, flux_scale.float(), scale)
    return center, scale


def log_error_factors(config: SpectraFMConfig, ids: torch.Tensor) -> torch.Tensor:
    """ln of the factors by which the errors of the quantities `ids` are multiplied, float32, in the shape of `ids`."""
    return torch.tensor(
        [1.0] * FIRST_LABEL_ID + [float(factor) for factor in config.label_error_factors], device=ids.device
    ).log()[ids]


def check_shapes(shape, **tensors: torch.Tensor | None):
    """`ValueError` for a tensor of another shape than `shape`, or for wavelengths that half precision has rounded."""
    for field, tensor in tensors.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{field}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}")
        if tensor is not None and "wavelength" in field and tensor.dtype in (torch.bfloat16, torch.float16):
            raise ValueError(f"{field}: expected float32 or better, whatever the model's dtype, got {tensor.dtype}")


def check_together(**tensors: torch.Tensor | None):
    """Raise ValueError if only some of the tensors are set."""
    missing = [field for field, tensor in tensors.items() if tensor is None]
    if 0 < len(missing) < len(tensors):
        raise ValueError(f"{missing[0]}: expected a tensor, as {', '.join(tensors)} go together, got None")


class SpectraFMModel(SpectraFMPreTrainedModel):
    """
    Embeddings, encoder and decoder, without a head: one hidden state for each request. For models on evidence, one for
    each member and each instrument that observed the star.

    Examples
    --------
    >>> import numpy as np
    >>> import torch
    >>> from spectrafm_hf import SpectraFMModel, SpectraFMTokenizer, SpectrumEmulator, bundled
    >>> emulator = SpectrumEmulator.from_pretrained(bundled("emulator-hband"))
    >>> wavelength, flux = emulator.synthesize(teff=4800.0, logg=2.5, fe_h=-0.2)  # Angstrom in vacuum, at rest
    >>> tokenizer = SpectraFMTokenizer.from_pretrained(bundled("spectrafm-base"))
    >>> model = SpectraFMModel.from_pretrained(bundled("spectrafm-base")).eval()
    >>> with torch.no_grad():
    ...     outputs = model(**tokenizer(wavelength, flux, np.full_like(flux, 0.01)))
    >>> outputs.last_hidden_state.shape  # stars, rungs, members, hidden_size
    torch.Size([1, 4, 8, 192])
    >>> outputs.rung_seen.tolist()
    [[False, True, False, False]]
    """

    def __init__(self, config: SpectraFMConfig):
        super().__init__(config)
        if config.token_embedding == "basis":
            self.rungs = nn.ModuleList(SpectraFMRung(config, rung) for rung in range(len(config.rung_intervals)))
        else:
            self.embeddings = SpectraFMEmbeddings(config)
            self.encoder = SpectraFMEncoder(config)
            self.decoder = SpectraFMDecoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.rungs if self.config.token_embedding == "basis" else self.embeddings.value_embedding.weight

    def set_input_embeddings(self, value: nn.Module):
        self.embeddings.value_embedding.weight = value  # type: ignore[assignment]

    def resize_token_embeddings(self, *args, **kwargs):
        raise NotImplementedError("The vocabulary of SpectraFM is its labels: use add_label(name, ...).")

    @torch.no_grad()
    def add_label(self, name: str, unit: str = "", center: float = 0.0, scale: float = 1.0):
        """
        Add a stellar label or scalar to the vocabulary. Predictions of other labels do not change, in a model on
        evidence up to rounding.

        Parameters
        ----------
        name, unit : str
            Its name (APOGEE's column in lower case where there is one) and unit.
        center, scale : float
            Its mean and spread over the training set; values are standardised with them.

        Raises
        ------
        ValueError
            If the name is taken, the centre is not finite or the scale not positive.
        """
        if name in self.config.label_names or name == "flux":
            raise ValueError(f"name: expected a name not yet in {['flux', *self.config.label_names]}, got {name!r}")
        if not math.isfinite(center):
            raise ValueError(f"center: expected a finite number, got {center!r}")
        if not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"scale: expected a positive number, got {scale!r}")
        for field, entry in (("names", name), ("units", unit), ("centers", center), ("scales", scale)):
            field = f"label_{field}"
            setattr(self.config, field, [*getattr(self.config, field), entry])
        self.config.name_labels()
        if self.config.label_error_factors:
            self.config.label_error_factors = [*self.config.label_error_factors, 1.0]
        if self.config.network_labels:
            self.config.network_labels = [*self.config.network_labels, name]
        if self.config.token_embedding == "basis":  # whose labels are rows of the heads
            return
        table = self.embeddings.value_embedding
        for part in ("weight", "bias"):
            old: nn.Embedding = getattr(table, part)
            new = nn.Embedding(
                old.num_embeddings + 1,
                old.embedding_dim,
                padding_idx=old.padding_idx,
                device=old.weight.device,
                dtype=old.weight.dtype,
            )
            self._init_weights(new)
            new.weight[:-1] = old.weight
            new.weight.requires_grad_(old.weight.requires_grad)
            setattr(table, part, new)

    def encode(
        self,
        flux: torch.Tensor,
        wavelength: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        scalar_ids: torch.Tensor | None = None,
        scalar_values: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[BaseModelOutput, torch.Tensor]:
        """The encoder's output, and the (B, T) mask of its tokens. Arguments as in `forward`."""
        if flux.ndim != 2:
            raise ValueError(f"flux: expected shape (batch, tokens), got {tuple(flux.shape)}")
        check_shapes(flux.shape, wavelength=wavelength, attention_mask=attention_mask)
        check_together(scalar_ids=scalar_ids, scalar_values=scalar_values)
        counts = torch.ones_like(flux, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        tokens = self.embeddings.spectrum(flux, wavelength, counts)
        if scalar_ids is not None and scalar_values is not None:
            scalars, known = self._scalars(scalar_ids, scalar_values, flux.shape[0])
            tokens, counts = torch.cat((tokens, scalars), dim=1), torch.cat((counts, known), dim=1)
        return self.encoder(tokens, counts, **{**kwargs, "return_dict": True}), counts

    @can_return_tuple
    def forward(
        self,
        flux: torch.Tensor | None = None,
        wavelength: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        *,
        scalar_ids: torch.Tensor | None = None,
        scalar_values: torch.Tensor | None = None,
        request_ids: torch.Tensor | None = None,
        request_wavelength: torch.Tensor | None = None,
        coefficients: torch.Tensor | None = None,
        reliability: torch.Tensor | None = None,
        interval_ids: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SpectraFMModelOutput:
        """
        All of this comes from the tokenizer. B stars, T spectrum tokens, S scalars, R requests.

        Parameters
        ----------
        flux, wavelength : torch.FloatTensor of shape (B, T)
            For `token_embedding="value"`: standardised flux of each pixel, and its wavelength in Angstrom, vacuum, rest
            frame, float32 or better.
        attention_mask : torch.BoolTensor of shape (B, T), optional
            True for real tokens; by default all.
        scalar_ids : torch.LongTensor of shape (B, S), optional
            Rows of the vocabulary; 0 is padding.
        scalar_values : torch.FloatTensor of shape (B, S), optional
            In physical units.
        request_ids : torch.LongTensor of shape (B, R), optional
            Rows of the vocabulary; 0 is padding. By default all labels.
        request_wavelength : torch.FloatTensor of shape (B, R), optional
            Wavelengths of the requested flux; read only for requests of flux.
        coefficients, reliability : torch.FloatTensor of shape (B, T, num_coefficients)
            For `token_embedding="basis"`, instead of flux and wavelength: see [`Evidence`].
        interval_ids : torch.LongTensor of shape (B, T)
            Interval of each token; the same for all stars, although some may have no pixels in it.

        Raises
        ------
        ValueError
            If an argument has the wrong shape, or wavelengths are in half precision.
        """
        if self.config.token_embedding == "basis":
            if coefficients is None or reliability is None or interval_ids is None:
                raise ValueError("coefficients: expected them with reliability and interval_ids, got None")
            if scalar_ids is not None and bool((scalar_ids != PADDING_ID).any()):
                raise ValueError("scalar_ids: expected none, as this model was trained on spectra alone, got some")
            return self._from_evidence(coefficients, reliability, interval_ids, attention_mask)
        if flux is None or wavelength is None:
            raise ValueError("flux: expected it with wavelength, got None")
        encoder_outputs, attention_mask = self.encode(
            flux, wavelength, attention_mask, scalar_ids=scalar_ids, scalar_values=scalar_values, **kwargs
        )
        if request_ids is None:
            request_ids = self.all_labels(flux)
        check_shapes(
            (flux.shape[0], *request_ids.shape[-1:]), request_ids=request_ids, request_wavelength=request_wavelength
        )
        queries = self.embeddings.requests(request_ids, request_wavelength)
        decoder_outputs = self.decoder(
            queries, encoder_outputs.last_hidden_state, attention_mask, **{**kwargs, "return_dict": True}
        )
        return SpectraFMModelOutput(
            last_hidden_state=decoder_outputs.last_hidden_state,
            decoder_hidden_states=decoder_outputs.hidden_states,
            cross_attentions=decoder_outputs.attentions,
            encoder_last_hidden_state=encoder_outputs.last_hidden_state,
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
        )

    def _from_evidence(
        self,
        coefficients: torch.Tensor,
        reliability: torch.Tensor,
        interval_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
    ) -> SpectraFMModelOutput:
        """`forward` for `token_embedding="basis"`."""
        config = self.config
        if coefficients.ndim != 3 or coefficients.shape[-1] != config.num_coefficients:
            raise ValueError(
                f"coefficients: expected shape (batch, tokens, num_coefficients={config.num_coefficients}), "
                f"got {tuple(coefficients.shape)}"
            )
        check_shapes(coefficients.shape, reliability=reliability)
        check_shapes(coefficients.shape[:2], interval_ids=interval_ids, attention_mask=attention_mask)
        if not torch.compiler.is_exporting() and bool((interval_ids != interval_ids[:1]).any()):
            raise ValueError(
                "interval_ids: expected the same for all stars (tokenize the spectra of a batch in one call), got "
                "others"
            )
        seen = (reliability > 0).any(dim=-1)
        if attention_mask is not None:
            seen = seen & attention_mask.bool()
        coefficients = torch.where(seen[..., None], coefficients, 0.0)
        reliability = torch.where(seen[..., None], reliability, 0.0)
        if torch.compiler.is_exporting():
            return self._of_all_rungs(coefficients, reliability, interval_ids)
        intervals, n_stars = interval_ids[0], coefficients.shape[0]
        shape = (n_stars, len(self.rungs))
        dtype = cast(SpectraFMRung, self.rungs[0]).layer_norm.weight.dtype
        # Rung after rung and member after member, as they are made and read.
        states = coefficients.new_zeros((shape[1], config.num_members, n_stars, config.hidden_size), dtype=dtype)
        states = states.permute(2, 0, 1, 3)
        rung_seen = torch.zeros(shape, dtype=torch.bool, device=seen.device)
        cost, unknown = (torch.full(shape, math.nan, device=seen.device) for _ in range(2))
        for number, (rung, (first, last)) in enumerate(zip(self.rungs, config.rung_intervals, strict=True)):
            (own,) = torch.nonzero((intervals >= first) & (intervals < last), as_tuple=True)
            (stars,) = torch.nonzero(seen[:, own].any(dim=1), as_tuple=True)
            if len(stars):
                parts = coefficients[stars][:, own], reliability[stars][:, own], intervals[own]
                found, *about = rung(*parts)  # on a device of its own where the model is spread over several
                cost[stars, number], unknown[stars, number] = (each.to(cost.device) for each in about)
                states[stars, number] = found.to(states)
                rung_seen[stars, number] = True
        return SpectraFMModelOutput(last_hidden_state=states, rung_seen=rung_seen, cost=cost, unknown=unknown)

    def _of_all_rungs(
        self, coefficients: torch.Tensor, reliability: torch.Tensor, interval_ids: torch.Tensor
    ) -> SpectraFMModelOutput:
        """For exports, in which no branch may depend on values: all intervals in their places, and all rungs."""
        place = torch.arange(self.config.num_intervals, device=interval_ids.device) == interval_ids[..., None]
        coefficients, reliability = (
            place.to(part.dtype).transpose(1, 2) @ part for part in (coefficients, reliability)
        )
        found = []
        for rung, (first, last) in zip(self.rungs, self.config.rung_intervals, strict=True):
            known = reliability[:, first:last]
            own = torch.arange(first, last, device=interval_ids.device)
            states, *about = rung(coefficients[:, first:last], known, own)
            seen = (known > 0).flatten(1).any(dim=1)
            about = [torch.where(seen, part, math.nan) for part in about]
            found.append((torch.where(seen[:, None, None], states, 0.0), seen, *about))
        states, rung_seen, cost, unknown = (torch.stack(part, dim=1) for part in zip(*found, strict=True))
        return SpectraFMModelOutput(last_hidden_state=states, rung_seen=rung_seen, cost=cost, unknown=unknown)

    def _scalars(self, ids: torch.Tensor, values: torch.Tensor, n_stars: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens of known scalars, (B, S, hidden_size), and which of them count, (B, S)."""
        check_shapes((n_stars, *ids.shape[-1:]), scalar_ids=ids, scalar_values=values)
        center, scale = standardisation(self.config, ids)
        # The squares of larger ones, in normalisation, would be infinite.
        standardised = ((values.float() - center) / scale).clamp(-1e6, 1e6)
        return self.embeddings.value_embedding(ids, standardised), ids != PADDING_ID

    def all_labels(self, inputs: torch.Tensor) -> torch.Tensor:
        """(B, labels): requests for every label of the vocabulary, for as many stars as `inputs` has."""
        rows = FIRST_LABEL_ID + len(self.config.label_names)
        return torch.arange(FIRST_LABEL_ID, rows, device=inputs.device).expand(inputs.shape[0], -1)


class SpectraFMReadout(InFullPrecision):
    """
    MLP shared by all requests, then one linear head for the mean and one for the log-variance.

    It stays in float32 whatever the dtype of the model: bfloat16 would round a mean of 1.5 to 1/128, several Kelvin.
    """

    def __init__(self, config: SpectraFMConfig):
        super().__init__()
        widths = [config.hidden_size, *config.readout_dims]
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in zip(widths[:-1], widths[1:], strict=True))
        self.activation_fn = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.dropout)
        self.mean = nn.Linear(widths[-1], 1)
        self.log_variance = nn.Linear(widths[-1], 1)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, R, hidden_size) -> twice (B, R), float32."""
        with torch.autocast(hidden_states.device.type, enabled=False):
            hidden_states = hidden_states.float()
            for layer in self.layers:
                hidden_states = self.dropout(self.activation_fn(layer(hidden_states)))
            return self.mean(hidden_states)[..., 0], self.log_variance(hidden_states)[..., 0]


class SpectraFMForPrediction(SpectraFMPreTrainedModel):
    """
    SpectraFM with its read-out: a mean and a log-variance for each request.

    Examples
    --------
    >>> import numpy as np
    >>> import torch
    >>> from spectrafm_hf import SpectraFMForPrediction, SpectraFMTokenizer, SpectrumEmulator, bundled
    >>> emulator = SpectrumEmulator.from_pretrained(bundled("emulator-hband"))
    >>> wavelength, flux = emulator.synthesize(teff=4800.0, logg=2.5, fe_h=-0.2)  # Angstrom in vacuum, at rest
    >>> tokenizer = SpectraFMTokenizer.from_pretrained(bundled("spectrafm-base"))
    >>> inputs = tokenizer(wavelength, flux, np.full_like(flux, 0.01), requests=["teff", "logg", "fe_h"])
    >>> model = SpectraFMForPrediction.from_pretrained(bundled("spectrafm-base")).eval()
    >>> with torch.no_grad():
    ...     outputs = model(**inputs)
    >>> [round(value, 1) for value in outputs.predictions[0].tolist()]  # K, dex, dex
    [4800.2, 2.5, -0.2]
    >>> [round(error, 2) for error in outputs.prediction_errors[0].tolist()]
    [10.14, 0.02, 0.01]
    """

    def __init__(self, config: SpectraFMConfig):
        super().__init__(config)
        self.model = SpectraFMModel(config)
        if config.token_embedding == "basis":
            n_labels, rungs = config.num_network_labels, config.rung_intervals
            self.means = nn.ModuleList(SpectraFMMemberHead(config, n_labels) for _ in rungs)
            self.log_variances = nn.ModuleList(SpectraFMMemberHead(config, n_labels) for _ in rungs)
        else:
            self.readout = SpectraFMReadout(config)
        if config.star_labels:
            self.start = SpectraFMMemberHead(config, len(config.star_labels))
            self.refinement = SpectraFMRefinement(config)
        self.corrections = nn.ModuleList(SpectraFMCorrection(config, settings) for settings in config.corrections)
        self.pixel_sets = nn.ModuleList(SpectraFMPixels(*sizes) for sizes in config.pixel_sets)
        self.post_init()

    def add_label(self, name: str, unit: str = "", center: float = 0.0, scale: float = 1.0):
        """See [`SpectraFMModel.add_label`]."""
        if self.config.corrections:
            raise ValueError("name: expected a model without corrections, whose labels come last, to add a row to")
        self.model.add_label(name, unit, center, scale)
        if self.config.token_embedding == "basis":
            for head in (*self.means, *self.log_variances):
                head.add_row()

    @torch.no_grad()
    def add_pixels(self, first: int, pixels: int, components: int) -> SpectraFMPixels:
        """Add an empty module for the principal components of a grid of pixels, see [`SpectraFMPixels`]."""
        new = SpectraFMPixels(first, pixels, components).to(self.device)
        self.pixel_sets.append(new)
        self.config.pixel_sets = [*self.config.pixel_sets, [first, pixels, components]]
        return new

    @torch.no_grad()
    def add_corrections(
        self, entries: Sequence[Mapping[str, Any]], unit: str = "", center: float = 0.0, scale: float = 1.0
    ) -> list[SpectraFMCorrection]:
        """
        Add empty corrections of a label, whose weighted mean is the prediction; they replace those for the same label
        and rung. Predictions of all other labels, and for spectra of other rungs, stay the same to the last bit.

        Parameters
        ----------
        entries : sequence of mapping
            For one label and one rung, see [`SpectraFMCorrection`].
        unit, center, scale : see [`SpectraFMModel.add_label`]
            Of a label that is new.

        Returns
        -------
        list of SpectraFMCorrection
            Their buffers have to be filled.
        """
        config, label, rung = self.config, entries[0]["label"], entries[0]["rung"]
        if config.token_embedding != "basis":
            raise ValueError("entries: expected a model with token_embedding='basis' to correct, got another")
        kept = [
            number for number, each in enumerate(config.corrections) if (each["label"], each["rung"]) != (label, rung)
        ]
        is_new = label not in config.label_names or any(
            each["new"] for each in config.corrections if each["label"] == label
        )
        if label not in config.label_names:
            config.network_labels = list(config.network_labels or config.label_names)
            for field, entry in (("names", label), ("units", unit), ("centers", center), ("scales", scale)):
                setattr(config, f"label_{field}", [*getattr(config, f"label_{field}"), entry])
            config.name_labels()
            if config.label_error_factors:
                config.label_error_factors = [*config.label_error_factors, 1.0]
        own = [{**settings, "new": is_new} for settings in entries]
        new = [SpectraFMCorrection(config, settings).to(self.device) for settings in own]
        self.corrections = nn.ModuleList([*(self.corrections[number] for number in kept), *new])
        config.corrections = [*(config.corrections[number] for number in kept), *own]
        config.scalar_names = list(
            dict.fromkeys(name for each in config.corrections for name in each.get("scalars", ()))
        )
        return new

    def drop_corrections(self) -> None:
        """Remove all corrections, and the labels that only they predict."""
        config, kept = self.config, self.config.num_network_labels
        for field in ("names", "units", "centers", "scales", "error_factors"):
            setattr(config, f"label_{field}", list(getattr(config, f"label_{field}"))[:kept])
        self.corrections, config.corrections = nn.ModuleList(), []
        self.pixel_sets, config.pixel_sets = nn.ModuleList(), []
        config.scalar_names = []
        config.name_labels()

    def resize_token_embeddings(self, *args, **kwargs):
        self.model.resize_token_embeddings()

    @can_return_tuple
    def forward(
        self,
        flux: torch.Tensor | None = None,
        wavelength: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        *,
        scalar_ids: torch.Tensor | None = None,
        scalar_values: torch.Tensor | None = None,
        request_ids: torch.Tensor | None = None,
        request_wavelength: torch.Tensor | None = None,
        flux_center: torch.Tensor | None = None,
        flux_scale: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        label_errors: torch.Tensor | None = None,
        coefficients: torch.Tensor | None = None,
        reliability: torch.Tensor | None = None,
        interval_ids: torch.Tensor | None = None,
        estimate: torch.Tensor | None = None,
        information: torch.Tensor | None = None,
        pull: torch.Tensor | None = None,
        misfit: torch.Tensor | None = None,
        star_targets: torch.Tensor | None = None,
        pixels: torch.Tensor | None = None,
        scalars: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SpectraFMPredictionOutput:
        """
        Parameters of [`SpectraFMModel.forward`], and:

        flux_center, flux_scale : torch.FloatTensor of shape (B, R), optional
            For requests of flux: value = mean * flux_scale + flux_center in the units of the tokenized spectrum.
            Without them predicted fluxes stay standardised.
        labels : torch.FloatTensor of shape (B, R), optional
            True values in physical units; NaN is unknown and ignored.
        label_errors : torch.FloatTensor of shape (B, R), optional
            Their one-sigma errors; NaN counts as 0.
        estimate, information, pull, misfit : torch.FloatTensor, optional
            For a model with `config.star_labels`: the likelihood of the pixels, see [`Evidence`], which refines the
            predictions.
        star_targets : torch.FloatTensor of shape (B, len(config.star_labels)), optional
            True labels of the star model in physical units, NaN where unknown: the first estimate adds to the loss.
        pixels : torch.FloatTensor of shape (B, pixels), optional
            For a model with `config.pixel_sets`: fluxes on their grids over the median of the spectrum, NaN where
            unknown. Without them, labels that were learnt from pixels are NaN.
        scalars : torch.FloatTensor of shape (B, len(config.scalar_names), 2), optional
            Values and one-sigma errors, NaN where unknown: a label that needs one is then predicted from the spectrum
            alone. A request of such a label without `scalars` is an error.
        num_items_in_batch : int, optional
            Number of labels in all batches of a step: the loss is the sum over known labels divided by this number
            instead of their mean, so that the losses of the batches add up.
        """
        num_items_in_batch = kwargs.pop("num_items_in_batch", None)
        spectrum = flux if coefficients is None else coefficients
        if spectrum is None:
            raise ValueError("coefficients: expected them, or flux, got neither")
        if request_ids is None:
            request_ids = self.model.all_labels(spectrum)
        check_together(flux_center=flux_center, flux_scale=flux_scale)
        check_shapes(
            (spectrum.shape[0], *request_ids.shape[-1:]),
            request_ids=request_ids,
            flux_center=flux_center,
            flux_scale=flux_scale,
            labels=labels,
            label_errors=label_errors,
        )
        all_ids, kept = request_ids, None
        if self.config.corrections:
            # Labels of corrections alone come later: more columns change the last digit of vectorised functions.
            kept = (request_ids < FIRST_LABEL_ID + self.config.num_network_labels).any(dim=0)
            request_ids = request_ids[:, kept]
            labels, label_errors, flux_center, flux_scale = (
                None if part is None else part[:, kept] for part in (labels, label_errors, flux_center, flux_scale)
            )
        outputs: SpectraFMModelOutput = self.model(
            flux=flux, wavelength=wavelength, attention_mask=attention_mask, scalar_ids=scalar_ids,
            scalar_values=scalar_values, request_ids=request_ids, request_wavelength=request_wavelength,
            coefficients=coefficients, reliability=reliability, interval_ids=interval_ids,
            **{**kwargs, "return_dict": True},
        )  # fmt: skip
        center, scale = standardisation(self.config, request_ids, flux_center, flux_scale)
        loss = by_member = None
        if self.config.token_embedding == "basis":
            by_member = self._answers(outputs, request_ids)
            mean, log_variance = self._from_members(by_member, request_ids)
        else:
            mean, log_variance = (x[:, None].to(center.device) for x in self.readout(outputs.last_hidden_state))
        if labels is not None:
            target = ((labels.float() - center) / scale).masked_fill(request_ids == PADDING_ID, math.nan)
            sigma = None if label_errors is None else label_errors.float() / scale
            loss = self._loss(mean, log_variance, target, sigma, num_items_in_batch)
            if star_targets is not None:
                wanted = self.refinement.star_model.standardise(star_targets)
                loss = loss + start_loss(self.start(self._star_state(outputs)), wanted[:, None])
        if self.config.token_embedding == "basis":
            mean, log_variance = combined(mean, log_variance)
        else:
            mean, log_variance = mean[:, 0], log_variance[:, 0]
        log_variance = self._with_error_factors(log_variance, outputs, by_member, request_ids)
        refined = None
        if estimate is not None and torch.compiler.is_exporting():
            raise ValueError("estimate: expected none, as the fit with the star model cannot be exported")
        if self.config.star_labels and estimate is not None and information is not None and pull is not None:
            evidence = reliability, interval_ids, estimate, information, pull, misfit
            refined = self._refine(self._star_state(outputs), *evidence)
            if refined is not None:
                mean, log_variance = self._by_star_model(refined, request_ids, mean, log_variance)
        values, errors = mean * scale + center, torch.exp(0.5 * log_variance) * scale
        if kept is not None:
            found = values, errors, mean, log_variance
            seen = coefficients, reliability, interval_ids, attention_mask, pixels, scalars
            values, errors, mean, log_variance = self._corrected(outputs, refined, all_ids, kept, found, seen)
        return SpectraFMPredictionOutput(
            loss=loss,
            mean=mean,
            log_variance=log_variance,
            predictions=values,
            prediction_errors=errors,
            rung_seen=outputs.rung_seen,
            cost=outputs.cost,
            unknown=outputs.unknown,
            refined=refined,
            decoder_hidden_states=outputs.decoder_hidden_states,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=outputs.encoder_last_hidden_state,
            encoder_hidden_states=outputs.encoder_hidden_states,
            encoder_attentions=outputs.encoder_attentions,
        )

    def _loss(self, mean, log_variance, target, sigma, num_items_in_batch) -> torch.Tensor:
        """The loss of each member, (B, members, R), against standardised labels (B, R)."""
        unknown = mean.isnan()
        target = torch.where(unknown, math.nan, target[:, None])
        sigma = None if sigma is None else sigma[:, None].expand_as(mean)
        answers, spreads = torch.where(unknown, 0.0, mean), torch.where(unknown, 0.0, log_variance)
        n_items = None if num_items_in_batch is None else num_items_in_batch * mean.shape[1]
        return prediction_loss(answers, spreads, target, sigma, self.config.degrees_of_freedom, n_items)

    def predict_spectrum(
        self, tokenizer, *spectra, wavelength=None, resolving_power: float | None = None, **settings
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """
        Complete spectra of stars from some of their pixels: holes filled in, noise removed.

        Parameters
        ----------
        tokenizer : SpectraFMTokenizer
        *spectra, **settings
            Arguments of the tokenizer: spectra that share their wavelengths.
        wavelength : array of shape (pixels,), optional
            Angstrom, vacuum, rest frame, increasing; by default those of the spectra.
        resolving_power : float, optional
            Wavelength / FWHM; by default that of the spectra where it is known, otherwise the highest available.

        Returns
        -------
        wavelength : array of shape (pixels,)
        flux, error : array of shape (stars, pixels)
            In the unit of the spectra.

        Raises
        ------
        ValueError
            For wavelengths outside the range of the instrument, or a resolving power that is too high; and errors of
            the tokenizer.
        """
        grids = tokenizer(*spectra, **settings, return_grids=True).get("grids")
        if grids is None or len(grids) != 1:
            found = "another model" if grids is None else f"{len(grids)} grids"
            raise ValueError(f"spectra: expected a model on evidence and spectra that share their grid, got {found}")
        (known,) = whole_spectra(self, tokenizer.basis, grids)
        if wavelength is None:
            low, high = known.rung.range
            own = grids[0].wavelength
            wavelength = own[(own >= low) & (own <= high)]
        power = grids[0].resolving_power if resolving_power is None else resolving_power
        return np.asarray(wavelength, float), *known.at(wavelength, power)

    @without_autocast
    def _by_star_model(self, refined: Refined, request_ids, mean, log_variance):
        """Mean and log-variance of each request, (B, R), of the star model where it found an answer."""
        center, scale = standardisation(self.config, request_ids)
        table = combinations(self.config).to(request_ids.device)[request_ids]  # B, R, P
        answers = ((table @ refined.labels[..., None])[..., 0] - center) / scale
        variances = torch.einsum("brp,bpq,brq->br", table, refined.covariance, table) / scale**2
        known = table.any(dim=-1) & refined.converged[:, None]
        return torch.where(known, answers, mean), torch.where(known, torch.log(variances), log_variance)

    def uncorrected(
        self, outputs: SpectraFMModelOutput, refined: Refined | None, request_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Values and errors (B, R) of a model on evidence in physical units, without what `corrections` change."""
        answers = self._answers(outputs, request_ids)
        mean, log_variance = combined(*self._from_members(answers, request_ids))
        log_variance = self._with_error_factors(log_variance, outputs, answers, request_ids)
        if refined is not None:
            mean, log_variance = self._by_star_model(refined, request_ids, mean, log_variance)
        center, scale = standardisation(self.config, request_ids)
        return mean * scale + center, torch.exp(0.5 * log_variance) * scale

    def _corrected(self, outputs, refined, request_ids, kept, found, evidence):
        """
        Values, errors, means and log-variances (B, R): `found` for the columns `kept`, and those of `corrections` for
        requested labels.
        """
        coefficients, reliability, interval_ids, attention_mask, pixels, scalars = evidence
        intervals = interval_ids[0]
        components: dict[int, dict[str, torch.Tensor]] = {}  # of the pixels, by the set
        answers: dict[tuple[int, int], list[tuple[torch.Tensor, torch.Tensor, Any]]] = {}
        blind: dict[tuple[int, int], torch.Tensor] = {}  # stars of which a scalar is unknown
        values, errors, mean, log_variance = (
            part.new_full(request_ids.shape, math.nan).index_copy(1, torch.nonzero(kept)[:, 0], part) for part in found
        )
        center, scale = standardisation(self.config, request_ids)
        for part, settings in zip(self.corrections, self.config.corrections, strict=True):
            correction = cast(SpectraFMCorrection, part)
            rung, row = settings["rung"], self.config.label_ids([correction.label])[0]
            first, last = self.config.rung_intervals[rung]
            (own,) = torch.nonzero((intervals >= first) & (intervals < last), as_tuple=True)
            here = outputs.rung_seen[:, rung, None] & (request_ids == row)
            (stars,) = torch.nonzero(here.any(dim=1), as_tuple=True)
            if not len(stars):
                continue
            ids = torch.tensor(self.config.label_ids([*correction.inputs, correction.label]), device=mean.device)
            answer_of, doubts = self.uncorrected(outputs, refined, ids.expand(len(mean), -1))
            seen = reliability if attention_mask is None else reliability * attention_mask[..., None]
            own_scalars = self._own_scalars(correction, scalars)
            if own_scalars is not None:
                own_scalars, blind[row, rung] = own_scalars[stars], self.blind(correction, scalars)[stars]
            number = correction.pixels
            if number >= 0 and pixels is not None and number not in components:
                components[number] = self.pixel_sets[number](pixels)
            if number >= 0 and pixels is None:
                both = (mean.new_full((len(stars),), math.nan),) * 2
            else:
                both = correction(
                    answer_of[stars, :-1],
                    doubts[stars, :-1],
                    answer_of[stars, -1],
                    coefficients[stars][:, own],
                    seen[stars][:, own],
                    intervals[own],
                    {name: part[stars] for name, part in components.get(number, {}).items()},
                    own_scalars,
                )
            answers.setdefault((row, rung), []).append((*both, settings))
        for (row, rung), parts in answers.items():
            here = outputs.rung_seen[:, rung, None] & (request_ids == row)
            (stars,) = torch.nonzero(here.any(dim=1), as_tuple=True)
            value, error = (
                mean.new_full((len(mean),), math.nan).index_copy(0, stars, part.to(mean))[:, None]
                for part in mixed(*zip(*parts, strict=True), blind.get((row, rung)))
            )
            values, errors = torch.where(here, value, values), torch.where(here, error, errors)
            mean = torch.where(here, (value - center) / scale, mean)
            log_variance = torch.where(here, 2.0 * torch.log(error / scale), log_variance)
        return values, errors, mean, log_variance

    def blind(self, correction: SpectraFMCorrection, scalars: torch.Tensor | None) -> torch.Tensor:
        """Stars of which a scalar of a correction is unknown, (B,); `scalars` as in `forward`."""
        own = self._own_scalars(correction, scalars)
        assert own is not None
        return ~correction.estimated(own)[2].all(dim=1)

    def _own_scalars(self, correction: SpectraFMCorrection, scalars: torch.Tensor | None):
        """Those of a correction, (B, scalars, 2), out of all; None where it has none."""
        if not correction.scalars:
            return None
        names = list(self.config.scalar_names)
        if scalars is None:
            raise ValueError(
                f"scalars: expected {', '.join(correction.scalars)}, which {correction.label} is predicted from, NaN "
                "where unknown (the tokenizer takes scalars={name: values}), got none"
            )
        check_shapes((len(scalars), len(names), 2), scalars=scalars)
        return scalars[:, [names.index(name) for name in correction.scalars]]

    def _answers(self, outputs: SpectraFMModelOutput, request_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log-variance of each member of each rung for all labels, (B, rungs * M, labels), NaN for none."""
        exporting = torch.compiler.is_exporting()
        if not exporting and bool((request_ids == FLUX_ID).any()):
            raise ValueError(
                "request_ids: expected labels, because this model does not predict flux, got a request of flux"
            )
        states, seen = outputs.last_hidden_state, outputs.rung_seen
        assert states is not None and seen is not None
        present = [exporting or bool(seen[:, i].any()) for i in range(seen.shape[1])]
        absent = torch.full((), math.nan, device=states.device)
        absent = absent.expand(states.shape[0], self.config.num_members, self.config.num_network_labels)

        def of(heads) -> torch.Tensor:
            answers = [head(states[:, i]).to(states.device) if present[i] else absent for i, head in enumerate(heads)]
            return torch.stack(answers, dim=1).masked_fill(~seen[:, :, None, None], math.nan).flatten(1, 2)

        return of(self.means), of(self.log_variances)

    def _from_members(self, answers: tuple[torch.Tensor, torch.Tensor], request_ids: torch.Tensor):
        """Mean and log-variance of each member of each rung for each request, (B, rungs * M, R), NaN for no answer."""
        rows = (request_ids - FIRST_LABEL_ID).clamp(0, self.config.num_network_labels - 1)
        parts = [part.gather(2, rows[:, None].expand(-1, part.shape[1], -1)) for part in answers]
        if not self.training:
            parts[1] = self._calibrated(parts[1], rows)
        known = [FIRST_LABEL_ID + list(self.config.label_names).index(name) for name in self.config.network_labels]
        if known:
            trained = (request_ids[..., None] == torch.tensor(known, device=request_ids.device)).any(dim=-1)
            parts = [part.masked_fill(~trained[:, None], math.nan) for part in parts]
        return parts

    def _calibrated(self, log_variance: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Log-variances of members, (B, rungs * M, R), with the factors and floors of their rungs; rows (B, R)."""
        config = self.config
        names, scales = config.label_names, torch.tensor(list(config.label_scales), device=rows.device)

        def of_members(by_rung, absent: float) -> torch.Tensor:
            table = torch.tensor([[rung.get(name, absent) for name in names] for rung in by_rung], device=rows.device)
            return table.repeat_interleave(config.num_members, dim=0)

        if config.rung_error_factors:
            factors = of_members(config.rung_error_factors, 1.0).T[rows].transpose(1, 2)  # B, rungs * M, R
            log_variance = log_variance + 2.0 * factors.log()
        if config.rung_error_floors:
            floors = (of_members(config.rung_error_floors, 0.0) / scales).T[rows].transpose(1, 2)
            log_variance = torch.logaddexp(log_variance, 2.0 * floors.log())
        return log_variance

    def _with_error_factors(self, log_variance, outputs: SpectraFMModelOutput, answers, request_ids) -> torch.Tensor:
        """Log-variances of answers, (B, R), with the factors and curves of their labels."""
        if self.config.label_error_factors:
            log_variance = log_variance + 2.0 * log_error_factors(self.config, request_ids)
        if any(self.config.rung_error_curves):
            log_variance = log_variance + 2.0 * self._error_curves(outputs, answers, request_ids)
        return log_variance

    @without_autocast
    def _error_curves(self, outputs: SpectraFMModelOutput, answers, request_ids: torch.Tensor) -> torch.Tensor:
        """ln of the factors of `config.rung_error_curves`, (B, R): the mean over the rungs seen that have curves."""
        config = self.config
        assert outputs.unknown is not None and outputs.rung_seen is not None
        teff_ids = request_ids.new_full((request_ids.shape[0], 1), config.label_ids(["teff"])[0])
        center, scale = standardisation(config, teff_ids)
        teff = combined(*self._from_members(answers, teff_ids))[0] * scale + center
        total = torch.zeros(request_ids.shape, device=request_ids.device)
        number = torch.zeros(request_ids.shape[0], 1, device=request_ids.device)
        for rung, curves in enumerate(config.rung_error_curves):
            if not curves:
                continue
            found = torch.zeros(request_ids.shape, device=request_ids.device)
            for part, x in enumerate((teff[:, 0], outputs.unknown[:, rung])):
                knots = torch.tensor(config.rung_error_knots[rung][part], device=x.device)
                values = torch.zeros(FIRST_LABEL_ID + len(config.label_names), len(knots), device=x.device)
                for name, of_label in curves.items():
                    values[config.label_ids([name])[0]] = torch.tensor(of_label[part], device=x.device)
                ramps = ((x[:, None] - knots[:-1]) / knots.diff()).clamp(0.0, 1.0)
                found = found + (values[:, 0] + ramps @ values.diff(dim=1).T).gather(1, request_ids)
            total = total + found.nan_to_num(nan=0.0)
            number = number + outputs.rung_seen[:, rung, None]
        return total / number.clamp(min=1.0)

    def _star_state(self, outputs: SpectraFMModelOutput) -> torch.Tensor:
        """States (B, M, hidden_size) of the rung that the star model is of."""
        first = self.config.star_intervals[0]
        number = [low <= first < high for low, high in self.config.rung_intervals].index(True)
        assert outputs.last_hidden_state is not None
        return outputs.last_hidden_state[:, number]

    def _in_star_model(self, interval_ids: torch.Tensor) -> torch.Tensor:
        """(T,): which intervals of the batch the star model knows."""
        first, last = self.config.star_intervals
        known = torch.zeros(self.config.num_intervals, dtype=torch.bool, device=interval_ids.device)
        known[first:last] = self.refinement.star_model.components[0].flatten(1).any(dim=1)
        return known[interval_ids[0]]

    @without_autocast
    def _refine(self, state, reliability, interval_ids, estimate, information, pull, misfit) -> Refined | None:
        """The fit of all stars; those without an interval of the star model do not converge."""
        own = torch.nonzero(self._in_star_model(interval_ids))[:, 0]
        if not len(own):
            return None
        if len(own) < interval_ids.shape[1]:
            reliability, estimate, information, pull = (x[:, own] for x in (reliability, estimate, information, pull))
            misfit = None if misfit is None else misfit[:, own]
        information, level_known = information.float(), (reliability[..., 0] > 0).any(dim=1)
        start = self.start(state).mean(dim=1)
        refined: Refined = self.refinement(
            start,
            estimate.float(),
            information,
            pull.float(),
            interval_ids[0, own],
            level_known,
            None if misfit is None else misfit.float(),
        ).to(information.device)
        refined.converged &= (information.diagonal(dim1=2, dim2=3) > 0).flatten(1).any(dim=1)
        return refined


def prediction_loss(
    mean: torch.Tensor,
    log_variance: torch.Tensor,
    target: torch.Tensor,
    target_error: torch.Tensor | None = None,
    degrees_of_freedom: float = 0.0,
    n_items: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """
    Mean over known targets of 0.5 [(target - mean)^2 / V + ln V], V = exp(log_variance) + target_error^2 + 1e-8; with
    `n_items` the sum over them over that number.

    Koblischke & Bovy 2024; all in standardised units, any shape. A NaN target is unknown and ignored, a NaN error
    counts as 0. Without a known target the loss is 0. With `degrees_of_freedom` n, Student's t takes the place of the
    Gaussian: 0.5 [(n + 1) ln(1 + (target - mean)^2 / n V) + ln V].
    """
    variance = torch.exp(log_variance) + 1e-8
    if target_error is not None:
        variance = variance + torch.nan_to_num(target_error, nan=0.0) ** 2
    known = ~torch.isnan(target)
    residual = torch.where(known, target, 0.0) - mean
    misfit = residual**2 / variance
    if degrees_of_freedom:
        misfit = (degrees_of_freedom + 1.0) * torch.log1p(misfit / degrees_of_freedom)
    terms = 0.5 * (misfit + torch.log(variance))
    return torch.where(known, terms, 0.0).sum() / (known.sum().clamp(min=1) if n_items is None else n_items)


def combined(mean: torch.Tensor, log_variance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Predictions of members, (B, M, R) twice, NaN for none -> their mean weighted by inverse variance, and the log of
    their mean variance, (B, R), which is not reduced by their number because they share the same data.
    """
    weight = torch.exp(-log_variance).nan_to_num(nan=0.0)
    total = weight.sum(dim=1)
    number = (weight > 0).sum(dim=1)
    mean = (weight * mean.nan_to_num(nan=0.0)).sum(dim=1) / total
    return torch.where(number > 0, mean, math.nan), torch.where(number > 0, -torch.log(total / number), math.nan)


def start_loss(first: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """First estimates and true labels, (B, M, P) in standardised units -> mean deviation, squared where it is small."""
    target = target.expand_as(first)
    known = ~torch.isnan(target)
    deviation = nn.functional.smooth_l1_loss(first.float(), torch.where(known, target, 0.0), reduction="none", beta=0.3)
    return torch.where(known, deviation, 0.0).sum() / known.sum().clamp(min=1)


SpectraFMModel.register_for_auto_class("AutoModel")
# The closest auto class in transformers.
SpectraFMForPrediction.register_for_auto_class("AutoModelForTimeSeriesPrediction")

__all__ = ["SpectraFMForPrediction", "SpectraFMModel", "SpectraFMPreTrainedModel"]
