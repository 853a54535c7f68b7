"""The published architecture: requirements of transformers, and those of SpectraFM."""

import copy
import math
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from spectrafm_hf.models import (
    SpectraFMConfig,
    SpectraFMForPrediction,
    SpectraFMModel,
    SpectraFMPredictionOutput,
    SpectraFMTokenizer,
    modeling_spectrafm,
)


TINY = {
    "hidden_size": 32,
    "encoder_attention_heads": [4, 2],
    "encoder_ffn_dim": [48, 32],
    "decoder_attention_heads": [4, 2, 1],
    "decoder_ffn_dim": [48, 32, 16],
    "readout_dims": [32, 16],
    # Ten times the usual: with the usual one all answers of a tiny model are nearly alike, and tests would see little.
    "initializer_range": 0.2,
}
# For tests that wait for a compiler.
SHALLOW = {
    "encoder_attention_heads": [4],
    "encoder_ffn_dim": [48],
    "decoder_attention_heads": [2],
    "decoder_ffn_dim": [32],
}


def make_model(seed: int = 0, **kwargs) -> SpectraFMForPrediction:
    torch.manual_seed(seed)
    return SpectraFMForPrediction(SpectraFMConfig.original(**{**TINY, **kwargs})).eval()


def make_tokenizer(**kwargs) -> SpectraFMTokenizer:
    return SpectraFMTokenizer(label_names=SpectraFMConfig.original().label_names, **kwargs)


def make_spectra(lengths=(40, 23, 40), seed: int = 0):
    """Spectra of different lengths on different grids, with bad pixels: wavelength, flux, flux_error."""
    random = np.random.default_rng(seed)
    wavelength = [np.linspace(15100 + 10 * i, 15200, n) for i, n in enumerate(lengths)]
    flux = [random.normal(1.0, 0.3, n) for n in lengths]
    error = [random.uniform(0.01, 0.1, n) for n in lengths]
    flux[0][5] = np.nan
    flux[1][4:10] = np.nan
    return wavelength, flux, error


REQUESTS = ["teff", 15150.0, "fe_h", "logg"]


def make_inputs(**call):
    """Three stars, the second of which has fewer tokens and no known scalar."""
    call = {"scalars": {"logg": [2.0, np.nan, 3.5], "teff": [4500.0, np.nan, np.nan]}, "requests": REQUESTS, **call}
    return make_tokenizer()(*make_spectra(), **call)


@pytest.fixture
def model() -> SpectraFMForPrediction:
    return make_model()


@pytest.fixture
def inputs():
    return make_inputs()


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def assert_same_outputs(got, expected, **tolerance):
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], **tolerance)


# ------------------------------------------------------------------------------------------------ saving and loading


def test_a_loaded_model_gives_the_same_answers_and_misses_no_key(model, inputs, tmp_path):
    model.save_pretrained(tmp_path)
    loaded, info = SpectraFMForPrediction.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    with torch.no_grad():
        assert_same_outputs(loaded(**inputs), model(**inputs), rtol=0, atol=0)


def test_config_weights_and_tokenizer_survive_save_load_save_byte_by_byte(model, tmp_path):
    tokenizer = make_tokenizer(valid_flux=[0.1, 3.0], max_length=7, sampling="random")
    model.save_pretrained(tmp_path / "first")
    tokenizer.save_pretrained(tmp_path / "first")
    SpectraFMForPrediction.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    SpectraFMTokenizer.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    first, second = folder_bytes(tmp_path / "first"), folder_bytes(tmp_path / "second")
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "tokenizer_config.json"} <= first.keys()
    assert first == second


def test_the_headless_model_loads_from_a_checkpoint_with_a_head_and_back(model, inputs, tmp_path):
    model.save_pretrained(tmp_path / "head")
    base = SpectraFMModel.from_pretrained(tmp_path / "head")
    with torch.no_grad():
        assert_same_outputs(base(**model_inputs(inputs)), model.model(**model_inputs(inputs)), rtol=0, atol=0)
    base.save_pretrained(tmp_path / "base")
    again, info = SpectraFMForPrediction.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert {key.split(".")[0] for key in info["missing_keys"]} == {"readout"}
    assert all(torch.isfinite(parameter).all() for parameter in again.parameters())


def model_inputs(inputs) -> dict:
    """Without what only the head reads."""
    return {key: value for key, value in inputs.items() if key not in ("flux_center", "flux_scale", "labels")}


# ---------------------------------------------------------------------------------------------------- initialisation


def assert_is_initialised(name: str, tensor: torch.Tensor, config: SpectraFMConfig):
    """As `_init_weights` does it, and not as torch does where nobody asks."""
    assert torch.isfinite(tensor).all(), name
    if "value_embedding" in name:
        assert (tensor[0] == 0).all(), name  # padding
        assert tensor[1:].std() == pytest.approx(config.initializer_range, rel=0.3), name
    elif "layer_norm.weight" in name:
        assert (tensor == 1).all(), name
    elif name.endswith("bias"):
        assert (tensor == 0).all(), name
    else:
        assert tensor.std() == pytest.approx(config.initializer_range, rel=0.5), name


