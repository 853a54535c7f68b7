# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Configuration of SpectraFM, a Transformer for stellar spectra (Koblischke & Bovy 2024, arXiv 2411.04750)."""

import copy
import dataclasses
import math
from typing import TYPE_CHECKING, Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


if TYPE_CHECKING:
    # transformers copies files that are imported relatively into checkpoints. This import is never run; it makes
    # transformers copy the pipeline with the config that names it.
    from .pipeline_spectrafm import StellarLabelsPipeline  # noqa: F401


# Rows of the vocabulary that are no label: padding, and "the flux at a wavelength". Label i has row i + 2.
PADDING_ID = 0
FLUX_ID = 1
FIRST_LABEL_ID = 2
# Possible inputs of a correction, see `SpectraFMCorrection`.
PIXEL_GROUPS = ("pixels", "scaled")
SCALAR_GROUPS = ("scalars", "known")  # scalars alone, and answers with them
CORRECTION_GROUPS = ("answers", "shape", "coefficients", *PIXEL_GROUPS, *SCALAR_GROUPS)

# Where transformers finds the code of a checkpoint in its own folder. The tokenizer writes its part itself.
AUTO_MAP = {
    "AutoConfig": "configuration_spectrafm.SpectraFMConfig",
    "AutoModel": "modeling_spectrafm.SpectraFMModel",
    "AutoModelForTimeSeriesPrediction": "modeling_spectrafm.SpectraFMForPrediction",
}
# Two versions in one process use their own code: transformers identifies code by the file of the configuration.
PACKAGE_VERSION = "0.2.0"
# Attributes that transformers adds to a config or saves with it, in addition to the fields of this class and its base.
FOREIGN_FIELDS = {
    *("attn_implementation", "auto_map", "custom_pipelines", "experts_implementation", "gradient_checkpointing"),
    *("model_type", "name_or_path", "num_labels", "output_attentions", "per_layer_config", "quantization_config"),
    *("torch_dtype", "use_cache"),
}
CUSTOM_PIPELINES = {
    "stellar-labels": {
        "impl": "pipeline_spectrafm.StellarLabelsPipeline",
        "pt": ["AutoModelForTimeSeriesPrediction"],
    }
}


