"""The model on evidence: masked tokens have no effect, inputs are checked, and it learns."""

import doctest

import numpy as np
import pytest
import torch
from transformers import AutoModelForTimeSeriesPrediction, AutoTokenizer, pipeline

from spectrafm_hf.checkpoints import load_checkpoint, save_checkpoint
from spectrafm_hf.models import SpectraFMConfig, SpectraFMForPrediction, SpectraFMModel, SpectraFMTokenizer
from spectrafm_hf.models.basis_spectrafm import SpectrumBasis
from spectrafm_hf.models.evidence_spectrafm import solve_normal_equations
from spectrafm_hf.models.modeling_spectrafm import combined
from spectrafm_hf.synthesis.bases import fill_completion, make_rung


LABELS = ["teff", "logg", "fe_h"]
N_INTERVALS, N_COEFFICIENTS = 9, 5
IDS = torch.tensor([6, 7, 8])


def config(**settings):
    values = dict(
        token_embedding="basis",
        num_intervals=N_INTERVALS,
        num_coefficients=N_COEFFICIENTS,
        rung_intervals=[[0, 6], [6, N_INTERVALS]],
        rung_components=[8, 5],
        num_members=3,
        hidden_size=32,
        encoder_ffn_dim=[32, 32],
        initializer_range=0.2,
        label_names=LABELS,
        label_units=["K", "dex", "dex"],
        label_centers=[5000.0, 3.0, 0.0],
        label_scales=[500.0, 1.0, 0.3],
    )
    return SpectraFMConfig(**{**values, **settings})


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = SpectraFMForPrediction(config()).eval()
    fill(model)
    return model


def fill(model):
    """Completions of stars that differ in all coefficients."""
    generator = np.random.default_rng(0)
    for rung in model.model.rungs:
        shape = (200, *rung.completion.center.shape)
        fill_completion(rung.completion, generator.normal(size=shape).astype("f4"), np.full(shape, 0.99, "f4"))


