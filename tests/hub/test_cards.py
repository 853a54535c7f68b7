"""Cards of checkpoints: figures from evaluations, free text, and the bundled ones."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import make_tiny_model
from huggingface_hub import ModelCard
from huggingface_hub._eval_results import parse_eval_result_entries

import spectrafm_hf
from spectrafm_hf import SpectraFMTokenizer, bundled, bundled_names, load_checkpoint, save_checkpoint
from spectrafm_hf.free_text import free_part, free_texts, keep_free_texts
from spectrafm_hf.hub.cards import checksums, checksums_of_card, read_evaluations, sha256, write_model_card
from spectrafm_hf.inference.training_range import TrainingRange


ROOT = Path(__file__).parents[2]
RECIPE = {"checkpoint": "spectrafm-gaia-xp", "data": "gaia-xp", "labels": ["teff", "logg"], "learning_rate": 1e-3}
MAIN, POOR = "3500 K < teff < 6500 K", "[Fe/H] < -1"


def make_checkpoint(folder: Path, seed: int = 0) -> Path:
    """A checkpoint of random weights, without a card."""
    tokenizer = SpectraFMTokenizer(standardize_scale=0.1)
    save_checkpoint(make_tiny_model(seed), tokenizer, folder)
    labels = {name: (0.0, 1.0) for name in tokenizer.label_names}
    TrainingRange(labels, (5000.0, 5100.0), (2.0, 2.0)).save(folder)
    return folder


def make_evaluation(folder: Path, name: str = "tiny", *, data: str = "gaia-xp", stars: str = "ab" * 32) -> dict:
    """What `scripts/paper/evaluate.py` would write of a checkpoint."""

    def table(scatter: float) -> dict:
        figures = {"n": 30, "robust_scatter": scatter, "bias": -0.01, "rmse": 1.5 * scatter, "robust_z": 1.02}
        return {
            name: {label: figures | {"robust_scatter": value} for label, value in (("teff", 50.0), ("logg", scatter))}
        }

    return {
        "command": f"python scripts/paper/evaluate.py --model {name}",
        "split": "test",
        "data": data,
        "split_rule": "every tenth",
        "stars": {MAIN: 30, POOR: 4},
        "data_sha256": {"test": stars},
        "versions": {"torch": "2.13.0"},
        "models": {name: {"name": name, **checksums(*load_checkpoint(folder))}},
        "results": {MAIN: table(0.125), POOR: table(0.5)},
    }


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    return make_checkpoint(tmp_path / "spectrafm-tiny")


@pytest.mark.parametrize("name", bundled_names("spectrafm"))
def test_the_cards_agree_with_the_generator_and_keep_the_free_text(tmp_path, name):
    original = Path(bundled(name))
    folder = tmp_path / name
    shutil.copytree(original, folder)
    write_model_card(folder, recipe=folder / "recipe.yaml", evaluations=read_evaluations(folder))
    results = [path.relative_to(original) for path in original.glob(".eval_results/*.yaml")]
    assert results
    for file in ("README.md", "recipe.yaml", "evaluation.json", *results):
        again = (folder / file).read_text()
        assert again == (original / file).read_text(), f"python scripts/generate/make_model_card.py {original}"
    card = (original / "README.md").read_text()
    assert (ROOT / "model_cards" / f"{name}.md").read_text() == card
    assert len([text for text in free_texts(card).values() if text]) >= 5, "the free text is gone"
    installed = Path(spectrafm_hf.__file__).parent / "resources/model_card.md"
    assert (ROOT / "model_cards" / "template.md").read_bytes() == installed.read_bytes()


def test_a_card_has_the_figures_where_people_and_the_hub_read_them(checkpoint):
    card = write_model_card(checkpoint, recipe=RECIPE, evaluations=[make_evaluation(checkpoint)], remarks="**Mind.**")
    assert card == checkpoint / "README.md"
    written = ModelCard.load(card)
    assert "| spectrafm-tiny | 50.0 (-0.0, 0.2, 1.02) | 0.125 (-0.010, 0.188, 1.02) |" in written.text
    assert (
        "`python scripts/paper/evaluate.py --model tiny`, with torch 2.13.0; SHA-256 of the test stars abab"
        in written.text
    )
    for sentence in ("| logg | dex | 0 to 1 |", "| 5,000 to 5,100 | 2 |", "\n**Mind.**\n", "learning_rate: 0.001"):
        assert sentence in written.text
    assert written.data.base_model == "spectrafm-gaia-xp"
    assert written.data.datasets == ["gaia-xp"]
    [scatter] = [
        result
        for result in written.data.eval_results
        if result.metric_type == "robust_scatter" and "logg" in result.metric_name
    ]
    assert (scatter.metric_value, scatter.dataset_type, scatter.dataset_split) == (0.125, "gaia-xp", "test")
    entries = parse_eval_result_entries(yaml.safe_load((checkpoint / ".eval_results/gaia-xp.yaml").read_text()))
    assert len(entries) == 8
    [entry] = [entry for entry in entries if entry.task_id == "logg_robust_scatter"]
    assert (entry.dataset_id, entry.value) == ("gaia-xp", 0.125)
    assert entry.notes == f"1.4826 MAD of logg [dex]; 30 test stars, {MAIN}"
    assert yaml.safe_load((checkpoint / "recipe.yaml").read_text()) == RECIPE
    found_in_card = checksums_of_card(card.read_text())
    assert found_in_card == checksums(*load_checkpoint(checkpoint))
    assert found_in_card["model_sha256"] == sha256(checkpoint / "model.safetensors")
    assert "\n\n\n" not in written.text


def test_failures_are_reported_separately_from_the_tables(checkpoint):
    evaluation = make_evaluation(checkpoint)
    evaluation["results"][POOR]["tiny"]["teff"] |= {"robust_z": 1.4, "rmse": 500.0}
    text = write_model_card(checkpoint, recipe=RECIPE, evaluations=[evaluation]).read_text()
    found_in_card = text.partition("## Known failures")[2].partition("<!--")[0].strip()
    assert found_in_card == (
        f"- Gaia XP x APOGEE DR17, {POOR} (4 stars): scatter relative to the stars with {MAIN}: logg 4.0; errors too "
        "small (error/sigma above 1) or too large: teff 1.40; outliers beyond their errors, RMSE "
        "(scatter): teff 500.0 (50.0)."
    )


def test_free_text_stays_and_figures_do_not(checkpoint, caplog):
    evaluation = make_evaluation(checkpoint)
    card = write_model_card(checkpoint, recipe=RECIPE, evaluations=[evaluation], remarks="Of the first run.")
    mine = "It fails\n\n- on `{{ braces }}`\n- and on \\1."
    text = card.read_text().replace(free_part("failures"), free_part("failures", mine))
    card.write_text(text + "\n" + free_part("of my own", "Kept.") + "\n")
    evaluation["results"][MAIN]["tiny"]["logg"]["robust_scatter"] = 0.25
    write_model_card(checkpoint, recipe=RECIPE, evaluations=[evaluation])
    again = card.read_text()
    assert free_texts(again)["failures"] == mine
    assert free_texts(again)["of my own"] == "Kept."
    assert "0.250 (" in again and "0.125 (" not in again
    assert "\nOf the first run.\n" in again
    write_model_card(checkpoint, recipe=RECIPE, evaluations=[evaluation])
    assert card.read_text() == again
    assert caplog.messages == []
    # Other weights under the same card: what a person said of the old ones may be wrong now.
    make_checkpoint(checkpoint, seed=1)
    write_model_card(checkpoint, recipe=RECIPE, evaluations=[make_evaluation(checkpoint)])
    assert caplog.messages == [f"{card}: the free text was written for other weights or settings: read it again"]
    assert free_texts(card.read_text())["failures"] == mine
    assert "Of the first run." not in card.read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# All mine", "expected a card with marks for free text, got another text"),
        ("<!-- free text: uses -->\nAll", "expected '<!-- end of free text -->' after '<!-- free text: uses -->'"),
        ("<!-- end of free text -->", "expected pairs of marks"),
        (free_part("uses", "A") + "\n" + free_part("uses", "B"), "each name once, got '<!-- free text: uses -->'"),
    ],
)
def test_a_text_whose_parts_are_not_sure_is_not_overwritten(checkpoint, text, message):
    (checkpoint / "README.md").write_text(text)
    with pytest.raises(ValueError, match="README.md: ") as error:
        write_model_card(checkpoint, recipe=RECIPE, evaluations=[make_evaluation(checkpoint)])
    assert message in str(error.value)
    assert (checkpoint / "README.md").read_text() == text
    assert not (checkpoint / "evaluation.json").exists()


def test_parts_are_found_by_their_marks_alone_on_a_line():
    new = "\n".join(["# Title", free_part("a"), free_part("b", "by default"), "End"])
    old = "\n".join(
        [free_part("b", "mine"), "Of marks: `<!-- free text: c -->`", free_part("gone", "too"), free_part("d")]
    )
    assert keep_free_texts(new, old) == new.replace("by default", "mine") + "\n\n" + free_part("gone", "too") + "\n"


@pytest.mark.parametrize("default", ["", "\n", "\nBy default.\n", "By default.\n\n", "  By default."])
def test_a_part_is_replaced_however_its_default_text_is_set_out(default):
    mark = "<!-- free text: a -->"
    new = f"# Title\n\n{mark}\n{default}\n<!-- end of free text -->\n\nEnd\n"
    assert keep_free_texts(new, free_part("a", "mine")) == f"# Title\n\n{free_part('a', 'mine')}\n\nEnd\n"


def test_an_evaluation_of_other_weights_is_refused_unless_it_is_of_the_same_stars(checkpoint, tmp_path):
    other = make_checkpoint(tmp_path / "other", seed=1)
    own, foreign = make_evaluation(checkpoint), make_evaluation(other, "MLP")
    with pytest.raises(
        ValueError, match=r"evaluation: expected one of weights [0-9a-f]{16} with settings [0-9a-f]{16}, got weights "
    ):
        write_model_card(checkpoint, recipe=RECIPE, evaluations=[foreign])
    with pytest.raises(ValueError, match=r"got none$"):
        write_model_card(checkpoint, recipe=RECIPE, evaluations=[])
    elsewhere = copy.deepcopy(foreign) | {"data_sha256": {"test": "cd" * 32}}
    with pytest.raises(ValueError, match="expected one of weights"):
        write_model_card(checkpoint, recipe=RECIPE, evaluations=[own, elsewhere])
    foreign["results"][MAIN]["MLP"]["logg"] |= {"robust_scatter": 0.1}
    text = write_model_card(checkpoint, recipe=RECIPE, evaluations=[own, foreign]).read_text()
    assert text.index("| spectrafm-tiny | ") < text.index("| MLP | ") < text.index(POOR)
    assert "**0.100** (" in text
    assert [evaluation["command"][-4:] for evaluation in read_evaluations(checkpoint)] == ["tiny", " MLP"]


def test_the_settings_of_a_checkpoint_have_a_checksum_that_new_defaults_do_not_change(checkpoint):
    sums = checksums(*load_checkpoint(checkpoint))

    def changed(file: str, **settings) -> set[str]:
        """Which sums are others with these settings; None takes one away."""
        path = checkpoint / file
        text = path.read_text()
        merged = json.loads(text) | settings
        path.write_text(json.dumps({name: value for name, value in merged.items() if value is not None}))
        now = checksums(*load_checkpoint(checkpoint))
        path.write_text(text)
        return {name for name in sums if sums[name] != now[name]}

    n_labels = len(json.loads((checkpoint / "config.json").read_text())["label_names"])
    for file, settings in (
        ("config.json", {"label_scales": [2.0] * n_labels}),
        ("config.json", {"label_error_factors": [2.0] * n_labels}),
        ("preprocessor_config.json", {"sampling": "random"}),
        ("training_range.json", {"wavelength": [4000.0, 5100.0]}),
    ):
        assert changed(file, **settings) == {"settings_sha256"}, settings
    assert changed("config.json", transformers_version="9.9.9") == set()
    assert changed("preprocessor_config.json", clip_mode=None) == set(), (
        "a setting that came after the file was written"
    )


@pytest.mark.parametrize("missing", ["training_range.json", "model.safetensors"])
def test_an_incomplete_checkpoint_gets_no_card(checkpoint, missing):
    evaluation = make_evaluation(checkpoint)
    (checkpoint / missing).unlink()
    with pytest.raises((ValueError, OSError), match=missing):
        write_model_card(checkpoint, recipe=RECIPE, evaluations=[evaluation])
    assert not (checkpoint / "README.md").exists()


def test_cards_state_the_terms_of_use_of_bundled_and_own_data(checkpoint, tmp_path):
    own = tmp_path / "mine"
    own.mkdir()
    (own / "README.md").write_text(
        "---\npretty_name: Stars of mine\nlicense: cc-by-4.0\n---\n# Mine\n\n## Terms and citation\n\nCite me 2026.\n"
    )
    recipe = {"sources": {str(own): 1, "synthetic-apogee": 2, "someone/stars": 1, "runs/lost": 1}}
    text = write_model_card(checkpoint, recipe=recipe, evaluations=[make_evaluation(checkpoint)]).read_text()
    for sentence in (
        "`mine` (Stars of mine; licence: cc-by-4.0)",
        "Cite me 2026.",
        "`synthetic-apogee` (synthetic APOGEE spectra)",
        "- Plez 2012, ascl:1205.004 (Turbospectrum)",
        "https://huggingface.co/datasets/someone/stars",
    ):
        assert sentence in text
    assert str(tmp_path) not in text.partition("recipe.yaml")[0]


def test_unknown_licence_and_data_are_not_in_the_card(checkpoint):
    def write(**settings) -> ModelCard:
        evaluations = [make_evaluation(checkpoint)]
        return ModelCard.load(write_model_card(checkpoint, recipe={"data": None}, evaluations=evaluations, **settings))

    card = write()
    assert {"license", "datasets"}.isdisjoint(card.data.to_dict())
    assert "No licence is stated for the weights" in card.text
    assert "Trained on spectra and labels of unstated origin and terms." in card.text
    path = checkpoint / "README.md"
    path.write_text(path.read_text().replace("---\n", "---\nlicense: mit\n", 1))
    card = write()
    assert card.data.license == "mit" and "The weights have the licence mit, the code apache-2.0. Please" in card.text
    card = write(license="apache-2.0")
    assert card.data.license == "apache-2.0"
    assert "\nThe weights and the code have the licence apache-2.0. Please cite" in card.text


def test_the_card_cites_paper_and_software_as_the_citation_file_does():
    template = (ROOT / "model_cards" / "template.md").read_text()
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    paper = citation["preferred-citation"]
    assert f"title = {{{paper['title']}}}" in template
    for author in paper["authors"]:
        assert f"{author['family-names']}, {author['given-names']}" in template
    assert paper["identifiers"][0]["value"].removeprefix("arXiv:") in template
    assert citation["title"] in template and citation["authors"][0]["name"] in template