def test_every_parameter_and_buffer_is_initialised_when_built_on_the_meta_device():
    config = SpectraFMConfig.original(**TINY)
    with torch.device("meta"):
        model = SpectraFMForPrediction(config)
    model.to_empty(device="cpu")
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data.fill_(math.nan)
        tensor._is_hf_initialized = False
    for module in model.modules():
        module._is_hf_initialized = False
    torch.manual_seed(0)
    model.initialize_weights()
    for name, tensor in model.state_dict().items():
        assert_is_initialised(name, tensor, config)


def test_a_fresh_model_is_initialised_and_keeps_nothing_outside_its_state(model):
    state = model.state_dict()
    for name, tensor in state.items():
        assert_is_initialised(name, tensor, model.config)
    # A buffer that is not saved would come back uninitialised.
    assert {name for name, _ in model.named_buffers()} <= state.keys()


def test_whatever_a_checkpoint_misses_is_initialised_and_the_rest_is_loaded(model, tmp_path):
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.fill_(7.0)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for part in range(2):  # every other one, so that modules are found with half of their parameters
        kept = {name: tensor for i, (name, tensor) in enumerate(weights.items()) if i % 2 == part}
        save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
        torch.manual_seed(0)
        loaded, info = SpectraFMForPrediction.from_pretrained(tmp_path, output_loading_info=True)
        assert set(info["missing_keys"]) == weights.keys() - kept.keys()
        for name, tensor in loaded.state_dict().items():
            if name in kept:
                assert (tensor == 7.0).all(), name
            else:
                assert_is_initialised(name, tensor, model.config)


def test_the_original_has_the_published_number_of_parameters_less_the_unused_rows():
    with torch.device("meta"):
        model = SpectraFMForPrediction(SpectraFMConfig.original())
    # The published tables have 7,520 rows (padding, 7,514 pixels, 5 labels), of which 7,513 pixel rows are never used;
    # a row is 256 numbers in each of two tables.
    assert sum(parameter.numel() for parameter in model.parameters()) == 11_870_722 - 7_513 * 2 * 256


# ------------------------------------------------------------------------------------------------------------ output


def test_hidden_states_and_attentions_have_the_documented_shapes(inputs):
    model = make_model(attn_implementation="eager")
    config = model.config
    with torch.no_grad():
        outputs = model(**inputs, output_hidden_states=True, output_attentions=True)
    n_stars, n_requests = inputs["request_ids"].shape
    n_tokens = inputs["flux"].shape[1] + inputs["scalar_ids"].shape[1]
    n_keys = n_tokens + 1
    assert outputs.encoder_last_hidden_state.shape == (n_stars, n_tokens, config.hidden_size)
    encoder = [tuple(state.shape) for state in outputs.encoder_hidden_states]
    assert encoder == [(n_stars, n_tokens, config.hidden_size)] * (len(config.encoder_ffn_dim) + 1)
    decoder = [tuple(state.shape) for state in outputs.decoder_hidden_states]
    assert decoder == [(n_stars, n_requests, config.hidden_size)] * (len(config.decoder_ffn_dim) + 1)
    assert torch.equal(outputs.encoder_hidden_states[-1], outputs.encoder_last_hidden_state)
    shapes = [tuple(weights.shape) for weights in outputs.encoder_attentions]
    assert shapes == [(n_stars, heads, n_tokens, n_keys) for heads in config.encoder_attention_heads]
    shapes = [tuple(weights.shape) for weights in outputs.cross_attentions]
    assert shapes == [(n_stars, heads, n_requests, n_keys) for heads in config.decoder_attention_heads]
    # Padding (the second star has no scalar) gets no attention; what remains adds up to one.
    for weights in (*outputs.encoder_attentions, *outputs.cross_attentions):
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(weights.shape[:-1]))
        assert (weights[1, ..., inputs["flux"].shape[1] : n_tokens] == 0).all()
    for cls in (SpectraFMModel, SpectraFMForPrediction):
        part = model.model if cls is SpectraFMModel else model
        with torch.no_grad():
            assert part(**(model_inputs(inputs) if cls is SpectraFMModel else inputs)).encoder_attentions is None


@pytest.mark.parametrize("where", ["argument", "config"])
@pytest.mark.parametrize("part", ["head", "base"])
def test_the_tuple_has_the_fields_of_the_output_in_order(where, part, inputs):
    model = make_model(attn_implementation="eager")
    if part == "base":
        model, inputs = model.model, model_inputs(inputs)
    with torch.no_grad():
        expected = model(**inputs, output_hidden_states=True, output_attentions=True)
        if where == "config":
            model.config.return_dict = False
        arguments = {"return_dict": False} if where == "argument" else {}
        got = model(**inputs, output_hidden_states=True, output_attentions=True, **arguments)
    assert isinstance(got, tuple)
    torch.testing.assert_close(got, expected.to_tuple(), rtol=0, atol=0)


