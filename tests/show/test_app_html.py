"""The page of the app in HTML."""

import base64
import html
import re

import numpy as np

import spectrafm_hf.show.workbench as module
from spectrafm_hf.data.readers import read_spectra
from spectrafm_hf.files import DEMO_STARS
from spectrafm_hf.show import app_html
from spectrafm_hf.show.app_html import html_symbol, plain_symbol
from spectrafm_hf.show.style import SYMBOLS


def text(page: str) -> str:
    """What of HTML is read."""
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", page)).split())


def test_of_too_many_spectra_the_first_are_shown_with_a_note(workbench, demo_file, monkeypatch):
    assert not workbench.read(demo_file(3)).more
    for part in (module, app_html):
        monkeypatch.setattr(part, "MAX_SPECTRA", 2)
    reading = workbench.read(demo_file(3))
    assert reading.more and len(reading.rows) == len(reading.prediction["teff"]) == 2
    assert "The file holds more spectra; only the first 2 are shown." in text(app_html.summary_html(reading, 0))


def test_labels_of_another_kind_of_spectrum_are_not_to_be_used(workbench, text_file):
    reading = workbench.read(text_file(15_200.0, 16_900.0, 0.4, 100.0 / 6.28, 0.2))  # waves, no star
    assert "unlike_training" in reading.flags(0)
    shown = text(app_html.summary_html(reading, 0))
    assert "Do not use these labels." in shown and "No training star looks like this spectrum" in shown
    assert "no answer from this spectrum: c_fe, " in shown and "unknown" not in app_html.labels_html(reading, 0)


def test_flags_on_the_page_have_an_action(workbench, demo_file):
    reading = workbench.read(demo_file())
    assert "alert" not in app_html.summary_html(reading, 0)
    reading.prediction["flags"][0] = "not_at_rest;frame_unstated;medium_unstated;medium;velocity;bad_pixels"
    shown = text(app_html.summary_html(reading, 0))
    assert "No radial velocity of this star is known" in shown and "vacuum is assumed" in shown
    assert shown.count("under “How to read the file”") == 5 and "--air" not in shown
    assert "More than 1 % of the pixels were left out" in shown


def test_a_label_at_the_limit_of_the_training_range_is_marked(workbench, demo_file):
    reading = workbench.read(demo_file())
    assert "outside" not in app_html.labels_html(reading, 0)
    low, _ = reading.loaded.training_range.labels["teff"]
    reading.prediction["flags"][0] = "edge"
    for teff, place in ((low + 1, "at the end"), (low - 1, "outside")):
        reading.prediction["teff"][0] = teff
        assert text(app_html.labels_html(reading, 0)).count(place) == 1
        assert "or beyond: Teff." in text(app_html.summary_html(reading, 0))


def test_the_table_of_labels_has_values_errors_ranges_and_labels_of_the_file(workbench, demo_file):
    reading = workbench.read(demo_file())
    shown = text(app_html.labels_html(reading, 0))
    low, high = reading.loaded.training_range.labels["teff"]
    teff, error = (reading.prediction[name][0] for name in ("teff", "teff_err"))
    assert f"T eff [K] {teff:.0f} ± {error:.0f} {low:.0f} to {high:.0f} {reading.rows[0]['teff']:.0f}" in shown
    assert "[α/M] [dex]" in shown and "log g [dex]" in shown


def test_masked_pixels_are_counted_and_a_star_without_valid_ones_has_its_reason(workbench, demo_file):
    pixels = len(next(read_spectra([DEMO_STARS]))["flux"])
    masks = [np.arange(pixels) < 7, np.ones(pixels, bool)]
    reading = workbench.read(demo_file(2, mask=[mask.tolist() for mask in masks]))
    assert f"{pixels} pixels, 7 of them masked" in text(app_html.summary_html(reading, 0))
    assert reading.why_not(0) == ""
    assert "No labels. This spectrum cannot be used: no valid pixel." in text(app_html.summary_html(reading, 1))


def test_names_from_a_file_are_text_and_no_markup(workbench, demo_file):
    reading = workbench.read(demo_file(1, object_id=["<script>alert(1)</script>"]))
    explanation = workbench.explain(reading, 0)
    pages = [
        app_html.summary_html(reading, 0),
        app_html.picture_html(reading, 0, explanation, "teff"),
        app_html.neighbours_html(reading, 0, "known", [("<script>", 0.5, {})]),
        app_html.alert_html("<script>"),
    ]
    assert all("<script" not in page and "&lt;script" in page for page in pages)


def test_the_picture_is_there_for_wide_and_narrow_screens_and_in_words(workbench):
    reading = workbench.example("Red-clump giant, synthetic APOGEE")
    explanation = workbench.explain(reading, 0)
    assert workbench.explain(reading, 0) is explanation
    page = app_html.picture_html(reading, 0, explanation, "fe_h", (15_700.0, 15_800.0))
    wide, narrow = (
        base64.b64decode(page.split(start)[1].split('"')[0])
        for start in ('src="data:image/png;base64,', 'srcset="data:image/png;base64,')
    )
    sizes = [np.frombuffer(picture[16:24], ">u4").tolist() for picture in (wide, narrow)]
    assert sizes[0][0] > sizes[0][1] and sizes[1][0] < sizes[1][1]
    peaks = [float(number.replace(",", "")) for number in re.findall(r"([\d,]+) Å(?: \(|,|\. A)", text(page))]
    assert peaks and all(15_700 <= peak <= 15_800 for peak in peaks)
    assert re.search(r'alt="[^"]*response[^"]*\[Fe/H\]|alt="[^"]*\[Fe/H\][^"]*"', page)


def test_no_label_is_written_for_matplotlib():
    for label in (*SYMBOLS, "alpha_m", "fe_h", "mg_fe", "ak_targ"):
        assert not set("$\\") & set(plain_symbol(label) + html_symbol(label))
