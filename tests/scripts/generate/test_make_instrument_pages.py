"""The pages of instruments say what the evaluations say, and are those that are kept."""

import runpy
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[3]
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "generate" / "make_instrument_pages.py"))


@pytest.mark.parametrize("name", SCRIPT["PAGES"])
def test_a_page_is_what_the_evaluations_say_now(name):
    assert SCRIPT["page"](name) == (ROOT / "docs" / "instruments" / f"{name}.md").read_text(encoding="utf-8")


def test_a_page_has_the_rows_of_its_instrument_and_of_no_other():
    galah = SCRIPT["page"]("galah")
    assert "| lamost-lrs - galah, synthetic | 100 | teff |" in galah and "| `galah` | air |" in galah
    assert "lamost-lrs - sdss-boss" not in galah
    lamost = SCRIPT["page"]("lamost-lrs")
    assert "| LAMOST, spectrafm-base | 52 | teff | 92 |" in lamost and "MILES test, spectrafm-base" not in lamost