def test_answers_are_deterministic_in_eval_mode_and_not_under_dropout(inputs):
    model = make_model(dropout=0.1, attention_dropout=0.1)
    with torch.no_grad():
        assert_same_outputs(model(**inputs), model(**inputs), rtol=0, atol=0)
        model.train()
        assert not torch.equal(model(**inputs).mean, model(**inputs).mean)


def test_values_and_errors_are_mean_and_variance_in_physical_units(model, inputs):
    with torch.no_grad():
        outputs = model(**inputs)
    names = list(model.config.label_names)
    for column, request in enumerate(REQUESTS):
        if request == 15150.0:
            center, scale = inputs["flux_center"][:, column], inputs["flux_scale"][:, column]
        else:
            label = names.index(request)
            center, scale = model.config.label_centers[label], model.config.label_scales[label]
        torch.testing.assert_close(outputs.predictions[:, column], outputs.mean[:, column] * scale + center)
        sigma = torch.exp(outputs.log_variance[:, column] / 2)
        torch.testing.assert_close(outputs.prediction_errors[:, column], sigma * scale)


def test_without_requests_all_labels_are_predicted(model, inputs):
    everything = make_inputs(requests=list(model.config.label_names))
    bare = {key: value for key, value in everything.items() if key != "request_ids"}
    with torch.no_grad():
        assert_same_outputs(model(**bare), model(**everything), rtol=0, atol=0)
        base = model.model
        assert_same_outputs(base(**bare), base(**everything), rtol=0, atol=0)


