import math

import evaluate
import numpy as np
import pytest
import torch

from spectrafm_hf.training.metrics import EVALUATE_METRIC, FIGURES, format_table, label_metrics, table_metrics


def test_figures_of_a_small_example_are_those_worked_out_by_hand():
    figures = label_metrics(
        values=[1.0, 2.0, 3.0, 4.0, 15.0], errors=[3.0] * 5, labels=[0.0, 2.0, 4.0, 2.0, 5.0], label_errors=[4.0] * 5
    )
    # Residuals 1, 0, -1, 2, 10: median 1, absolute deviations 0, 1, 2, 1, 9 with median 1; sigma is 5.
    assert figures["n"] == 5
    assert figures["bias"] == 1.0
    assert figures["robust_scatter"] == pytest.approx(1.4826)
    assert figures["rmse"] == pytest.approx(math.sqrt(106 / 5))
    assert figures["robust_z"] == pytest.approx(1.4826 / 5)


def test_gaussian_errors_of_the_stated_size_give_their_sigma_and_a_robust_z_of_one():
    random = np.random.default_rng(0)
    n = 200_000
    labels = random.normal(4700, 500, n)
    errors, label_errors = random.uniform(20, 60, n), random.uniform(5, 30, n)
    measured = labels + label_errors * random.normal(size=n)
    figures = label_metrics(labels + 7 + errors * random.normal(size=n), errors, measured, label_errors)
    assert figures["bias"] == pytest.approx(7, abs=0.5)
    assert figures["robust_z"] == pytest.approx(1, abs=0.02)
    constant = label_metrics(labels + random.normal(7, 40, n), np.full(n, 20.0), labels)
    assert constant["robust_scatter"] == pytest.approx(40, rel=0.02)
    assert constant["rmse"] == pytest.approx(math.hypot(40, 7), rel=0.02)
    assert constant["robust_z"] == pytest.approx(2, rel=0.02)


def test_outliers_move_the_rmse_and_not_the_robust_figures():
    residual = np.random.default_rng(0).normal(size=1000)
    clean = label_metrics(residual, np.ones(1000), np.zeros(1000))
    residual[:10] = 1e6
    spoiled = label_metrics(residual, np.ones(1000), np.zeros(1000))
    assert spoiled["rmse"] > 1e4 * clean["rmse"]
    for figure in ("robust_scatter", "robust_z"):
        assert spoiled[figure] == pytest.approx(clean[figure], rel=0.05)


def test_stars_without_a_label_are_left_out_and_an_unknown_label_error_is_none():
    values, errors, labels = np.array([1.0, np.nan, 3.0, 4.5]), np.array([1.0, np.nan, 2.0, 1.0]), np.array([0.0] * 4)
    labels[1] = np.nan
    with_hole = label_metrics(values, errors, labels, [np.nan, 1.0, np.nan, 0.0])
    assert with_hole == label_metrics(values[[0, 2, 3]], errors[[0, 2, 3]], labels[[0, 2, 3]])
    assert with_hole["n"] == 3


def test_no_star_at_all_is_not_a_perfect_score():
    figures = label_metrics([1.0], [1.0], [np.nan])
    assert figures["n"] == 0
    assert all(math.isnan(figures[name]) for name in FIGURES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": [1.0]}, r"values: expected shape \(stars,\), here \(2,\).*got \(1,\)"),
        ({"errors": [[1.0, 1.0]]}, "errors: expected shape"),
        ({"label_errors": [1.0] * 3}, "label_errors: expected shape"),
        ({"labels": 1.0}, "expected shape"),
        ({"values": [1.0, np.nan]}, "values: expected finite numbers, got nan in 1 stars"),
        ({"errors": [0.0, 1.0]}, "errors: expected positive numbers, got 0.0 in 1 stars"),
        ({"errors": [1.0, np.inf]}, "errors: expected positive numbers, got inf"),
    ],
)
def test_predictions_that_do_not_fit_the_labels_are_a_clear_error(change, message):
    columns = {"values": [1.0, 2.0], "errors": [1.0, 1.0], "labels": [1.0, 1.0], "label_errors": [0.1, 0.1], **change}
    with pytest.raises(ValueError, match=message):
        label_metrics(**columns)


def make_columns():
    random = np.random.default_rng(0)
    names = ("teff", "fe_h")
    values, labels = ({name: random.normal(size=50) for name in names} for _ in range(2))
    errors = {name: np.ones(50) for name in names}
    return values, errors, labels, errors