@strict
class SpectraFMConfig(PreTrainedConfig):
    r"""
    Configuration of a [`SpectraFMModel`]. The defaults are the published architecture.

    Parameters
    ----------
    hidden_size : int
        Width of a token, and of the members of a model on evidence.
    token_embedding : {"value", "basis"}
        What a spectrum token is. `"value"`: one flux, like any scalar (the paper). `"basis"`: the evidence of an
        interval of ln wavelength, see [`SpectrumBasis`].
    encoder_attention_heads, encoder_ffn_dim : list[int]
        Heads and feed-forward width of each encoder layer (self-attention).
    decoder_attention_heads, decoder_ffn_dim : list[int]
        The same for each decoder layer (cross-attention from requests to the encoder output, nothing else).
    readout_dims : list[int]
        Widths of the MLP between the decoder and the two linear heads.
    num_intervals, num_coefficients : int
        For `token_embedding="basis"`: those of the [`SpectrumBasis`].
    rung_intervals : list[list[int]]
        For `token_embedding="basis"`: for each rung its first interval, and the first after them that is not.
    rung_components : list[int]
        For `token_embedding="basis"`: principal components of stars in each rung, see [`SpectraFMCompletion`].
    rung_pixels : list[int]
        For `token_embedding="basis"`: pixels of the grid of each rung on which the network sees asinh(flux /
        flux_softening) of the completed spectrum; 0, or none: it sees the amplitudes of the components.
    rung_features : list[int]
        With `rung_pixels`: principal components of it that the network sees.
    rung_ffn_dim : list[list[int]]
        Widths of the blocks of the members of each rung; none: `encoder_ffn_dim` for all.
    flux_softening : float
        With `rung_pixels`: asinh is nearly linear below it, so that a line is as deep in a faint spectrum as in a
        bright one above.
    num_members : int
        For `token_embedding="basis"`: networks with weights of their own, of width `hidden_size` with blocks of
        `encoder_ffn_dim`, whose answers are averaged.
    network_labels : list[str]
        For `token_embedding="basis"`: labels that the network was trained to answer by itself; none: all. Others follow
        from the star model, or are NaN.
    evidence_limits : list[list[float]]
        For each rung, the cost of the completion and chi^2 per degree of freedom above which a spectrum is unlike all
        training stars; none: unknown. See [`star_flags`].
    label_ranges : list[dict[str, list[float]]]
        For each rung, lowest and highest value of labels among the training stars; none: unknown.
    rung_error_factors : list[dict[str, float]]
        For each rung, factors of the predicted errors of labels, calibrated on validation stars of that rung; 1 for
        labels without one.
    rung_error_floors : list[dict[str, float]]
        For each rung, errors of labels of observed stars, in their units, which are added to those of the network in
        quadrature; 0 for labels without one.
    star_labels : list[str]
        Labels of the [`SpectraFMStarModel`] that refines predictions, the effective temperature first; none: the
        predictions of the network are not refined.
    star_combinations : dict[str, list[str]]
        Labels that are the mean of some of `star_labels`.
    star_components : list[int]
        Its components, by the Gaussian processes that they share.
    star_intervals : list[int]
        Its first interval, and the one after its last.
    num_stars : int
        Training stars of its Gaussian processes.
    corrections : list[dict]
        Labels learnt from labelled stars on top of the frozen model, see [`SpectraFMCorrection`]: for spectra of its
        `rung`, each replaces the prediction of its `label`; of several, their weighted mean does.
    pixel_sets : list[list[int]]
        For each [`SpectraFMPixels`] that they use: first column of its grid, number of pixels, number of components.
    scalar_names : list[str]
        Scalars that they use, such as a parallax, in the order of the input `scalars`.
    hidden_act, dropout, attention_dropout, layer_norm_eps, initializer_range
        As everywhere in transformers.
    label_names : list[str]
        The open vocabulary of stellar labels and scalars, in the order of their rows. Each can be a request, an
        input token, or both.
    label_units : list[str]
        Their units, as astropy writes them (`""`: none).
    label_centers, label_scales : list[float]
        A label's value is standardised as (value - center) / scale.
    degrees_of_freedom : float
        0: the loss is the likelihood of a Gaussian (the paper). Otherwise of Student's t with this number of degrees of
        freedom, which is robust to wrong labels in a catalogue. The errors are those of its core.
    label_error_factors : list[float]
        Factors of the predicted errors, calibrated on validation stars after training; none: 1 for all.
    rung_error_knots : list[list[list[float]]]
        With `rung_error_curves`, for each rung: effective temperatures in K, and numbers for the missing information of
        a spectrum (`unknown` of [`SpectraFMModelOutput`]), in order. Empty for a rung without curves.
    rung_error_curves : list[dict[str, list[list[float]]]]
        For each rung: ln of a further factor of the error of a label is the sum of two numbers, which are interpolated
        between the values at the temperatures and at the other knots, and constant beyond. Labels that are not in it
        have no further factor. Earlier checkpoints have those of the first rung in `label_error_knots` and
        `label_error_curves`, which are read as well.
    """

    model_type = "spectrafm"
    keys_to_ignore_at_inference = [
        "predictions",
        "prediction_errors",
        "last_hidden_state",
        "decoder_hidden_states",
        "cross_attentions",
        "encoder_last_hidden_state",
        "encoder_hidden_states",
        "encoder_attentions",
        "refined",
    ]

    hidden_size: int = 256
    token_embedding: str = "value"
    encoder_attention_heads: list[int] | tuple[int, ...] = (16, 8)
    encoder_ffn_dim: list[int] | tuple[int, ...] = (2048, 1024)
    decoder_attention_heads: list[int] | tuple[int, ...] = (16, 8, 4)
    decoder_ffn_dim: list[int] | tuple[int, ...] = (2048, 1024, 512)
    readout_dims: list[int] | tuple[int, ...] = (2048, 1024, 512, 256)
    num_intervals: int = 0
    num_coefficients: int = 0
    rung_intervals: list[list[int]] | tuple[list[int], ...] = ()
    rung_components: list[int] | tuple[int, ...] = ()
    rung_pixels: list[int] | tuple[int, ...] = ()
    rung_features: list[int] | tuple[int, ...] = ()
    rung_ffn_dim: list[list[int]] | tuple[list[int], ...] = ()
    flux_softening: float | int = 0.0
    num_members: int = 6
    network_labels: list[str] | tuple[str, ...] = ()
    evidence_limits: list[list[float]] | tuple[list[float], ...] = ()
    label_ranges: list[dict[str, list[float]]] | tuple[dict[str, list[float]], ...] = ()
    rung_error_factors: list[dict[str, float]] | tuple[dict[str, float], ...] = ()
    rung_error_floors: list[dict[str, float]] | tuple[dict[str, float], ...] = ()
    star_labels: list[str] | tuple[str, ...] = ()
    star_combinations: dict[str, list[str]] | None = None
    star_components: list[int] | tuple[int, ...] = ()
    star_intervals: list[int] | tuple[int, ...] = (0, 0)
    num_stars: int = 0
    corrections: list[dict[str, Any]] | tuple[dict[str, Any], ...] = ()
    pixel_sets: list[list[int]] | tuple[list[int], ...] = ()
    scalar_names: list[str] | tuple[str, ...] = ()
    hidden_act: str = "gelu"
    dropout: float | int = 0.0
    attention_dropout: float | int = 0.0
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    label_names: list[str] | tuple[str, ...] = ("teff", "logg", "fe_h", "alpha_m")
    label_units: list[str] | tuple[str, ...] = ("K", "dex", "dex", "dex")
    label_centers: list[float | int] | tuple[float | int, ...] = (4700.0, 2.5, -0.2, 0.05)
    label_scales: list[float | int] | tuple[float | int, ...] = (550.0, 1.3, 0.3, 0.1)
    degrees_of_freedom: float | int = 0.0
    label_error_factors: list[float | int] | tuple[float | int, ...] = ()
    rung_error_knots: list[list[list[float]]] | tuple[list[list[float]], ...] = ()
    rung_error_curves: list[dict[str, list[list[float]]]] | tuple[dict[str, list[list[float]]], ...] = ()

    @classmethod
    def original(cls, **kwargs) -> "SpectraFMConfig":
        """
        The published architecture (11.87 million parameters, 3.85 million of them unused embedding rows that are left
        out here).

        Parameters
        ----------
        **kwargs
            Fields to change, e.g. a smaller `hidden_size` for tests.
        """
        published = {
            "dropout": 0.05,
            "attention_dropout": 0.05,
            "label_names": ["teff", "logg", "o_fe", "mg_fe", "fe_h"],
            "label_units": ["K", "dex", "dex", "dex", "dex"],
            "label_centers": [4702.52, 2.4784, 0.0876, 0.0670, -0.1589],
            "label_scales": [544.01, 1.3079, 0.0836, 0.0849, 0.2873],
        }
        return cls(**{**published, **kwargs})

    # Set by the installed package, which registers the pipeline with transformers.
    _pipeline_is_registered = False

    def __post_init__(self, **kwargs):
        # transformers.pipeline requires trust_remote_code for every config with custom pipelines, even if no code of
        # the checkpoint is run. It also changes the dictionary, hence a copy.
        if unknown := sorted(key for key in kwargs if key not in FOREIGN_FIELDS and not key.startswith("_")):
            raise ValueError(f"fields: expected those of SpectraFMConfig, got {unknown}")
        kwargs["custom_pipelines"] = {} if self._pipeline_is_registered else copy.deepcopy(CUSTOM_PIPELINES)
        self.is_encoder_decoder = self.token_embedding == "value"
        super().__post_init__(**kwargs)
        self.num_attention_heads = self.encoder_attention_heads[0]  # transformers changes it in copies for a decoder
        self.name_labels()

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As in the base class; other content of a file is kept, as transformers does."""
        config_dict = dict(config_dict)
        knots, curves = (config_dict.pop(f"label_error_{part}", None) for part in ("knots", "curves"))
        if curves:  # of an earlier checkpoint, for its first rung
            others = range(len(config_dict.get("rung_intervals", ())) - 1)
            config_dict |= {"rung_error_knots": [knots, *([] for _ in others)]}
            config_dict |= {"rung_error_curves": [curves, *({} for _ in others)]}
        known = FOREIGN_FIELDS | {field.name for field in dataclasses.fields(cls)}
        other = {key: value for key, value in config_dict.items() if key not in known and not key.startswith("_")}
        found = super().from_dict({key: value for key, value in config_dict.items() if key not in other}, **kwargs)
        for key, value in other.items():
            setattr(found[0] if isinstance(found, tuple) else found, key, value)
        return found

    def name_labels(self) -> None:
        """Update the label maps of transformers after a change of `label_names`."""
        self.id2label = dict(enumerate(self.label_names))
        self.label2id = {name: number for number, name in self.id2label.items()}

    def to_dict(self) -> dict:
        """The fields, and the names of all code files of a checkpoint."""
        code = {"auto_map": AUTO_MAP, "custom_pipelines": CUSTOM_PIPELINES}
        derived = ("id2label", "label2id", "num_attention_heads", "is_encoder_decoder")
        own = {key: value for key, value in super().to_dict().items() if key not in derived}
        return {**own, **copy.deepcopy(code)}

    @property
    def num_hidden_layers(self) -> int:
        return len(self.encoder_ffn_dim)

    @property
    def num_network_labels(self) -> int:
        """Rows of the heads: labels, except those predicted by corrections only, which come last."""
        return len(self.label_names) - len({each["label"] for each in self.corrections if each["new"]})

    def ffn_dim_of(self, rung: int) -> list[int]:
        """Widths of the blocks of the members of a rung."""
        return list(self.rung_ffn_dim[rung] if self.rung_ffn_dim else self.encoder_ffn_dim)

    def label_ids(self, names) -> list[int]:
        """Rows of the vocabulary for `names` (`"flux"` is the flux itself); `ValueError` for an unknown name."""
        known = list(self.label_names)
        unknown = [name for name in names if name != "flux" and name not in known]
        if unknown:
            raise ValueError(f"requests: expected names out of {['flux', *known]}, got {unknown}")
        return [FLUX_ID if name == "flux" else FIRST_LABEL_ID + known.index(name) for name in names]

    def scalars_of(self, names) -> list[str]:
        """Scalars from which labels are predicted, in addition to the spectrum."""
        own = [each.get("scalars", ()) for each in self.corrections if each["label"] in names]
        return list(dict.fromkeys(name for scalars in own for name in scalars))

    def validate_spectrafm(self):
        """Runs at init and at save; `StrictDataclassClassValidationError` with field, expectation and value."""

        def demand(condition, field, expectation):
            if not condition:
                raise ValueError(f"{field}: expected {expectation}, got {getattr(self, field)!r}")

        kinds = ("value", "basis")
        demand(self.token_embedding in kinds, "token_embedding", f"one of {kinds}")
        if self.token_embedding == "basis":
            for field in ("num_intervals", "num_coefficients", "num_members"):
                demand(getattr(self, field) >= 1, field, "at least 1 with token_embedding='basis'")
            pairs = self.rung_intervals
            inside = all(len(pair) == 2 and 0 <= pair[0] < pair[1] <= self.num_intervals for pair in pairs)
            demand(len(pairs) >= 1 and inside, "rung_intervals", "two numbers of intervals for each rung, in order")
            demand(len(self.rung_components) == len(pairs), "rung_components", "one number for each rung")
            demand(len(self.rung_pixels) in (0, len(pairs)), "rung_pixels", "none or one number for each rung")
            demand(len(self.rung_ffn_dim) in (0, len(pairs)), "rung_ffn_dim", "none or a list for each rung")
            fewer = all(few <= all_ for few, all_ in zip(self.rung_features, self.rung_pixels, strict=False))
            same = len(self.rung_features) == len(self.rung_pixels)
            demand(same and fewer, "rung_features", "one number for each of rung_pixels, and not more")
            softened = not any(self.rung_pixels) or self.flux_softening > 0
            demand(softened, "flux_softening", "a positive number with rung_pixels")
        if self.star_labels:
            demand(self.token_embedding == "basis", "star_labels", "none without token_embedding='basis'")
            first, last = self.star_intervals
            demand(0 <= first < last <= self.num_intervals, "star_intervals", "two numbers of intervals, in order")
            demand(self.num_stars >= 1, "num_stars", "at least 1 with star_labels")
            demand(len(self.star_components) >= 1, "star_components", "at least one number with star_labels")
            parts = {part for parts in (self.star_combinations or {}).values() for part in parts}
            demand(parts <= set(self.star_labels), "star_combinations", f"means of {list(self.star_labels)}")
        self._check_corrections(demand)
        demand(math.isfinite(self.flux_softening) and self.flux_softening >= 0, "flux_softening", "0 or more")
        freedom = self.degrees_of_freedom
        demand(math.isfinite(freedom) and freedom >= 0, "degrees_of_freedom", "0 or a positive number")
        demand(self.hidden_size % 2 == 0, "hidden_size", "an even number")
        for stack in () if self.token_embedding == "basis" else ("encoder", "decoder"):
            heads, ffn = f"{stack}_attention_heads", f"{stack}_ffn_dim"
            demand(len(getattr(self, heads)) == len(getattr(self, ffn)), heads, f"as many entries as {ffn}")
            demand(
                all(h >= 1 and self.hidden_size % h == 0 for h in getattr(self, heads)),
                heads,
                f"divisors of hidden_size={self.hidden_size}",
            )
        demand(len(self.decoder_ffn_dim) >= 1, "decoder_ffn_dim", "at least one layer")
        demand(len(set(self.label_names)) == len(self.label_names), "label_names", "different names")
        demand("flux" not in self.label_names, "label_names", "no label called 'flux'")
        factors = self.label_error_factors
        demand(len(factors) in (0, len(self.label_names)), "label_error_factors", "none or one for each label")
        demand(all(0 < factor < math.inf for factor in factors), "label_error_factors", "positive numbers")
        self._check_error_curves(demand)
        limits = len(self.evidence_limits)
        demand(limits in (0, len(self.rung_intervals)), "evidence_limits", "none or two numbers for each rung")
        for field in ("label_ranges", "rung_error_factors", "rung_error_floors"):
            entries = len(getattr(self, field))
            demand(entries in (0, len(self.rung_intervals)), field, "none or one for each rung")
        pairs = [pair for ranges in self.label_ranges for pair in ranges.values()]
        in_order = all(len(pair) == 2 and pair[0] <= pair[1] for pair in pairs)
        demand(in_order, "label_ranges", "two numbers each, in order")
        factors = [factor for factors in self.rung_error_factors for factor in factors.values()]
        demand(all(0 < factor < math.inf for factor in factors), "rung_error_factors", "positive numbers")
        floors = [floor for floors in self.rung_error_floors for floor in floors.values()]
        demand(all(0 <= floor < math.inf for floor in floors), "rung_error_floors", "0 or positive numbers")
        demand(set(self.network_labels) <= set(self.label_names), "network_labels", f"some of {list(self.label_names)}")
        for field in ("label_units", "label_centers", "label_scales"):
            demand(len(getattr(self, field)) == len(self.label_names), field, f"{len(self.label_names)} entries")
        demand(all(math.isfinite(center) for center in self.label_centers), "label_centers", "finite numbers")
        demand(all(0 < scale < math.inf for scale in self.label_scales), "label_scales", "positive numbers")

    def _check_error_curves(self, demand):
        knots, curves, rungs = self.rung_error_knots, self.rung_error_curves, len(self.rung_intervals)
        demand(len(knots) in (0, rungs), "rung_error_knots", "none or one entry for each rung")
        demand(len(curves) == len(knots), "rung_error_curves", "as many entries as rung_error_knots")
        known = self.token_embedding == "basis" and "teff" in self.network_labels
        demand(not any(curves) or known, "rung_error_curves", "none without teff in network_labels")
        for own, of_labels in zip(knots, curves, strict=True):
            rising = all(a < b for each in own for a, b in zip(each[:-1], each[1:], strict=True))
            demand(rising and len(own) in (0, 2), "rung_error_knots", "none or two lists of rising numbers for a rung")
            sizes = [len(each) for each in own]
            fits = all([len(values) for values in parts] == sizes for parts in of_labels.values())
            named = set(of_labels) <= set(self.label_names)
            demand(fits and named, "rung_error_curves", "for some of label_names, as many values as knots")
            finite = all(math.isfinite(x) for parts in (own, *of_labels.values()) for each in parts for x in each)
            demand(finite, "rung_error_curves", "finite numbers, as those of rung_error_knots")

    def _check_corrections(self, demand):
        demand(all(len(each) == 3 and min(each) >= 0 for each in self.pixel_sets), "pixel_sets", "three numbers each")
        fields = {
            "label",
            "new",
            "rung",
            "inputs",
            "groups",
            "adds",
            "stars",
            "known",
            "range",
            "weight",
            "beyond",
            "pixels",
        }
        for settings in self.corrections:
            demand(set(settings) - {"scalars", "blind"} == fields, "corrections", f"entries with {sorted(fields)}")
            scalars = set(settings.get("scalars", ()))
            demand(scalars <= set(self.scalar_names), "corrections", f"scalars out of {list(self.scalar_names)}")
            demand(
                bool(scalars) >= bool(set(settings["groups"]) & set(SCALAR_GROUPS)), "corrections", "scalars of groups"
            )
            named = {settings["label"], *settings["inputs"]}
            demand(named <= set(self.label_names), "corrections", f"labels and inputs out of {list(self.label_names)}")
            demand(0 <= settings["rung"] < len(self.rung_intervals), "corrections", "rungs of rung_intervals")
            demand(
                set(settings["groups"]) <= set(CORRECTION_GROUPS), "corrections", f"groups out of {CORRECTION_GROUPS}"
            )
            demand(0 <= settings["known"] <= settings["stars"], "corrections", "known from 0 to stars")
            low, high = settings["range"]
            demand(low <= high, "corrections", "a range with the lowest value first")
            lowest = 0 if set(settings["groups"]) & set(PIXEL_GROUPS) else -1
            demand(lowest <= settings["pixels"] < len(self.pixel_sets), "corrections", "pixels out of pixel_sets")
        for key in {(settings["label"], settings["rung"]) for settings in self.corrections}:
            own = [each for each in self.corrections if (each["label"], each["rung"]) == key]
            sums = [sum(each[field] for each in own) for field in ("weight", "beyond")]
            one = all(abs(total - 1.0) < 1e-6 for total in sums)
            demand(one, "corrections", "weights that add up to 1 for a label and a rung")


SpectraFMConfig.register_for_auto_class()

__all__ = ["SpectraFMConfig"]
