"""Gaia spectra by source id, from a server on localhost that imitates DataLink."""

import importlib.util
import io
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from astropy.io import fits
from astropy.table import Table

import spectrafm_cli
from spectrafm_hf import save_checkpoint
from spectrafm_hf.data import gaia_archive
from spectrafm_hf.data.gaia_archive import GaiaArchive, read_source_ids
from spectrafm_hf.data.readers.gaia_continuous import COLUMNS


IDS = [5853498713190525696 + 128 * i for i in range(10)]
#: Stars of which the archive has no spectrum.
WITHOUT = {IDS[3], IDS[8]}


def table_of(identifiers):
    """XP_CONTINUOUS_RAW.fits, as the archive writes it; one star has no BP."""
    columns = [fits.Column("source_id", "K", array=identifiers)]
    for name, size in COLUMNS.items():
        values = np.empty(len(identifiers), object)
        for i, number in enumerate(identifiers):
            rng = np.random.default_rng(number % 1000)
            own = {"coefficients": 1e3 * rng.normal(size=size) + 2e4 * (np.arange(size) == 0)}
            own |= {
                "coefficient_errors": rng.uniform(1, 9, size),
                "coefficient_correlations": rng.normal(0, 0.02, size),
            }
            values[i] = np.zeros(0) if name.startswith("bp") and number == IDS[5] else own[name[3:]]
        columns.append(fits.Column(name, f"P{'D' if name.endswith('coefficients') else 'E'}()", array=values))
    stream = io.BytesIO()
    fits.BinTableHDU.from_columns(columns).writeto(stream)
    return stream.getvalue()