def test_an_output_is_built_from_pairs_as_data_parallel_does_and_survives_pickling(model, inputs):
    with torch.no_grad():
        outputs = model(**inputs)
    rebuilt = SpectraFMPredictionOutput((name, outputs[name]) for name in outputs)
    assert_same_outputs(rebuilt, outputs, rtol=0, atol=0)
    assert rebuilt.loss is None
    assert_same_outputs(pickle.loads(pickle.dumps(outputs)), outputs, rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------ batches and masking


def test_outputs_have_their_old_names_for_one_version_and_the_methods_of_dictionaries(model, inputs):
    with torch.no_grad():
        outputs = model(**inputs)
    with pytest.warns(FutureWarning, match=r"outputs\['values'\] is called 'predictions' now"):
        assert outputs["values"] is outputs.predictions
    with pytest.warns(FutureWarning, match=r"outputs\['errors'\] is called 'prediction_errors' now"):
        assert outputs["errors"] is outputs.prediction_errors
    with pytest.warns(FutureWarning, match=r"outputs.errors is called prediction_errors now") as warned:
        assert outputs.errors is outputs.prediction_errors
    assert warned[0].filename == __file__
    assert list(outputs.values()) == list(outputs.to_tuple()) and "values" not in outputs
    with pytest.raises(KeyError):
        outputs["value"]


def test_other_arguments_than_the_spectrum_are_named(model, inputs):
    with pytest.raises(TypeError, match="positional arguments"):
        model(inputs["flux"], inputs["wavelength"], inputs["attention_mask"], inputs["scalar_ids"])


def test_a_star_alone_is_answered_as_in_a_padded_batch(model, inputs):
    wavelength, flux, error = make_spectra()
    with torch.no_grad():
        together = model(**inputs)
        for star, scalars in enumerate(({"logg": [2.0], "teff": [4500.0]}, None, {"logg": [3.5]})):
            alone = make_tokenizer()(wavelength[star], flux[star], error[star], scalars=scalars, requests=REQUESTS)
            got = model(**alone)
            torch.testing.assert_close(got.mean[0], together.mean[star], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(got.log_variance[0], together.log_variance[star], rtol=1e-5, atol=1e-5)


def test_masked_pixels_never_change_predictions(model, inputs):
    with torch.no_grad():
        expected = model(**inputs)
        tokens = ~inputs["attention_mask"]
        assert tokens.any()
        for poison in (5.0, math.nan, math.inf):
            spoilt = copy.deepcopy(inputs)
            spoilt["flux"][tokens] = poison
            spoilt["wavelength"][tokens] = 15123.0
            torch.testing.assert_close(model(**spoilt).mean, expected.mean, rtol=1e-6, atol=1e-6)


def test_without_a_mask_all_tokens_count(model, inputs):
    inputs["attention_mask"][:] = True
    bare = {key: value for key, value in inputs.items() if key != "attention_mask"}
    with torch.no_grad():
        assert_same_outputs(model(**bare), model(**inputs), rtol=0, atol=0)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_star_of_which_nothing_is_known_gets_finite_answers_and_gradients(attention, inputs):
    model = make_model(attn_implementation=attention)
    expected = model(**inputs).mean[0]
    inputs["attention_mask"][1] = False
    outputs = model(**inputs)
    assert torch.isfinite(outputs.mean).all() and torch.isfinite(outputs.prediction_errors).all()
    torch.testing.assert_close(outputs.mean[0], expected)
    outputs.mean.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_the_order_of_tokens_does_not_matter(model, inputs):
    order = torch.randperm(inputs["flux"].shape[1], generator=torch.Generator().manual_seed(0))
    shuffled = dict(inputs)
    for key in ("flux", "wavelength", "attention_mask"):
        shuffled[key] = inputs[key][:, order]
    with torch.no_grad():
        torch.testing.assert_close(model(**shuffled).mean, model(**inputs).mean, rtol=1e-5, atol=1e-5)


def test_requests_do_not_see_each_other(model, inputs):
    with torch.no_grad():
        together = model(**inputs).mean
        assert not torch.isclose(together[:, :1], together[:, 1:]).all()
        for column, request in enumerate(REQUESTS):
            alone = model(**make_inputs(requests=[request])).mean
            torch.testing.assert_close(alone[:, 0], together[:, column], rtol=1e-6, atol=1e-6)


def test_answers_depend_on_all_that_a_token_carries(model, inputs):
    with torch.no_grad():
        expected = model(**inputs).mean[:, 0]
        for key, change in {"flux": 0.5, "wavelength": 3.0, "scalar_values": 100.0}.items():
            changed = {**inputs, key: inputs[key] + change}
            assert not torch.allclose(model(**changed).mean[:, 0], expected, atol=1e-4), key


# --------------------------------------------------------------------------------------------------------- attention


def test_eager_and_sdpa_attention_agree(inputs):
    answers = []
    for attention in ("eager", "sdpa"):
        model = make_model(attn_implementation=attention)
        assert model.model.encoder.config._attn_implementation == attention
        inputs_with_labels = {**inputs, "labels": torch.full(inputs["request_ids"].shape, 2.0)}
        outputs = model(**inputs_with_labels)
        outputs.loss.backward()
        answers.append((outputs.mean, outputs.log_variance, [p.grad for p in model.parameters()]))
    torch.testing.assert_close(*answers, rtol=1e-4, atol=1e-5)


def test_the_attention_can_be_switched_on_a_loaded_model(model, inputs):
    with torch.no_grad():
        model.set_attn_implementation("eager")
        outputs = model(**inputs, output_attentions=True)
        assert len(outputs.cross_attentions) == len(model.config.decoder_ffn_dim)
        model.set_attn_implementation("sdpa")
        torch.testing.assert_close(model(**inputs).mean, outputs.mean, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # several, of torch and transformers, in torch's compiler
def test_flex_attention_agrees(inputs):
    model = make_model(**SHALLOW)
    with torch.no_grad():
        expected = model(**inputs).mean
        model.set_attn_implementation("flex_attention")
        torch.testing.assert_close(model(**inputs).mean, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n_requests", [3, 5, 6])
def test_flash_attention_gets_a_mask_that_keeps_all_queries(n_requests):
    """As many queries as keys: its kernels would drop the padding of these from those too."""
    config = SpectraFMConfig.original(**TINY)
    config._attn_implementation = "flash_attention_2"
    tokens, mask = torch.zeros(2, 5, config.hidden_size), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    requests = torch.zeros(2, n_requests, config.hidden_size)
    found = modeling_spectrafm.make_attention_mask(config, requests, tokens, mask)
    assert found.shape == (2, 1, n_requests, 6)
    assert (found[1, 0] == torch.tensor([True] * 3 + [False] * 2 + [True])).all()


# ------------------------------------------------------------------------------------------------------ the vocabulary


def test_input_embeddings_are_got_and_set(model, inputs):
    with torch.no_grad():
        before = model(**inputs).mean
        table = model.get_input_embeddings()
        assert table is model.model.get_input_embeddings()
        assert table.weight.shape == (2 + len(model.config.label_names), model.config.hidden_size)
        new = torch.nn.Embedding.from_pretrained(table.weight + 1.0)
        model.set_input_embeddings(new)
        assert model.get_input_embeddings() is new
        assert not torch.allclose(model(**inputs).mean, before)


def test_a_new_label_leaves_all_other_answers_bit_by_bit_and_after_a_load_but_for_rounding(model, inputs, tmp_path):
    tokenizer = make_tokenizer()
    with torch.no_grad():
        before = model(**inputs, output_hidden_states=True)
        model.add_label("ca_fe", unit="dex", center=0.1, scale=0.2)
        assert_same_outputs(model(**inputs, output_hidden_states=True), before, rtol=0, atol=0)
        model.save_pretrained(tmp_path)
        loaded, info = SpectraFMForPrediction.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert_same_outputs(loaded(**inputs, output_hidden_states=True), before, rtol=1e-5, atol=1e-7)

        tokenizer.add_label("ca_fe")
        assert tokenizer.label_names == list(loaded.config.label_names)
        requested = tokenizer(*make_spectra(), scalars={"ca_fe": [0.3, 0.1, np.nan]}, requests=["teff", "ca_fe"])
        answers, again = model(**requested), loaded(**requested)
    assert_same_outputs(again, answers, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(answers.predictions[:, 1], answers.mean[:, 1] * 0.2 + 0.1)
    assert not torch.isclose(answers.mean[:, 0], answers.mean[:, 1]).any()


def test_a_new_label_can_be_learnt_and_frozen_tables_stay_frozen(model):
    table = model.model.embeddings.value_embedding
    table.bias.weight.requires_grad_(False)
    model.add_label("ca_fe")
    assert table.weight.weight.requires_grad and not table.bias.weight.requires_grad
    inputs = make_inputs(requests=["teff"])
    model(**{**inputs, "request_ids": torch.full((3, 1), len(table.weight.weight) - 1)}).mean.sum().backward()
    assert table.weight.weight.grad[-1].abs().sum() > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "teff"}, r"name: expected a name not yet in \['flux', 'teff'.*got 'teff'"),
        ({"name": "flux"}, "name: expected a name not yet in .*got 'flux'"),
        ({"name": "ca_fe", "scale": 0.0}, "scale: expected a positive number, got 0.0"),
        ({"name": "ca_fe", "scale": math.nan}, "scale: expected a positive number, got nan"),
        ({"name": "ca_fe", "center": math.nan}, "center: expected a finite number, got nan"),
    ],
)
def test_a_label_that_cannot_be_added_is_a_clear_error_and_changes_nothing(arguments, message):
    model = make_model()
    before = model.config.to_dict()
    with pytest.raises(ValueError, match=message):
        model.add_label(**arguments)
    assert model.config.to_dict() == before


def test_resizing_the_vocabulary_by_number_is_refused_with_the_alternative(model):
    for part in (model, model.model):
        with pytest.raises(NotImplementedError, match="add_label"):
            part.resize_token_embeddings(20)


# -------------------------------------------------------------------------------------------------------------- loss


def numpy_loss(mean, log_variance, labels, label_errors, center, scale) -> float:
    """The loss of the paper, in float64, one request after the other."""
    terms = []
    for index in np.ndindex(labels.shape):
        if np.isnan(labels[index]):
            continue
        sigma = label_errors[index] / scale[index]
        variance = np.exp(log_variance[index]) + (0.0 if np.isnan(sigma) else sigma) ** 2 + 1e-8
        target = (labels[index] - center[index]) / scale[index]
        terms.append(0.5 * ((target - mean[index]) ** 2 / variance + np.log(variance)))
    return float(np.mean(terms)) if terms else 0.0


def test_student_t_hardly_learns_from_a_wrong_label_and_tends_to_the_gaussian():
    mean, log_variance = torch.zeros(2, requires_grad=True), torch.zeros(2)
    modeling_spectrafm.prediction_loss(mean, log_variance, torch.tensor([0.1, 50.0]), None, 3.0).backward()
    core, wrong = mean.grad.abs()
    assert wrong < 0.05 and core == pytest.approx(0.5 * 4 / 3 * 0.1, rel=0.02)
    target = torch.tensor([0.3, -2.0])
    loss = modeling_spectrafm.prediction_loss
    gaussian = loss(mean, log_variance, target)
    assert loss(mean, log_variance, target, None, 1e6).item() == pytest.approx(gaussian.item(), rel=1e-3)


def test_the_loss_is_that_of_the_paper_and_ignores_unknown_labels(model, inputs):
    labels = np.array([[4500.0, 0.9, -0.5, np.nan], [np.nan, 1.1, np.nan, 2.0], [5000.0, np.nan, 0.1, 3.0]])
    errors = np.array([[80.0, 0.05, np.nan, 0.1], [50.0, np.nan, 0.1, np.nan], [0.0, 0.1, 0.05, 0.1]])
    config = model.config
    table = {name: config.label_names.index(name) for name in REQUESTS if isinstance(name, str)}
    center = np.array([[config.label_centers[table[r]] if r in table else 1.0 for r in REQUESTS]] * 3)
    scale = np.array([[config.label_scales[table[r]] if r in table else 1.0 for r in REQUESTS]] * 3)
    as_tensor = lambda array: torch.tensor(array, dtype=torch.float32)  # noqa: E731
    with torch.no_grad():
        outputs = model(**inputs, labels=as_tensor(labels), label_errors=as_tensor(errors))
        arrays = outputs.mean.double().numpy(), outputs.log_variance.double().numpy()
        expected = numpy_loss(*arrays, labels, errors, center, scale)
        assert outputs.loss.item() == pytest.approx(expected, rel=1e-5)
        # No errors are errors of zero.
        without = model(**inputs, labels=as_tensor(labels)).loss.item()
        assert without == pytest.approx(numpy_loss(*arrays, labels, np.zeros_like(errors), center, scale), rel=1e-5)
        assert model(**inputs).loss is None


def test_a_batch_without_a_known_label_has_zero_loss_and_finite_gradients(model, inputs):
    labels = torch.full(inputs["request_ids"].shape, math.nan)
    loss = model(**inputs, labels=labels, label_errors=labels).loss
    assert loss.item() == 0.0
    loss.backward()
    assert all((p.grad == 0).all() for p in model.parameters() if p.grad is not None)


def test_unknown_labels_have_no_gradient_and_known_ones_have(model, inputs):
    labels = torch.full(inputs["request_ids"].shape, math.nan)
    labels[2, 0] = 5200.0
    model(**inputs, labels=labels, label_errors=labels).loss.backward()
    gradient = model.get_input_embeddings().weight.grad
    assert torch.isfinite(gradient).all()
    teff, fe_h = (model.config.label_ids([name])[0] for name in ("teff", "fe_h"))
    assert gradient[teff].abs().sum() > 0
    assert gradient[fe_h].abs().sum() == 0  # requested, but unknown, and no input


def test_padded_requests_do_not_count_in_the_loss(model, inputs):
    labels = torch.full(inputs["request_ids"].shape, 2.0)
    padded = {**inputs, "request_ids": inputs["request_ids"].clone()}
    padded["request_ids"][:, 2:] = 0
    with torch.no_grad():
        unknown = labels.clone()
        unknown[:, 2:] = math.nan
        expected = model(**inputs, labels=unknown).loss
        torch.testing.assert_close(model(**padded, labels=labels).loss, expected)


# ---------------------------------------------------------------------------------------------- what can be asked for


def test_labels_to_spectrum_needs_no_spectrum_tokens(model):
    tokenizer = make_tokenizer(standardize_center=0.9, standardize_scale=0.1)
    grid = [15110.0, 15150.0, 15190.0]
    with torch.no_grad():
        inputs = tokenizer(None, scalars={"teff": [4500.0, 5500.0], "logg": [2.0, np.nan]}, requests=grid)
        assert inputs["flux"].shape[1] == 0
        outputs = model(**inputs)
    assert outputs.predictions.shape == (2, 3)
    torch.testing.assert_close(outputs.predictions, outputs.mean * 0.1 + 0.9)
    torch.testing.assert_close(outputs.prediction_errors, torch.exp(outputs.log_variance / 2) * 0.1)
    assert not torch.isclose(outputs.mean[0], outputs.mean[1]).any()  # labels matter
    assert not torch.isclose(outputs.mean[:, 0], outputs.mean[:, 1]).any()  # and wavelength does


# ---------------------------------------------------------------------------------------------------------- bad input


def without_rows(tensor):
    return tensor[:-1]


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("flux", lambda x: x[..., 0]),
        ("flux", lambda x: x[..., None]),
        ("wavelength", lambda x: x[:, :-1]),
        ("wavelength", lambda x: x[0]),
        ("wavelength", lambda x: x.bfloat16()),
        ("wavelength", lambda x: x.half()),
        ("attention_mask", lambda x: x[:, 1:]),
        ("scalar_ids", without_rows),
        ("scalar_ids", lambda x: x[:, 0]),
        ("scalar_values", lambda x: x[:, :1]),
        ("scalar_values", lambda x: None),
        ("request_ids", without_rows),
        ("request_ids", lambda x: x[:, 0]),
        ("request_wavelength", lambda x: x[:, :1]),
        ("request_wavelength", lambda x: x.bfloat16()),
        ("flux_scale", lambda x: None),
        ("flux_center", lambda x: x[:, :1]),
        ("labels", lambda x: x[:, :1]),
        ("label_errors", lambda x: x[0]),
    ],
)
def test_a_wrong_shape_is_an_error_that_names_the_field(field, change):
    inputs = make_inputs()
    inputs["labels"] = inputs["label_errors"] = torch.ones(inputs["request_ids"].shape)
    inputs[field] = change(inputs[field])
    with pytest.raises(ValueError, match=rf"^{field}: expected .*, got "):
        make_model()(**inputs)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("wavelength", "flux: expected it with wavelength, got None"),
        ("flux", "coefficients: expected them, or flux, got neither"),
    ],
)
def test_a_missing_spectrum_is_a_clear_error(model, inputs, missing, message):
    with pytest.raises(ValueError, match=message):
        model(**{name: values for name, values in inputs.items() if name != missing})


