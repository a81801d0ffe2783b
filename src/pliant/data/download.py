"""`fetch`: download a data set once, when asked, and take it for the data only after its checksum has passed."""

from __future__ import annotations

import os
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pliant.core.errors import PliantError
from pliant.data import registry
from pliant.data.files import require


@dataclass(frozen=True)
class Download:
    """A file to fetch: its address, SHA-256, and its place under root; archives are unpacked to `place`."""

    url: str
    sha256: str
    place: str
    unpack: str = ""  # the folder inside the archive which becomes `place`


_FASHION = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
_AG_NEWS = "https://raw.githubusercontent.com/mhjabreel/CharCnn_Keras/555590db4219b1243abb1918effd6a7425a2d75f/data/ag_news_csv"

DOWNLOADS: dict[str, tuple[Download, ...]] = {
    "fashion_mnist": tuple(
        Download(f"{_FASHION}/{file}", checksum, f"fashion_mnist/{file}")
        for file, checksum in (
            ("train-images-idx3-ubyte.gz", "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84"),
            ("train-labels-idx1-ubyte.gz", "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"),
            ("t10k-images-idx3-ubyte.gz", "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073"),
            ("t10k-labels-idx1-ubyte.gz", "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"),
        )
    ),
    "cifar10": (
        Download(
            "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
            "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
            "cifar10/cifar-10-batches-bin",
            unpack="cifar-10-batches-bin",
        ),
    ),
    "sst2": (
        Download(
            "https://dl.fbaipublicfiles.com/glue/data/SST-2.zip",
            "d67e16fb55739c1b32cdce9877596db1c127dc322d93c082281f64057c16deaa",
            "sst2/SST-2",
            unpack="SST-2",
        ),
    ),
    "ag_news": tuple(
        Download(f"{_AG_NEWS}/{file}", checksum, f"ag_news/{file}")
        for file, checksum in (
            ("train.csv", "76a0a2d2f92b286371fe4d4044640910a04a803fdd2538e0f3f29a5c6f6b672e"),
            ("test.csv", "521465c2428ed7f02f8d6db6ffdd4b5447c1c701962353eb2c40d548c3c85699"),
        )
    ),
    "imdb": (
        Download(
            "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz",
            "c40f74a18d3b61f90feba1e17730e0d38e8b97c05fde7008942e91923d1658fe",
            "imdb/aclImdb",
            unpack="aclImdb",
        ),
    ),
}


def fetch(name: str, root: str | Path | None = None) -> Path:
    r"""Download a data set into a folder, once; then `load(name, root)` reads it.

    What is already there with the right checksum is kept, a file with another one is replaced. A download goes to a
    temporary name in the same folder and is renamed after its checksum has passed, so a cut connection, a wrong file or
    a full disk leaves nothing which could be taken for the data.

    Args:
        name: one of `names()`.
        root: folder to put it in; the environment variable PLIANT_DATA if not given.

    Returns:
        The folder, to pass to `load`.

    Raises:
        PliantError: no known address with a checksum (the message then says which files to put where), the connection
            fails, the checksum is another, or the disk is full.

    >>> fetch("fsdd", "data")
    Traceback (most recent call last):
    ...
    pliant.core.errors.PliantError: got no known address with a checksum for 'fsdd'; expected ...

    Where we differ from pooch's own `retrieve`: the file is flushed to disk before it is renamed.
    """
    entry = registry.entry_of(name)
    if not entry.layouts:
        raise PliantError(
            got=f"a wish to download {name!r}",
            expected="a data set which is not embedded",
            do=f"call pliant.data.load({name!r})",
        )
    if name not in DOWNLOADS:
        folder = f"root/{entry.layouts[0].folders[0]}"
        raise PliantError(
            got=f"no known address with a checksum for {name!r}",
            expected=f"its files in a folder: {registry.wanted(name)}",
            do=f"get them from the authors, put them in {folder} and call pliant.data.load({name!r}, root)",
        )
    base = registry.root_of(name, root)
    for item in DOWNLOADS[name]:
        _get(item, base / item.place)
    return base


def _get(item: Download, place: Path) -> None:
    """Fetch one file or archive unless it is there."""
    pooch = require("pooch")
    if item.unpack and place.is_dir():  # it was renamed as a whole, so it is whole
        return
    part = None
    try:
        if not item.unpack and place.is_file() and pooch.file_hash(str(place), alg="sha256") == item.sha256:
            return
        place.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(prefix=f".{place.name}.", suffix=".part", dir=place.parent)
        os.close(handle)
        _download(item.url, part)
        found = pooch.file_hash(part, alg="sha256")
        if found != item.sha256:
            raise PliantError(
                got=f"a file of {Path(part).stat().st_size:,} bytes with SHA-256 {found} from {item.url}",
                expected=f"SHA-256 {item.sha256}",
                do="try again; if it stays so, the file has changed at its source and must not be used",
            )
        if item.unpack:
            _unpack(item, Path(part), place)
        else:
            with open(part, "rb+") as file:
                os.fsync(file.fileno())
            os.chmod(part, 0o644)  # temporary files are private; data sets are shared
            os.replace(part, place)
    except (OSError, EOFError, tarfile.TarError, zipfile.BadZipFile, zlib.error) as error:
        raise PliantError(
            got=f"{type(error).__name__} while fetching {item.url}: {error}",
            expected=f"a whole download in {place}",
            do="check the connection and the free space of the disk, then call fetch again; nothing half-done was kept",
        ) from error
    finally:
        if part is not None:
            Path(part).unlink(missing_ok=True)


def _download(url: str, part: str) -> None:
    """Stream the address into the file; after a failure pooch leaves its connection open, so it is closed here."""
    answers: list[Any] = []
    keep = {"response": lambda answer, *_, **__: answers.append(answer)}
    try:
        require("pooch").HTTPDownloader(timeout=60, chunk_size=1 << 20, hooks=keep)(url, part, None)
    finally:
        for answer in answers:
            answer.close()


def _unpack(item: Download, archive: Path, place: Path) -> None:
    """Unpack beside the final name, then rename the folder as a whole."""
    fresh = Path(tempfile.mkdtemp(prefix=f".{place.name}.", suffix=".part", dir=place.parent))
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as packed:
                packed.extractall(fresh)
        else:
            with tarfile.open(archive) as packed:
                packed.extractall(fresh, filter="data")
        if not (fresh / item.unpack).is_dir():
            raise PliantError(
                got=f"no folder {item.unpack} in {item.url}", expected=f"a folder {item.unpack}", do="report this"
            )
        if hasattr(os, "sync"):  # one call for a hundred thousand small files; Windows has none
            os.sync()
        os.replace(fresh / item.unpack, place)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
