"""The page itself; what it computes is in test_workbench.py, its HTML in test_app_html.py, a browser's view in
test_app_browser.py."""

import asyncio
import re
import socket
import sys
import tomllib
import urllib.request
from pathlib import Path

import pytest
import yaml

import spectrafm_cli
from spectrafm_hf.show.workbench import EXAMPLES


pytest.importorskip("gradio", reason='needs the extra: pip install ".[app]"')

from spectrafm_hf.show import app


ROOT = Path(__file__).parents[2]


def in_a_loop(call):
    """Where no event loop runs, Gradio makes some and leaves them open."""

    async def run():
        return call()

    return asyncio.run(run())


@pytest.fixture
def page(workbench):
    """The page without a browser."""

    def build():
        with app.gr.Blocks():
            return app.Page(workbench)

    return in_a_loop(build)


FILE = (None, "", "Angstrom", "", False, "")


def replies(page, shown, *values):
    """The page's answers in the order in which a visitor sees them."""
    return list(page.reply(shown, *values))


def test_an_example_replaces_a_file_and_a_file_an_example(page, text_file):
    path = str(text_file())
    view = (0, None, "", "")
    first = replies(page, None, *view, EXAMPLES[0], *FILE)
    shown = next(step[page.state] for step in reversed(first) if page.state in step)
    assert shown.request == app.Request(EXAMPLES[0]) and shown.reading.labels(0)
    assert shown.reading is page.workbench.example(EXAMPLES[0])
    assert "Looking at" in first[0][page.summary] and not first[0][page.answer].visible
    assert page.upload not in first[0]

    second = replies(page, shown, *view, EXAMPLES[0], path, *FILE[1:])  # the example is still marked
    assert second[0][page.example] is None and "Reading mine.csv" in second[0][page.summary]
    shown = next(step[page.state] for step in reversed(second) if page.state in step)
    assert shown.request.path == path and shown.reading.rows[0]["object_id"] == "mine"

    third = replies(page, shown, *view, EXAMPLES[1], path, *FILE[1:])
    assert third[0] == {page.upload: None}
    shown = next(step[page.state] for step in reversed(third) if page.state in step)
    assert shown.request == app.Request(EXAMPLES[1])


def test_nothing_is_left_of_a_star_while_a_file_is_read_or_where_it_cannot_be(page, tmp_path):
    (tmp_path / "bad.fits").write_bytes(bytes(range(256)))
    values = (0, None, "", "", None, str(tmp_path / "bad.fits"), *FILE[1:])
    steps = replies(page, None, *values)
    assert len(steps) == 2
    for step in steps:
        assert step[page.state].reading is None and not step[page.answer].visible
    assert "got one of another kind" in steps[-1][page.summary]
    # The same again is tried again; an example that is chosen then comes.
    assert len(replies(page, steps[-1][page.state], *values)) == 2
    again = replies(page, steps[-1][page.state], 0, None, "", "", EXAMPLES[0], *values[5:])
    assert again[0] == {page.upload: None}


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({"velocity": "fast"}, "Radial velocity: expected a number in km/s, or nothing, got 'fast'"),
        ({"columns": "wave"}, "Columns: expected wavelength=NAME, flux=NAME, got 'wave'"),
    ],
)
def test_invalid_entries_are_named(chosen, expected):
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        app.Request(**chosen).reading()


def test_boxes_hold_numbers_with_units_and_columns():
    chosen = app.Request(velocity="−12.5 km/s", columns="wavelength=w, flux = f", medium="air")
    reading = chosen.reading()
    assert reading["radial_velocity"] == -12.5 and reading["columns"] == {"wavelength": "w", "flux": "f"}
    assert reading["wavelength_medium"] == "air" and app.Request().reading()["radial_velocity"] is None


def test_a_part_of_the_spectrum_must_have_pixels(workbench):
    explanation = workbench.explain(workbench.example(EXAMPLES[0]), 0)
    assert app._part(explanation, None, None) is None
    low, high = app._part(explanation, 5000, None)
    assert low == 5000 and high == pytest.approx(10_200, abs=25)
    for limits in ((20_000, None), (6000, 5000), (5000, 5001)):
        with pytest.raises(ValueError, match="Expected a range with pixels between 3,3"):
            app._part(explanation, *limits)


def test_every_control_has_a_label_and_no_function_is_open_to_programs(workbench):
    page = in_a_loop(lambda: app.build(workbench))
    config = page.config
    controls = [
        part for part in config["components"] if part["type"] in ("radio", "file", "textbox", "checkbox", "dropdown")
    ]
    assert len(controls) == 11
    assert all(part["props"]["label"] for part in controls)
    assert all(part["api_visibility"] != "public" for part in config["dependencies"])


def test_an_internal_error_is_reported_as_such_and_logged(page, capsys, monkeypatch):
    monkeypatch.setattr(page.workbench, "example", lambda name: 1 / 0)
    *_, last = page.guarded(None, 0, None, "", "", EXAMPLES[0], *FILE)
    assert "not a fault of the file" in last[page.summary] and "Traceback" not in last[page.summary]
    assert last[page.state] is None
    assert "ZeroDivisionError" in capsys.readouterr().err


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_serving_the_page_reaches_no_other_machine(monkeypatch, capsys):
    hosts = []
    connect = socket.socket.connect

    def watched(self, address):
        hosts.append(address[0] if isinstance(address, tuple) else "local")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", watched)
    monkeypatch.setattr(socket, "getaddrinfo", _local_only(hosts, socket.getaddrinfo))
    page = in_a_loop(lambda: app.launch(port=free_port(), block=False))
    try:
        content = urllib.request.urlopen(page.local_url).read().decode()
    finally:
        page.close()
    assert "Stellar labels from a spectrum" in content
    assert hosts and set(hosts) <= {"127.0.0.1", "localhost", "local"}
    assert page.local_url in capsys.readouterr().out


def _local_only(hosts, look_up):
    def answer(host, *arguments, **options):
        hosts.append(host if isinstance(host, str) else "127.0.0.1")
        return look_up(host, *arguments, **options)

    return answer


def test_a_port_that_is_taken_is_one_line(capsys):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        assert in_a_loop(lambda: spectrafm_cli.main(["app", "--port", str(port)])) == 2
    error = capsys.readouterr().err
    assert error.startswith("spectrafm app: ") and str(port) in error and error.count("\n") == 1


def test_without_gradio_the_message_names_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "spectrafm_hf.show.app")
    monkeypatch.delattr("spectrafm_hf.show.app")
    assert spectrafm_cli.main(["app"]) == 2
    assert (
        capsys.readouterr().err
        == 'spectrafm app: the page needs Gradio: pip install ".[app]" in a clone of the repository\n'
    )


def test_the_space_requires_the_dependencies_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "scripts" / "space" / "requirements.txt").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == project["dependencies"]
    card = yaml.safe_load((ROOT / "scripts" / "space" / "README.md").read_text().split("---")[1])
    assert card["sdk"] == "gradio" and card["app_file"] == "app.py"
    least = re.fullmatch(r"gradio>=([\d.]+),<7", project["optional-dependencies"]["app"][0])[1]
    assert card["sdk_version"].startswith(least + ".")
    assert len(card["short_description"]) <= 60  # the hub refuses more