# ---------------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_and_answers_nearly_the_same_in_float32(dtype, inputs):
    model = make_model()
    labels = torch.full(inputs["request_ids"].shape, 2.0)
    with torch.no_grad():
        expected = model(**inputs, labels=labels)
        got = model.to(dtype)(**inputs, labels=labels)
    assert got.encoder_last_hidden_state.dtype == dtype
    for name in ("loss", "mean", "log_variance", "predictions", "prediction_errors"):
        assert got[name].dtype == torch.float32
        assert torch.isfinite(got[name]).all()
    torch.testing.assert_close(got.mean, expected.mean, rtol=0.1, atol=0.1)
    # The spectrum itself may be in half precision; wavelengths may not.
    half = {key: value.to(dtype) if key == "flux" else value for key, value in inputs.items()}
    with torch.no_grad():
        torch.testing.assert_close(model(**half).mean, got.mean, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_wavelengths_distinct(model, dtype):
    wavelength = torch.tensor([[15987.3, 15988.3]])
    assert torch.tensor(15987.3).bfloat16() == torch.tensor(15988.3).bfloat16() == 16000
    encoding = model.model.embeddings.wavelength_encoding
    with torch.no_grad():
        expected = encoding(wavelength)
        got = encoding.to(dtype)(wavelength).float()
    assert (got[0, 0] - got[0, 1]).abs().max() > 0.1
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_the_wavelength_encoding_is_that_of_the_paper(model):
    wavelength = torch.linspace(15100.0, 17000.0, 500)[None]
    found = model.model.embeddings.wavelength_encoding(wavelength)[0].double().numpy()
    frequency = 10000.0 ** (-np.arange(0, 32, 2) / 32)
    angle = 1000.0 * (wavelength[0].double().numpy()[:, None] - 15000.0) / 2000.0 * frequency
    np.testing.assert_allclose(found[:, 0::2], np.sin(angle), atol=2e-4)  # the angle, up to 1000, is in float32
    np.testing.assert_allclose(found[:, 1::2], np.cos(angle), atol=2e-4)


@pytest.mark.parametrize("how", ["dtype", "autocast"])
def test_labels_are_not_rounded_to_the_steps_of_half_precision(how):
    model = make_model()
    random = np.random.default_rng(0)
    wavelength, flux = np.linspace(15100, 15200, 40), random.normal(1.0, 0.3, (64, 40))
    inputs = make_tokenizer()(wavelength, flux, requests=["teff"])
    with torch.no_grad():
        if how == "dtype":
            outputs = model.to(torch.bfloat16)(**inputs)
        else:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                outputs = model(**inputs)
    for answers in (outputs.mean, outputs.log_variance, outputs.predictions, outputs.prediction_errors):
        assert (answers != answers.bfloat16().float()).float().mean() > 0.9
    assert (
        outputs.predictions[1:] - outputs.predictions[:-1]
    ).abs().min() < 4.0  # Kelvin; a step of bfloat16 there is 32


def test_loading_in_half_precision_keeps_the_scales_of_the_labels(model, inputs, tmp_path):
    model.save_pretrained(tmp_path)
    half = SpectraFMForPrediction.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    with torch.no_grad():
        outputs = half(**inputs)
    teff = half.config.label_names.index("teff")
    center, scale = half.config.label_centers[teff], half.config.label_scales[teff]
    torch.testing.assert_close(outputs.predictions[:, 0], outputs.mean[:, 0] * scale + center, rtol=1e-6, atol=1e-3)


# ------------------------------------------------------------------------------------------------ training, compiling


def test_gradient_checkpointing_gives_the_same_gradients(inputs):
    labels = torch.full(inputs["request_ids"].shape, 2.0)
    gradients = []
    for checkpointing in (False, True):
        model = make_model(dropout=0.1, attention_dropout=0.1).train()
        if checkpointing:
            model.activation_checkpointing_enable()
            assert model.is_activation_checkpointing
        torch.manual_seed(1)
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


def test_every_parameter_takes_part_in_training(model, inputs):
    model(**inputs, labels=torch.full(inputs["request_ids"].shape, 2.0)).loss.backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not (p.grad != 0).any()]
    assert idle == []


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch's compiler
@pytest.mark.timeout(900)
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_the_compiled_model_in_one_graph_gives_the_same_answers(backend, inputs):
    model = make_model(**(SHALLOW if backend == "inductor" else {}))
    labels = torch.full(inputs["request_ids"].shape, 2.0)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        expected, got = model(**inputs, labels=labels), compiled(**inputs, labels=labels)
    assert isinstance(got, SpectraFMPredictionOutput)
    assert_same_outputs(got, expected, rtol=1e-4, atol=1e-4)


