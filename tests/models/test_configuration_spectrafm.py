"""The configuration: defaults, round trips, and errors that name the field."""

import copy
import pickle

import pytest
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError

from spectrafm_hf import __version__
from spectrafm_hf.models import SpectraFMConfig
from spectrafm_hf.models.configuration_spectrafm import PACKAGE_VERSION


BASIS = {
    "token_embedding": "basis",
    "num_intervals": 2,
    "num_coefficients": 4,
    "rung_intervals": [[0, 2]],
    "rung_components": [3],
}
CURVES = {
    **BASIS,
    "network_labels": ["teff"],
    "rung_error_knots": [[[4000.0], [-1.0]]],
    "rung_error_curves": [{"teff": [[0.1], [0.0]]}],
}
CONFIGS = {"basis": SpectraFMConfig(**BASIS), "original": SpectraFMConfig.original()}


@pytest.fixture(params=CONFIGS)
def config(request) -> SpectraFMConfig:
    return CONFIGS[request.param]


def test_a_config_survives_pickling_and_copying(config):
    assert pickle.loads(pickle.dumps(config)).to_dict() == config.to_dict()
    assert copy.deepcopy(config).to_dict() == config.to_dict()


def test_a_config_survives_save_load_save_byte_by_byte(config, tmp_path):
    config.save_pretrained(tmp_path / "first")
    loaded = SpectraFMConfig.from_pretrained(tmp_path / "first")
    assert loaded.to_json_string(use_diff=False) == config.to_json_string(use_diff=False)
    loaded.save_pretrained(tmp_path / "second")
    first, second = ((tmp_path / part / "config.json").read_bytes() for part in ("first", "second"))
    assert first == second


def test_the_original_is_the_published_architecture():
    config = SpectraFMConfig.original()
    assert (config.token_embedding, config.hidden_size) == ("value", 256)
    assert (config.encoder_attention_heads, config.encoder_ffn_dim) == ((16, 8), (2048, 1024))
    assert (config.decoder_attention_heads, config.decoder_ffn_dim) == ((16, 8, 4), (2048, 1024, 512))
    assert config.readout_dims == (2048, 1024, 512, 256)
    assert (config.dropout, config.layer_norm_eps, config.hidden_act) == (0.05, 1e-5, "gelu")
    assert dict(zip(config.label_names, config.label_scales, strict=True))["teff"] == 544.01


def test_the_original_takes_other_fields():
    config = SpectraFMConfig.original(hidden_size=64)
    assert config.hidden_size == 64 and config.token_embedding == "value"