def tokens(n=4, intervals=(1, 2, 4, 7), seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (n, len(intervals), N_COEFFICIENTS)
    reliability = torch.rand(shape, generator=generator)
    return {
        "coefficients": reliability * torch.randn(shape, generator=generator),
        "reliability": reliability,
        "interval_ids": torch.tensor(intervals).expand(n, -1),
        "attention_mask": torch.ones(shape[:2], dtype=torch.bool),
    }


def answers(model, inputs):
    with torch.no_grad():
        return model(**inputs).predictions


def test_when_a_token_does_not_count_then_what_is_in_it_changes_nothing(model):
    inputs = tokens()
    inputs["attention_mask"][:, 2] = False
    other = {name: value.clone() for name, value in inputs.items()}
    other["coefficients"][:, 2], other["reliability"][:, 2] = 50.0, 1.0
    torch.testing.assert_close(answers(model, inputs), answers(model, other), rtol=0, atol=0)
    without = {name: value[:, [0, 1, 3]] for name, value in inputs.items()}
    torch.testing.assert_close(answers(model, inputs), answers(model, without), rtol=1e-6, atol=1e-4)


def test_when_tokens_come_in_another_order_then_the_answers_are_the_same(model):
    inputs = tokens()
    turned = {name: value[:, [2, 0, 3, 1]] for name, value in inputs.items()}
    torch.testing.assert_close(answers(model, inputs), answers(model, turned), rtol=1e-6, atol=1e-3)


def test_when_intervals_differ_then_so_do_the_answers(model):
    first, second = tokens(), tokens(intervals=(0, 3, 5, 8))
    assert (answers(model, first) - answers(model, second)).abs().min() > 0


def test_when_nothing_was_seen_then_there_is_no_answer_and_the_others_stay(model):
    inputs = tokens(3)
    expected = answers(model, inputs)
    inputs["attention_mask"][1] = False
    found = answers(model, inputs)
    assert found[1].isnan().all()
    torch.testing.assert_close(found[[0, 2]], expected[[0, 2]], rtol=1e-6, atol=1e-3)


def test_when_both_rungs_are_seen_then_the_answer_lies_between_theirs(model):
    inputs = tokens()
    parts = [answers(model, {name: value[:, part] for name, value in inputs.items()}) for part in ([0, 1, 2], [3])]
    both = answers(model, inputs)
    low, high = torch.minimum(*parts), torch.maximum(*parts)
    assert ((both >= low - 1e-3) & (both <= high + 1e-3)).all()


def test_predictions_of_members_are_weighted_by_their_errors():
    mean = torch.tensor([[[1.0], [4.0], [torch.nan]]])
    variance = torch.tensor([[[1.0], [2.0], [torch.nan]]])
    value, log_variance = combined(mean, variance.log())
    assert value.item() == pytest.approx(2.0)  # (1 + 4 / 2) / (1 + 1 / 2)
    assert log_variance.exp().item() == pytest.approx(2.0 / 1.5)


def test_when_stars_are_answered_together_or_alone_then_the_answers_are_the_same(model):
    inputs = tokens(5)
    alone = torch.cat([answers(model, {name: value[i : i + 1] for name, value in inputs.items()}) for i in range(5)])
    torch.testing.assert_close(answers(model, inputs), alone, rtol=1e-5, atol=1e-3)


def test_when_requests_are_fewer_then_the_answers_are_the_same(model):
    inputs = tokens()
    some = answers(model, {**inputs, "request_ids": torch.tensor([[4, 2]]).expand(4, -1)})
    torch.testing.assert_close(some, answers(model, inputs)[:, [2, 0]], rtol=1e-5, atol=1e-3)


def test_when_a_label_is_added_then_the_other_answers_stay_but_for_rounding(model):
    inputs = tokens()
    requested = {**inputs, "request_ids": torch.tensor([[2, 3, 4]]).expand(4, -1)}
    before = answers(model, requested)
    model.add_label("mg_fe", "dex", 0.0, 0.1)
    torch.testing.assert_close(answers(model, requested), before, rtol=1e-6, atol=1e-6)
    assert answers(model, inputs).shape == (4, 4)


def test_a_completion_fills_in_unobserved_intervals():
    """Two intervals that always agree: one tells of the other, and as well as it is known itself."""
    model = SpectraFMForPrediction(config())
    completion = model.model.rungs[1].completion  # three intervals
    generator = np.random.default_rng(0)
    star = generator.normal(size=(500, 1, N_COEFFICIENTS))
    coefficients = np.repeat(star, 3, axis=1).astype("f4")
    fill_completion(completion, coefficients, np.full(coefficients.shape, 0.999, "f4"))
    whole, cost = completion.amplitudes(torch.from_numpy(coefficients), torch.full(coefficients.shape, 0.999), IDS)
    some, _ = completion.amplitudes(
        torch.from_numpy(coefficients[:, :1]), torch.full((500, 1, N_COEFFICIENTS), 0.999), IDS[:1]
    )
    torch.testing.assert_close(some, whole, atol=0.03, rtol=0.0)
    assert cost.median() < 1.0
    strange = torch.from_numpy(coefficients * np.array([1.0, -1.0, 1.0], "f4")[:, None])
    assert completion.amplitudes(strange, torch.full(coefficients.shape, 0.999), IDS)[1].median() > 100


def test_amplitudes_are_solved_to_single_precision_although_the_matrix_loses_digits():
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(240, 110, generator=generator)
    weight = 10.0 ** torch.empty(300, 240).uniform_(-3.0, 3.0, generator=generator)
    precision, right = torch.linspace(0.1, 10.0, 110), torch.randn(300, 110, generator=generator)
    found = solve_normal_equations(weight, directions, precision, right)
    wide = directions.double()
    gram = torch.einsum("nc,bn,nd->bcd", wide, weight.double(), wide) + torch.diag(precision.double())
    expected = torch.linalg.solve(gram, right.double())
    off = (found - expected).norm(dim=1) / expected.norm(dim=1)
    plain = torch.linalg.solve(gram.float(), right)
    assert off.max() < 1e-6 < 1e-5 < ((plain - expected).norm(dim=1) / expected.norm(dim=1)).max()


def test_a_rung_with_pixels_sees_asinh_of_the_flux_of_the_completed_spectrum():
    model = SpectraFMForPrediction(config(rung_pixels=[0, 12], rung_features=[0, 7], flux_softening=0.2))
    completion = model.model.rungs[1].completion  # three intervals
    generator = np.random.default_rng(0)
    with torch.no_grad():
        completion.pixels.copy_(torch.from_numpy(generator.uniform(0.5, 1.0, completion.pixels.shape)))
        completion.level_prior.fill_(0.5)
    coefficients = 0.1 * generator.normal(size=(500, 3, N_COEFFICIENTS)).astype("f4")
    reliability = np.full(coefficients.shape, 0.999, "f4")
    fill_completion(completion, coefficients, reliability)
    amplitudes, _ = completion.amplitudes(torch.from_numpy(coefficients), torch.from_numpy(reliability), IDS)
    directions = completion.components.flatten(0, 1).numpy() / completion.metric.flatten().numpy()[:, None]
    completed = (completion.center.flatten().numpy() + amplitudes.numpy() @ directions.T).reshape(coefficients.shape)
    flux = 0.0
    for interval, table in enumerate(completion.pixels.numpy()):
        level = np.exp(0.5 * completed[:, interval, :1])
        flux = flux + level * (table[0] + completed[:, interval, 1:] @ table[1:])
    expected = np.arcsinh(flux / flux.mean(axis=1, keepdims=True) / 0.2)
    np.testing.assert_allclose(completion.compressed_flux(amplitudes).numpy(), expected, rtol=1e-4)
    seen, *_ = completion(torch.from_numpy(coefficients), torch.from_numpy(reliability), IDS)
    projected = (expected - expected.mean(axis=0)) @ completion.flux_components.numpy()
    for column in range(3):
        assert abs(np.corrcoef(seen[:, column].numpy(), projected[:, column])[0, 1]) > 0.99


def test_missing_information_of_an_interval_is_logarithmic(model):
    """Ten times the variance is one and the same step, however well the interval is known."""
    completion = model.model.rungs[1].completion
    steps = []
    for unknown in (1e-1, 1e-2, 1e-3, 1e-4):
        filled = torch.full((1, 3, N_COEFFICIENTS), 1.0 - unknown)
        steps.append(completion(torch.zeros_like(filled), filled, IDS)[0][0, -3:])
    np.testing.assert_allclose(np.diff(steps, n=2, axis=0), 0.0, atol=0.02 * np.abs(np.diff(steps, axis=0)).max())
    assert (np.diff(steps, axis=0) < 0).all()


def test_errors_follow_curves_of_temperature_and_missing_information():
    torch.manual_seed(0)
    curves = {"logg": [[0.0, 1.0], [0.5, 0.0]]}
    knots = [[4000.0, 6000.0], [-4.0, -1.0]]
    model = SpectraFMForPrediction(config(network_labels=LABELS)).eval()
    fill(model)
    inputs = tokens(6)
    with torch.no_grad():
        before = model(**inputs)
        model.config.rung_error_knots, model.config.rung_error_curves = [knots, []], [curves, {}]
        after = model(**inputs)
        alone = model(**inputs, request_ids=torch.full((6, 1), 3))
    expected = np.exp(
        np.interp(before.predictions[:, 0], knots[0], curves["logg"][0])
        + np.interp(before.unknown[:, 0], knots[1], curves["logg"][1])
    )
    known = torch.log(1.0 - inputs["reliability"][:, :3]).mean(dim=2).sum(dim=1) / 6  # of six intervals
    np.testing.assert_allclose(before.unknown[:, 0], known, rtol=1e-4)
    np.testing.assert_allclose((after.prediction_errors / before.prediction_errors)[:, 1], expected, rtol=1e-4)
    assert torch.equal(after.prediction_errors[:, [0, 2]], before.prediction_errors[:, [0, 2]])
    torch.testing.assert_close(alone.prediction_errors[:, 0], after.prediction_errors[:, 1])
    # So does what a correction begins from.
    ids = torch.arange(2, 5).expand(6, -1)
    with torch.no_grad():
        _, begun = model.uncorrected(model.model(**inputs), None, ids)
    torch.testing.assert_close(begun, after.prediction_errors)
    other = {name: value[:, 3:] for name, value in inputs.items()}  # the second rung alone has no curves
    first = {name: value[:, :3] for name, value in inputs.items()}
    with torch.no_grad():
        found, of_first = (model(**each).prediction_errors for each in (other, first))
        own = [[[4000.0, 6000.0], [-4.0, -1.0]], {"teff": [[0.0, 0.0], [0.3, 0.3]]}]
        model.config.rung_error_knots, model.config.rung_error_curves = zip([knots, curves], own, strict=True)
        longer, as_before = (model(**each).prediction_errors for each in (other, first))
        both = model(**inputs).prediction_errors
        model.config.rung_error_knots, model.config.rung_error_curves = [], []
        torch.testing.assert_close(found, model(**other).prediction_errors, rtol=0, atol=0)
    torch.testing.assert_close(longer[:, 0], found[:, 0] * np.exp(0.3))
    assert torch.equal(longer[:, 1:], found[:, 1:]) and torch.equal(as_before, of_first)
    # Of a star with two such rungs, the mean.
    torch.testing.assert_close(both[:, 0], before.prediction_errors[:, 0] * np.exp(0.15))


@pytest.mark.parametrize("kind", [SpectraFMModel, SpectraFMForPrediction])
def test_the_example_of_the_class_runs_and_prints_its_output(kind):
    [example] = doctest.DocTestFinder(recurse=False).find(kind)
    assert len(example.examples) > 8
    assert doctest.DocTestRunner().run(example).failed == 0


STARS, INTERVALS, ASKED = (torch.export.Dim(name, min=2) for name in ("stars", "intervals", "asked"))


def asked_tokens(n=5, intervals=(1, 2, 4, 7), requested=3, seed=0):
    inputs = tokens(n, intervals, seed)
    inputs["attention_mask"][1, 0] = False
    inputs["reliability"][2, intervals.index(4) :] = 0.0
    return {**inputs, "request_ids": torch.arange(2, 2 + requested).expand(n, -1)}


def dimensions(inputs):
    """What is free in an export."""
    return {name: {0: STARS, 1: ASKED if name == "request_ids" else INTERVALS} for name in inputs}


def check_export(model, run, within=1e-4):
    """Of other numbers of stars, intervals and labels, in units of the errors; intervals of one rung or of both."""
    for inputs in (asked_tokens(), asked_tokens(3, (4, 0), 2, 1), asked_tokens(300, (8, 6, 4), 3, 2)):
        with torch.no_grad():
            expected, found = model(**inputs), run(**inputs)
        assert torch.equal(found["predictions"].isnan(), expected.predictions.isnan())
        off = (found["predictions"] - expected.predictions) / expected.prediction_errors
        assert off.nan_to_num(0.0).abs().max() < within
        torch.testing.assert_close(
            found["prediction_errors"], expected.prediction_errors, rtol=1e-4, atol=0, equal_nan=True
        )


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
@pytest.mark.parametrize("strict", [False, True])
def test_an_export_takes_any_number_of_stars_intervals_and_labels(model, strict):
    inputs = asked_tokens()
    with torch.no_grad():
        exported = torch.export.export(model, (), inputs, dynamic_shapes=dimensions(inputs), strict=strict).module()
    check_export(model, exported)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*treespec.* is deprecated:FutureWarning")
def test_the_exporter_of_transformers_gives_the_same_answers(model):
    from transformers.exporters import DynamoConfig, DynamoExporter

    inputs = asked_tokens()
    how = DynamoConfig(dynamic=True, dynamic_shapes=dimensions(inputs))
    check_export(model, DynamoExporter().export(model, inputs, config=how))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, in its compiler, and the next
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_compiled_model_gives_the_same_answers(model):
    check_export(model, torch.compile(model), within=1e-3)


def test_the_fit_with_the_star_model_is_not_exported(model):
    inputs = asked_tokens()
    inputs["estimate"] = inputs["pull"] = inputs["coefficients"]
    inputs["information"] = torch.diag_embed(inputs["reliability"])
    with torch.no_grad(), pytest.raises(Exception, match="estimate: expected none, as the fit with the star model"):
        torch.export.export(model, (), inputs, strict=False)


def test_scalars_are_refused(model):
    known = {"scalar_ids": torch.full((4, 1), 2), "scalar_values": torch.full((4, 1), 6000.0)}
    with pytest.raises(ValueError, match="scalar_ids: expected none"):
        model(**tokens(), **known)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"coefficients": torch.zeros(4, 4, 3)}, r"coefficients: expected shape \(batch, tokens, num_coefficients=5\)"),
        ({"reliability": torch.zeros(4, 3, 5)}, r"reliability: expected shape \(4, 4, 5\), got \(4, 3, 5\)"),
        ({"interval_ids": torch.zeros(4, 3, dtype=torch.long)}, r"interval_ids: expected shape \(4, 4\)"),
        ({"reliability": None}, "coefficients: expected them with reliability and interval_ids"),
        ({"request_ids": torch.ones(4, 1, dtype=torch.long)}, "request_ids: expected labels"),
        ({"coefficients": None}, "coefficients: expected them, or flux, got neither"),
    ],
)
def test_wrong_input_is_an_error_that_names_it(model, change, message):
    with pytest.raises(ValueError, match=message):
        model(**{**tokens(), **change})