def test_a_table_holds_the_figures_of_each_label_over_the_selected_stars():
    values, errors, labels, label_errors = make_columns()
    selection = labels["teff"] > 0
    table = table_metrics(values, errors, labels, label_errors, selection)
    assert list(table) == ["teff", "fe_h"]
    kept = [column["fe_h"][selection] for column in (values, errors, labels, label_errors)]
    assert table["fe_h"] == label_metrics(*kept)
    assert table["fe_h"]["n"] == selection.sum() < 50
    assert table_metrics(values, errors, labels, label_errors)["teff"]["n"] == 50


def test_a_selection_by_index_or_a_missing_label_is_an_error():
    values, errors, labels, label_errors = make_columns()
    with pytest.raises(ValueError, match="selection: expected bool"):
        table_metrics(values, errors, labels, label_errors, np.arange(50))
    with pytest.raises(ValueError, match="selection: expected bool"):
        table_metrics(values, errors, labels, label_errors, np.ones(49, bool))
    with pytest.raises(
        ValueError, match=r"label_errors: expected the labels \['teff', 'fe_h'\], got none for \['fe_h'\]"
    ):
        table_metrics(values, errors, labels, {"teff": label_errors["teff"]})


def test_a_formatted_table_has_a_row_for_each_model_and_notes_missing_comparisons():
    teff = {"n": 1234, "robust_scatter": 54.32, "bias": -1.26, "rmse": 101.0, "robust_z": 0.931}
    fe_h = {"n": 1200, "robust_scatter": 0.09312, "bias": 0.001, "rmse": 0.2, "robust_z": 1.0}
    lines = format_table({"ridge": {"teff": teff, "fe_h": fe_h}, "Cannon": {"teff": teff}}, {"teff": "K"}).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["model", "teff [K], n = 1,234", "fe_h, n = 1,200"]
    assert cells[2] == ["ridge", "54.3 (-1.3, 101.0, 0.93)", "0.0931 (+0.0010, 0.2000, 1.00)"]
    assert cells[3] == ["Cannon", "54.3 (-1.3, 101.0, 0.93)", ""]
    assert len({len(line) for line in lines}) == 1


# ----------------------------------------------------------------------------------------- the library `evaluate`


@pytest.fixture
def load_metric(tmp_path):
    """`evaluate.load`, with its files in a folder of this test."""
    return lambda *config: evaluate.load(EVALUATE_METRIC, *config, cache_dir=str(tmp_path))


def make_stars(n: int = 60):
    random = np.random.default_rng(3)
    references = random.normal(4700, 500, n)
    references[5] = np.nan
    predictions = references + random.normal(10, 50, n)
    predictions[5] = 4000.0
    return predictions, references, random.uniform(30, 60, n), random.uniform(5, 20, n)


def test_evaluate_loads_the_metric_and_gives_the_same_figures(load_metric):
    predictions, references, errors, reference_errors = make_stars()
    expected = label_metrics(predictions, errors, references)
    found = load_metric().compute(predictions=predictions, references=references)
    assert found == {name: expected[name] for name in ("n", "robust_scatter", "bias", "rmse")}
    assert found["n"] == 59
    with_errors = load_metric("with_errors").compute(
        predictions=predictions, references=references, errors=errors, reference_errors=reference_errors
    )
    assert with_errors == label_metrics(predictions, errors, references, reference_errors)


def test_batches_and_single_stars_add_up_to_the_figures_of_all(load_metric):
    predictions, references, *_ = make_stars()
    metric = load_metric()
    for first in range(0, 50, 16):
        part = slice(first, min(first + 16, 50))
        metric.add_batch(predictions=torch.tensor(predictions[part]), references=references[part].tolist())
    for prediction, reference in zip(predictions[50:], references[50:], strict=True):
        metric.add(prediction=prediction, reference=reference)
    expected = metric.compute()
    assert expected == metric.compute(predictions=predictions, references=references)
    assert expected["n"] == 59


def test_the_metric_combines_with_others_and_names_missing_inputs(load_metric):
    predictions, references, errors, _ = make_stars()
    both = evaluate.combine([load_metric(), load_metric()], force_prefix=True)
    assert len(both.compute(predictions=predictions, references=references)) == 8
    with pytest.raises(ValueError, match=r"inputs are missing: \['reference_errors'\]"):
        load_metric("with_errors").compute(predictions=predictions, references=references, errors=errors)
    with pytest.raises(ValueError, match="config_name: expected none or 'with_errors', got 'robust'"):
        load_metric("robust")
    with pytest.raises(ValueError, match="values: expected finite numbers, got nan"):
        load_metric().compute(predictions=[np.nan, 1.0], references=[1.0, 1.0])