def test_labels_have_ids_after_padding_and_flux():
    config = SpectraFMConfig(label_names=["teff", "logg", "fe_h", "alpha_m"])
    assert config.label_ids(["fe_h", "flux", "teff"]) == [4, 1, 2]
    with pytest.raises(ValueError, match=r"requests: expected names out of \['flux', 'teff'.*got \['vsini'\]"):
        config.label_ids(["teff", "vsini"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"token_embedding": "pixel"}, r"token_embedding: expected one of \('value', 'basis'\), got 'pixel'"),
        ({"hidden_size": 127}, "hidden_size: expected an even number, got 127"),
        ({"encoder_attention_heads": [8]}, "encoder_attention_heads: expected as many entries as encoder_ffn_dim"),
        ({"decoder_attention_heads": [8, 7, 4]}, "decoder_attention_heads: expected divisors of hidden_size=256"),
        ({"decoder_attention_heads": [], "decoder_ffn_dim": []}, "decoder_ffn_dim: expected at least one layer"),
        ({"label_names": ["a", "b", "a", "c"]}, "label_names: expected different names"),
        ({"label_names": ["a", "b", "flux", "c"]}, "label_names: expected no label called 'flux'"),
        ({"label_units": ["K"]}, r"label_units: expected 4 entries, got \['K'\]"),
        ({"label_centers": [0.0] * 5}, "label_centers: expected 4 entries"),
        ({"label_scales": [1.0, 1.0, 0.0, 1.0]}, "label_scales: expected positive numbers"),
        ({"label_error_factors": [1.0]}, "label_error_factors: expected none or one for each label"),
        ({"label_error_factors": [1.0, 1.0, 0.0, 1.0]}, "label_error_factors: expected positive numbers"),
        ({"flux_softening": -1.0}, "flux_softening: expected 0 or more"),
        ({**BASIS, "rung_pixels": [9, 9]}, "rung_pixels: expected none or one number for each rung"),
        ({**BASIS, "rung_ffn_dim": [[8], [8]]}, "rung_ffn_dim: expected none or a list for each rung"),
        ({**BASIS, "rung_pixels": [9]}, "rung_features: expected one number for each of rung_pixels, and not more"),
        (
            {**BASIS, "rung_pixels": [9], "rung_features": [9]},
            "flux_softening: expected a positive number with rung_pixels",
        ),
        (
            {**BASIS, "rung_error_curves": [{"teff": [[0.0], [0.0]]}], "rung_error_knots": [[[1.0], [1.0]]]},
            "rung_error_curves: expected none without teff in network_labels",
        ),
        (
            {**CURVES, "rung_error_curves": [{"teff": [[0.0], []]}]},
            "rung_error_curves: expected for some of label_names, as many values as knots",
        ),
        (
            {**CURVES, "rung_error_curves": [{"mass": [[0.0], [0.0]]}]},
            "rung_error_curves: expected for some of label_names, as many values as knots",
        ),
        (
            {**CURVES, "rung_error_curves": [{"teff": [[float("nan")], [0.0]]}]},
            "rung_error_curves: expected finite numbers, as those of rung_error_knots",
        ),
        ({**CURVES, "rung_error_curves": []}, "rung_error_curves: expected as many entries as rung_error_knots"),
        ({**CURVES, "rung_error_knots": [[], []]}, "rung_error_knots: expected none or one entry for each rung"),
        (
            {**CURVES, "rung_error_knots": [[[2.0, 1.0], [1.0]]]},
            "rung_error_knots: expected none or two lists of rising numbers for a rung",
        ),
        ({"label_scales": [1.0, 1.0, float("nan"), 1.0]}, "label_scales: expected positive numbers"),
        ({"label_scales": [1.0, 1.0, float("inf"), 1.0]}, "label_scales: expected positive numbers"),
        ({"label_centers": [0.0, 0.0, float("nan"), 0.0]}, "label_centers: expected finite numbers"),
    ],
)
def test_an_impossible_field_is_an_error_that_names_it(fields, message):
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        SpectraFMConfig(**fields)


def test_curves_of_an_older_checkpoint_belong_to_its_first_rung():
    settings = SpectraFMConfig(**{**BASIS, "rung_intervals": [[0, 1], [1, 2]], "rung_components": [3, 3]}).to_dict()
    del settings["rung_error_knots"], settings["rung_error_curves"]
    settings |= {"network_labels": ["teff"], "label_error_knots": [[4000.0], [-1.0]]}
    settings |= {"label_error_curves": {"teff": [[0.1], [0.2]]}}
    config = SpectraFMConfig.from_dict(settings)
    assert config.rung_error_knots == [[[4000.0], [-1.0]], []]
    assert config.rung_error_curves == [{"teff": [[0.1], [0.2]]}, {}]
    assert "label_error_curves" in settings  # what is given is not changed
    settings["label_error_curves"] = None
    assert SpectraFMConfig.from_dict(settings).rung_error_curves == ()
    assert SpectraFMConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


def test_a_field_of_the_wrong_type_is_an_error_that_names_it():
    with pytest.raises(StrictDataclassFieldValidationError, match="hidden_size"):
        SpectraFMConfig(hidden_size="wide")


def test_an_unknown_field_is_refused_by_name(config):
    with pytest.raises(
        ValueError, match=r"fields: expected those of SpectraFMConfig, got \['hiden_size', 'patch_size'\]"
    ):
        SpectraFMConfig(patch_size=4, hiden_size=8)
    assert SpectraFMConfig.from_dict(config.to_dict(), attn_implementation="eager").to_dict() == config.to_dict()


def test_the_config_has_the_attributes_that_transformers_expects(config):
    assert config.is_encoder_decoder == (config.token_embedding == "value")
    assert config.num_attention_heads == config.encoder_attention_heads[0]
    assert config.num_hidden_layers == len(config.encoder_ffn_dim)
    assert config.id2label == dict(enumerate(config.label_names)) and config.num_labels == len(config.label_names)
    assert config.label2id["teff"] == list(config.label_names).index("teff")


def test_the_code_of_a_checkpoint_states_its_version():
    assert __version__ == PACKAGE_VERSION


def test_unknown_content_of_a_config_file_is_kept(config):
    loaded = SpectraFMConfig.from_dict({**config.to_dict(), "rms_norm_eps": 0.5})
    assert loaded.rms_norm_eps == 0.5 and loaded.hidden_size == config.hidden_size