class Server:
    """`asked` are the ids of each request; `faults` go wrong first: 500, "page" (an error as a page) or "cut"."""

    def __init__(self):
        self.requests, self.faults = [], []
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
                assert self.path == "/data-server/data"
                settings = [form[name] for name in ("RETRIEVAL_TYPE", "DATA_STRUCTURE", "RELEASE")]
                assert settings == [["XP_CONTINUOUS"], ["RAW"], ["Gaia DR3"]]
                identifiers = [int(text) for text in form["ID"][0].split(",")]
                owner.requests.append(identifiers)
                fault = owner.faults.pop(0) if owner.faults else None
                stream = io.BytesIO()
                with zipfile.ZipFile(stream, "w") as archive:
                    if there := [number for number in identifiers if number not in WITHOUT]:
                        archive.writestr("XP_CONTINUOUS_RAW.fits", table_of(there))
                body = b"<html>Down for maintenance</html>" if fault in (500, "page") else stream.getvalue()
                self.send_response(500 if fault == 500 else 200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: len(body) // 2] if fault == "cut" else body)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/"


@pytest.fixture
def server(tmp_path, monkeypatch):
    with np.printoptions():
        pytest.importorskip("astroquery")
    server = Server()
    threading.Thread(target=server.http.serve_forever, daemon=True).start()
    monkeypatch.setenv("SPECTRAFM_GAIA_ARCHIVE", server.url)
    monkeypatch.setenv("SPECTRAFM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(gaia_archive, "DELAY", 0.0)
    yield server
    server.http.shutdown()
    server.http.server_close()


def identifiers_in(files):
    return sorted(number for path in files for number in pq.read_table(path)["source_id"].to_pylist())


def test_each_batch_comes_once_and_missing_stars_are_reported(server):
    failures = []
    files = GaiaArchive(batch=4).files(IDS, failures)
    assert server.requests == [IDS[:4], IDS[4:8], IDS[8:]]
    assert identifiers_in(files) == sorted(set(IDS) - WITHOUT)
    assert [str(failure.file) for failure in failures] == [f"Gaia DR3 {number}" for number in sorted(WITHOUT)]
    assert "no XP spectrum" in failures[0].cause
    # From the cache, in parts and with a new one; nothing is asked for twice, not even what is not there.
    files = GaiaArchive(batch=4).files([*IDS[2:6], 77])
    assert server.requests[3:] == [[77]] and identifiers_in(files) == [77, IDS[2], IDS[4], IDS[5]]


@pytest.mark.parametrize("fault", [500, "page", "cut"])
def test_temporary_errors_are_retried(server, fault):
    server.faults = [fault, fault]
    assert identifiers_in(GaiaArchive().files(IDS[:2])) == IDS[:2]
    assert server.requests == [IDS[:2]] * 3


def test_an_unreachable_archive_keeps_earlier_downloads(server):
    server.faults = [None, 500, "page", "cut"]
    with pytest.raises(OSError, match=r"127\.0\.0\.1.*expected XP spectra of 4 stars.*resumes from here"):
        GaiaArchive(batch=4).files(IDS)
    assert identifiers_in(GaiaArchive(batch=4).files(IDS)) == sorted(set(IDS) - WITHOUT)
    assert server.requests.count(IDS[:4]) == 1


def test_the_command_line_predicts_them(server, tmp_path, tiny_model, tiny_tokenizer, capsys):
    if importlib.util.find_spec("gaiaxpy") is None:  # its import changes how matplotlib draws
        pytest.skip("needs the extra `gaia`")
    save_checkpoint(tiny_model, tiny_tokenizer, tmp_path / "tiny")
    Table({"source_id": IDS[:6], "g": np.ones(6)}).write(tmp_path / "ids.fits")
    command = ["predict", "--gaia-ids", str(tmp_path / "ids.fits"), str(IDS[7]), "--model", str(tmp_path / "tiny")]
    assert spectrafm_cli.main([*command, "--output", str(tmp_path / "out.csv")]) == 1
    assert f"Gaia DR3 {IDS[3]}: the archive has no XP spectrum of it" in capsys.readouterr().err
    table = pd.read_csv(tmp_path / "out.csv", dtype={"object_id": str})
    assert table["object_id"].tolist() == [str(number) for number in (*IDS[:3], *IDS[4:6], IDS[7])]
    assert table["teff"].notna().all() and "no_bp" in table["flags"].tolist()[4]
    # A survey of them goes on as any other, and asks for nothing.
    assert spectrafm_cli.main([*command, "--output", str(tmp_path / "folder")]) == 1
    assert len(pd.read_parquet(tmp_path / "folder")) == 6 and len(server.requests) == 1


def test_ids_are_read_from_common_kinds_of_files(tmp_path):
    (tmp_path / "bare.txt").write_text("\n".join(map(str, IDS[:3])) + "\n")
    (tmp_path / "a.csv").write_text(f"source_id\n{IDS[0]}\n{IDS[1]}\n{IDS[0]}\n")
    (tmp_path / "b.csv").write_text(f"name,dr3\nx,Gaia DR3 {IDS[2]}\n")
    pd.DataFrame({"GaiaEDR3_source_id": IDS[:2]}).to_parquet(tmp_path / "c.parquet")
    assert read_source_ids([tmp_path / "bare.txt", str(IDS[4])]) == [*IDS[:3], IDS[4]]
    assert read_source_ids([tmp_path / "a.csv"]) == IDS[:2]
    assert read_source_ids([f"{tmp_path / 'b.csv'}:dr3"]) == [IDS[2]]
    assert read_source_ids([tmp_path / "c.parquet"]) == IDS[:2]


def test_an_invalid_id_is_one_line(tmp_path):
    pd.DataFrame({"source_id": np.array(IDS[:2], float)}).to_parquet(tmp_path / "float.parquet")
    with pytest.raises(ValueError, match="expected whole numbers in source_id .* does not hold the 19 digits"):
        read_source_ids([tmp_path / "float.parquet"])
    (tmp_path / "b.csv").write_text("name,ra\nx,1.0\n")
    with pytest.raises(ValueError, match=r"expected source_id among the columns of .*b\.csv, got name, ra; name it"):
        read_source_ids([tmp_path / "b.csv"])
    with pytest.raises(ValueError, match="expected a source id, or a table of them, got nowhere"):
        read_source_ids(["nowhere"])


def test_without_any_input_the_command_line_exits_with_a_message(capsys):
    assert spectrafm_cli.main(["predict"]) == 2
    assert "INPUT: expected files, folders or --gaia-ids" in capsys.readouterr().err
