"""The pages of instruments agree with the evaluations and with the generator."""

import re
import runpy
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[3]
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "generate" / "make_instrument_pages.py"))


@pytest.mark.parametrize("name", SCRIPT["PAGES"])
def test_each_page_agrees_with_the_evaluations(name):
    assert SCRIPT["page"](name) == (ROOT / "docs" / "instruments" / f"{name}.md").read_text(encoding="utf-8")


def test_a_page_has_the_rows_of_its_instrument_and_of_no_other():
    galah = SCRIPT["page"]("galah")
    assert "| lamost-lrs - galah, synthetic | 200 | teff |" in galah and "| `galah` | air |" in galah
    assert "lamost-lrs - sdss-boss" not in galah
    assert "lamost-lrs - gaia-xp" in SCRIPT["page"]("gaia-xp") and "desi - apogee" in SCRIPT["page"]("apogee")
    lamost = SCRIPT["page"]("lamost-lrs")
    assert "sick-sun" not in lamost, "a table of files is of no instrument"
    assert not re.search(r"^(?!\|).*\n\|---", lamost, re.MULTILINE), "a line below a head without the head"
    assert "| LAMOST, spectrafm-base | 52 | teff | 92 |" in lamost and "MILES test, spectrafm-base" not in lamost
