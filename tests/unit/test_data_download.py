"""Downloads against a server on this machine: what goes wrong on the way leaves nothing behind."""

from __future__ import annotations

import errno
import gzip
import hashlib
import io
import os
import struct
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pliant import data
from pliant.core.errors import PliantError
from pliant.data import download
from pliant.data.download import DOWNLOADS, Download

pytest.importorskip("pooch", reason="the extra 'data' is not installed")


class Server:
    """Files by name; `missing` bytes are promised in the header and then not sent."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.missing = 0
        self.asked: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name = self.path.lstrip("/")
                outer.asked.append(name)
                if name not in outer.files:
                    self.send_error(404)
                    return
                body = outer.files[name]
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: len(body) - outer.missing])

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    running = Server()
    yield running
    running.close()


def offer(server: Server, monkeypatch: pytest.MonkeyPatch, name: str, contents: dict[str, bytes], **more: str) -> None:
    """Put the contents on the server, and their addresses and checksums into the table."""
    server.files = {Path(place).name: body for place, body in contents.items()}
    items = [
        Download(f"{server.url}/{Path(place).name}", hashlib.sha256(body).hexdigest(), **({"place": place} | more))
        for place, body in contents.items()
    ]
    monkeypatch.setitem(DOWNLOADS, name, tuple(items))


def fashion_files() -> dict[str, bytes]:
    contents = {}
    for stem, n in (("train", 20), ("t10k", 10)):
        images = struct.pack(">4I", 0x803, n, 28, 28) + os.urandom(n * 784)
        labels = struct.pack(">2I", 0x801, n) + bytes(i % 10 for i in range(n))
        contents[f"fashion_mnist/{stem}-images-idx3-ubyte.gz"] = gzip.compress(images)
        contents[f"fashion_mnist/{stem}-labels-idx1-ubyte.gz"] = gzip.compress(labels)
    return contents


def files_under(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def test_fetch_once_then_load(server, monkeypatch, tmp_path):
    offer(server, monkeypatch, "fashion_mnist", fashion_files())
    with pytest.raises(PliantError, match=r"no data set.*pliant\.data\.fetch"):
        data.load("fashion_mnist", tmp_path)
    assert not server.asked, "loading never downloads"
    assert data.fetch("fashion_mnist", tmp_path) == tmp_path
    assert len(data.load("fashion_mnist", tmp_path).test) == 10
    assert files_under(tmp_path) == sorted(fashion_files())
    data.fetch("fashion_mnist", tmp_path)
    assert len(server.asked) == 4, "what is there is not fetched again"


def break_connection(server: Server, _: pytest.MonkeyPatch) -> str:
    server.missing = 1000
    return "while fetching"


def other_file(server: Server, _: pytest.MonkeyPatch) -> str:
    server.files = {name: body + b"!" for name, body in server.files.items()}
    return "expected SHA-256"


def not_found(server: Server, _: pytest.MonkeyPatch) -> str:
    server.files = {}
    return "404"


def full_at_rename(_: Server, patch: pytest.MonkeyPatch) -> str:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    patch.setattr(download.os, "replace", full)
    return "No space left"


def full_at_write(_: Server, patch: pytest.MonkeyPatch) -> str:
    def full(self: object, url: str, output: str, pooch: object) -> None:
        Path(output).write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    patch.setattr("pooch.HTTPDownloader.__call__", full)
    return "No space left"


@pytest.mark.parametrize("fault", [break_connection, other_file, not_found, full_at_rename, full_at_write])
@pytest.mark.parametrize("packed", [False, True])
def test_faults_leave_nothing_and_a_second_try_succeeds(server, monkeypatch, tmp_path, fault, packed):
    if packed:
        offer(server, monkeypatch, "cifar10", {"c.tar.gz": cifar_tar()}, place="cifar10/bin", unpack="inside")
        name = "cifar10"
    else:
        offer(server, monkeypatch, "fashion_mnist", fashion_files())
        name = "fashion_mnist"
    good = server.files
    with monkeypatch.context() as patch:
        words = fault(server, patch)
        with pytest.raises(PliantError, match=words) as caught:
            data.fetch(name, tmp_path)
        if "SHA" not in words:
            assert isinstance(caught.value.__cause__, OSError)
    assert files_under(tmp_path) == []
    assert not (tmp_path / "cifar10" / "bin").exists()
    server.files, server.missing = good, 0
    data.fetch(name, tmp_path)
    assert len(files_under(tmp_path)) == (1 if packed else 4)
    assert not [name for name in files_under(tmp_path) if name.endswith(".part")]


def cifar_tar(member: str = "inside/data_batch_1.bin") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        info = tarfile.TarInfo(member)
        info.size = 5000
        archive.addfile(info, io.BytesIO(os.urandom(5000)))
    return out.getvalue()


def test_zip_archives(server, monkeypatch, tmp_path):
    out = io.BytesIO()
    lines = "sentence\tlabel\n" + "".join(f"good film {i} \t{i % 2}\n" for i in range(20))
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("SST-2/train.tsv", lines)
        archive.writestr("SST-2/dev.tsv", lines)
    offer(server, monkeypatch, "sst2", {"SST-2.zip": out.getvalue()}, place="sst2/SST-2", unpack="SST-2")
    assert len(data.load("sst2", data.fetch("sst2", tmp_path)).test) == 20
    data.fetch("sst2", tmp_path)
    assert server.asked == ["SST-2.zip"]


@pytest.mark.parametrize("member", ["../outside.bin", "other/data_batch_1.bin"])
def test_archives_with_another_content(server, monkeypatch, tmp_path, member):
    offer(server, monkeypatch, "cifar10", {"c.tar.gz": cifar_tar(member)}, place="cifar10/bin", unpack="inside")
    with pytest.raises(PliantError):
        data.fetch("cifar10", tmp_path)
    assert files_under(tmp_path) == []


def test_a_damaged_file_is_replaced(server, monkeypatch, tmp_path):
    offer(server, monkeypatch, "fashion_mnist", fashion_files())
    data.fetch("fashion_mnist", tmp_path)
    damaged = tmp_path / "fashion_mnist" / "train-labels-idx1-ubyte.gz"
    damaged.write_bytes(b"damaged")
    data.fetch("fashion_mnist", tmp_path)
    assert server.asked[4:] == [damaged.name]
    assert len(data.load("fashion_mnist", tmp_path).train) == 18


def test_sets_without_an_address(tmp_path):
    with pytest.raises(PliantError, match=r"fsdd/recordings or fsdd/train\.npz"):
        data.fetch("fsdd", tmp_path)
    with pytest.raises(PliantError, match="embedded"):
        data.fetch("digits", tmp_path)
    with pytest.raises(PliantError, match="expected one of digits"):
        data.fetch("mnist", tmp_path)


def test_the_table_is_whole():
    for items in DOWNLOADS.values():
        for item in items:
            assert len(item.sha256) == 64
            assert item.url.startswith(("http://", "https://"))
            assert not Path(item.place).is_absolute()