# transformers' own way of collecting hidden states is such a side effect.
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
@pytest.mark.parametrize("strict", [False, True])
def test_the_exported_model_gives_the_same_answers(strict, inputs):
    model = make_model()
    with torch.no_grad():
        exported = torch.export.export(model, (), dict(inputs), strict=strict).module()
        got = exported(**inputs)
        assert isinstance(got, SpectraFMPredictionOutput)
        assert_same_outputs(got, model(**inputs), rtol=1e-5, atol=1e-5)


def test_an_export_with_free_sizes_takes_any_number_of_stars_and_tokens():
    model = make_model()
    tokenizer = make_tokenizer()
    batch, tokens = torch.export.Dim("batch", min=2), torch.export.Dim("tokens", min=2)
    call = {"requests": ["teff", "logg"]}
    inputs = dict(tokenizer(*make_spectra(), **call))
    shapes = {key: {0: batch} if key == "request_ids" else {0: batch, 1: tokens} for key in inputs}
    other = tokenizer(*make_spectra((30, 50, 20, 35, 70), seed=1), **call)
    with torch.no_grad():
        exported = torch.export.export(model, (), inputs, dynamic_shapes=dict(shapes), strict=False).module()
        torch.testing.assert_close(exported(**other).mean, model(**other).mean, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:# The axis name:UserWarning")
@pytest.mark.filterwarnings("ignore:.*treespec.* is deprecated:FutureWarning")
@pytest.mark.parametrize("format", ["dynamo", "onnx"])
def test_the_exporters_of_transformers_give_the_same_answers_for_any_number_of_stars_and_tokens(format):
    from transformers.exporters import DynamoConfig, DynamoExporter, OnnxConfig, OnnxExporter

    model, tokenizer, call = make_model(**SHALLOW), make_tokenizer(), {"requests": ["teff", "logg"]}
    inputs, other = (
        dict(tokenizer(*make_spectra(lengths, seed), **call)) for lengths, seed in (((40, 23, 40), 0), ((30, 50), 1))
    )
    stars, tokens = torch.export.Dim("stars", min=2), torch.export.Dim("tokens", min=2)
    free = {name: {0: stars} if name == "request_ids" else {0: stars, 1: tokens} for name in inputs}
    kinds = {"dynamo": (DynamoExporter, DynamoConfig), "onnx": (OnnxExporter, OnnxConfig)}
    exporter, settings = kinds[format]
    exported = exporter().export(model, inputs, config=settings(dynamic=True, dynamic_shapes=free))
    for spectra in (inputs, other):
        with torch.no_grad():
            expected, found = model(**spectra), exported(**spectra)
        off = (torch.as_tensor(found["predictions"]) - expected.predictions) / expected.prediction_errors
        assert off.abs().max() < 1e-3


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # used by peft
def test_peft_trains_lora_and_the_read_out_and_nothing_else(inputs, tmp_path):
    peft = pytest.importorskip("peft")
    model = make_model()
    labels = torch.tensor([[4500.0, 1.0, -0.4, 2.0], [5000.0, 1.0, 0.1, 3.0], [4000.0, 1.0, -0.2, 1.0]])
    with torch.no_grad():
        untouched = model(**inputs).mean
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["readout"], lora_dropout=0.0)
    adapted = peft.get_peft_model(model, lora)
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name or "readout" in name for name in trained)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(20):
        loss = adapted(**inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    adapted.eval()
    adapted.save_pretrained(tmp_path)
    with torch.no_grad():
        answers = adapted(**inputs).mean
        with adapted.disable_adapter():
            torch.testing.assert_close(adapted(**inputs).mean, untouched, rtol=0, atol=0)
        again = peft.PeftModel.from_pretrained(make_model(), tmp_path).eval()
        torch.testing.assert_close(again(**inputs).mean, answers, rtol=0, atol=0)


def test_a_copied_and_a_pickled_model_give_the_same_answers(model, inputs):
    with torch.no_grad():
        expected = model(**inputs)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert_same_outputs(twin(**inputs), expected, rtol=0, atol=0)


def test_every_field_of_the_config_is_used_by_the_model():
    source = "".join(
        path.read_text() for path in Path(modeling_spectrafm.__file__).parent.glob("[efmrs]*_spectrafm.py")
    )
    own = set(SpectraFMConfig.__annotations__)
    assert {"hidden_size", "label_scales"} <= own
    unused = {field for field in own if not re.search(rf"config\.{field}\b", source)}
    assert unused == {"label_units"}  # for whoever shows the answers


def test_error_factors_multiply_the_errors_of_their_label_and_nothing_else(model, inputs):
    n_labels = len(model.config.label_names)
    requests = {**inputs, "request_ids": torch.arange(2, 2 + n_labels).expand(len(inputs["flux"]), -1)}
    requests = {key: value for key, value in requests.items() if not key.startswith(("label", "request_w", "flux_"))}
    with torch.no_grad():
        before = model(**requests)
        model.config.label_error_factors = [1.5, *[1.0] * (n_labels - 1)]
        after = model(**requests)
        model.add_label("ca_fe")
        assert len(model.config.label_error_factors) == n_labels + 1
        assert_same_outputs(model(**requests), after, rtol=0, atol=0)
    torch.testing.assert_close(after.prediction_errors[:, 0], 1.5 * before.prediction_errors[:, 0])
    torch.testing.assert_close(after.prediction_errors[:, 1:], before.prediction_errors[:, 1:])
    torch.testing.assert_close(after.predictions, before.predictions, rtol=0, atol=0)
    torch.testing.assert_close(after.log_variance[:, 0], before.log_variance[:, 0] + 2 * math.log(1.5))
