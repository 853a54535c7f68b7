# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Parts of a generated Markdown file that belong to a person: writing the file again leaves them as they are.

A part stands between ``<!-- free text: NAME -->`` and ``<!-- end of free text -->``, each on a line of its own.
"""

import re


END = "<!-- end of free text -->"
_MARK = re.compile(r"^<!-- (?:free text: (?P<name>[\w -]+?)|end of free text) -->$", re.MULTILINE)
_PART = re.compile(rf"^<!-- free text: (?P<name>[\w -]+?) -->$.*?^{END}$", re.MULTILINE | re.DOTALL)


def free_part(name: str, text: str = "") -> str:
    """A part with its marks."""
    return (
        f"<!-- free text: {name} -->\n{text.strip()}\n{END}" if text.strip() else f"<!-- free text: {name} -->\n{END}"
    )


def free_texts(card: str) -> dict[str, str]:
    """
    What stands between the marks, by name.

    Raises
    ------
    ValueError
        If a mark has no counterpart or a name comes twice: then it is not sure what a person wrote.
    """
    texts: dict[str, str] = {}
    start = None
    for mark in _MARK.finditer(card):
        if (mark["name"] is None) != (start is not None) or mark["name"] in texts:
            raise ValueError(f"free text: expected pairs of marks, each name once, got {mark[0]!r} out of place")
        if start is not None:
            texts[start["name"]] = card[start.end() : mark.start()].strip()
            start = None
        else:
            start = mark
    if start is not None:
        raise ValueError(f"free text: expected {END!r} after {start[0]!r}, got none")
    return texts


def keep_free_texts(new: str, old: str) -> str:
    """`new` with the free texts of `old`; parts that `new` does not have follow at its end."""
    texts, known = free_texts(old), free_texts(new)
    new = _PART.sub(lambda part: free_part(part["name"], texts.get(part["name"], known[part["name"]])), new)
    for name, text in texts.items():
        if text and name not in known:
            new = f"{new.rstrip()}\n\n{free_part(name, text)}\n"
    return new