def test_it_learns_from_the_coefficients():
    """Labels that are sums of coefficients are found nearly as well as the noise allows."""
    torch.manual_seed(1)
    model = SpectraFMForPrediction(config(hidden_size=64, initializer_range=0.05, rung_components=[20, 5]))
    fill(model)
    generator = torch.Generator().manual_seed(2)
    mixing = torch.randn(4 * N_COEFFICIENTS, 3, generator=generator) / (4 * N_COEFFICIENTS) ** 0.5
    center, scale = torch.tensor([5000.0, 3.0, 0.0]), torch.tensor([500.0, 1.0, 0.3])
    variance = 0.01

    def batch(n):
        true = torch.randn(n, 4, N_COEFFICIENTS, generator=generator)
        known = torch.full_like(true, 1.0 / (1.0 + variance))
        noisy = known * (true + variance**0.5 * torch.randn(true.shape, generator=generator))
        inputs = {**tokens(n, (0, 1, 2, 4)), "coefficients": noisy, "reliability": known}
        return inputs, true.flatten(1) @ mixing * scale + center

    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
    for _ in range(400):
        inputs, labels = batch(128)
        loss = model(**inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    inputs, labels = batch(500)
    output = model.eval()(**inputs)
    residual = ((output.predictions - labels) / scale).std(dim=0)
    # The noise alone gives 0.1.
    assert residual.max() < 0.17
    assert ((output.predictions - labels) / output.prediction_errors).std().item() == pytest.approx(1.0, abs=0.25)


# ------------------------------------------------------------------------------------------------- with its tokenizer


START, STEP, N = np.log(15_000.0), 2e-5, 1500
GRID = np.exp(START + STEP * np.arange(N))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    generator = np.random.default_rng(0)
    waves = np.sin(np.arange(N) / np.array([[7.0], [11.0], [19.0]]))
    spectra = 1.0 + 0.05 * generator.normal(size=(100, 3)) @ waves
    rung = make_rung(
        spectra,
        [],
        first_interval=0,
        edge=START - STEP / 2,
        width=0.01,
        n_intervals=3,
        start=START,
        step=STEP,
        resolving_power=20_000.0,
        lowest_resolving_power=0.0,
        over_continuum=True,
        n_directions=3,
    )
    torch.manual_seed(0)
    model = SpectraFMForPrediction(config(num_intervals=3, rung_intervals=[[0, 3]], rung_components=[6])).eval()
    fill(model)
    folder = tmp_path_factory.mktemp("evidence") / "checkpoint"
    save_checkpoint(model, SpectraFMTokenizer(LABELS, basis=SpectrumBasis([rung])), folder)
    return folder


def spectra(n=3):
    generator = np.random.default_rng(1)
    flux = 1.0 + 0.05 * generator.normal(size=(n, N))
    return GRID, flux, np.full((n, N), 0.01)


def test_when_a_checkpoint_is_loaded_by_any_way_then_the_answers_are_the_same(checkpoint):
    model, tokenizer = load_checkpoint(checkpoint)
    with torch.no_grad():
        expected = model(**tokenizer(*spectra())).predictions
        other = AutoModelForTimeSeriesPrediction.from_pretrained(checkpoint).eval()
        torch.testing.assert_close(other(**AutoTokenizer.from_pretrained(checkpoint)(*spectra())).predictions, expected)
    wavelength, flux, error = spectra()
    rows = pipeline("stellar-labels", model=str(checkpoint))(
        [(wavelength, f, e) for f, e in zip(flux, error, strict=True)]
    )
    # Sums of other stars together round otherwise: a thousandth of the spread of the labels.
    difference = np.array([[row[name] for name in LABELS] for row in rows]) - expected.numpy()
    assert np.abs(difference / model.config.label_scales).max() < 1e-3


def test_when_it_is_saved_again_then_the_bytes_are_the_same(checkpoint, tmp_path):
    save_checkpoint(*load_checkpoint(checkpoint), tmp_path / "again")
    first, second = ({p.name: p.read_bytes() for p in folder.iterdir()} for folder in (checkpoint, tmp_path / "again"))
    assert first == second and "basis.safetensors" in first


def test_when_stars_lie_on_grids_of_their_own_then_each_gets_what_it_would_alone(checkpoint):
    _, tokenizer = load_checkpoint(checkpoint)
    wavelength, flux, error = spectra(2)
    part = slice(0, 600)
    together = tokenizer([wavelength, wavelength[part]], [flux[0], flux[1, part]], [error[0], error[1, part]])
    alone = tokenizer(wavelength[part], flux[1, part], error[1, part])
    intervals = alone["interval_ids"][0]
    np.testing.assert_array_equal(together["interval_ids"][1], together["interval_ids"][0])
    np.testing.assert_allclose(together["coefficients"][1, intervals], alone["coefficients"][0], atol=1e-6)
    assert not together["attention_mask"][1, 2] and together["attention_mask"][0].all()


def test_when_errors_are_unknown_then_they_follow_the_misfit(checkpoint):
    _, tokenizer = load_checkpoint(checkpoint)
    waves = 0.05 * np.sin(np.arange(N) / 11.0)
    noisy = 1.0 + waves + 0.03 * np.random.default_rng(3).normal(size=N)
    unknown, known = tokenizer(GRID, noisy), tokenizer(GRID, noisy, np.full(N, 0.03))
    np.testing.assert_allclose(unknown["coefficients"], known["coefficients"], atol=0.05)
    np.testing.assert_allclose(unknown["reliability"], known["reliability"], atol=0.05)


def test_wrong_resolving_power_is_an_error(checkpoint):
    _, tokenizer = load_checkpoint(checkpoint)
    with pytest.raises(ValueError, match="resolving_power: expected positive numbers, got -5"):
        tokenizer(*spectra(), resolving_power=-5)


def test_exact_parts_are_created_in_full_precision_whatever_the_default(tiny_evidence):
    config = tiny_evidence[0].config
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        model = SpectraFMForPrediction(config)
    finally:
        torch.set_default_dtype(before)
    kinds = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    assert kinds["model.rungs.0.completion.spread"] == kinds["means.1.weight"] == torch.float32
    assert kinds["model.rungs.0.embedding.weight"] == torch.float32
    assert kinds["model.rungs.0.blocks.0.fc1.weight"] == torch.float16
    assert model._keep_in_fp32_modules_strict == {"completion", "rungs.*.embedding", "means", "log_variances"}


def test_gradient_checkpointing_of_members_gives_the_same_gradients(tiny_evidence):
    model, tokenizer = tiny_evidence
    wavelength = np.exp(np.arange(np.log(4985.0), np.log(5140.0), 2e-4))
    flux = 1.0 + 0.05 * np.random.default_rng(0).normal(size=(3, len(wavelength)))
    inputs = tokenizer(wavelength, flux, np.full_like(flux, 0.05), labels={"teff": [4500.0, 5000.0, 5500.0]})
    gradients = []
    for checkpointing in (False, True):
        model.train().zero_grad()
        if checkpointing:
            model.activation_checkpointing_enable()
            assert model.is_activation_checkpointing
        model(**inputs).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*gradients)
