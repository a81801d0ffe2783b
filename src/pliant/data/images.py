"""Images: handwritten digits (embedded), Fashion-MNIST and CIFAR-10 in each of the layouts they are published in."""

from __future__ import annotations

import io
import pickle
import struct
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pliant.core.errors import PliantError
from pliant.data import files
from pliant.data.files import FRESH, Parts

if TYPE_CHECKING:
    import numpy as np

_MAGIC = {1: 0x801, 3: 0x803}
_RECORD = 1 + 3 * 32 * 32


def digits(limit: int | None = None) -> Parts:
    """scikit-learn's 1,797 digits, uint8 0 to 16, split by class into about 60/20/20 in a fixed shuffled order."""
    np = files.require("numpy")
    bunch = files.require("sklearn.datasets").load_digits()
    x, y = bunch.images.astype(np.uint8)[:, None], bunch.target.astype(np.int64)
    order = files.fixed_order([f"digits {i}" for i in range(len(y))])
    rows: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    for label in range(10):
        own = [i for i in order if y[i] == label]
        first, second = round(len(own) * 0.6), round(len(own) * 0.8)
        rows["train"] += own[:first]
        rows["val"] += own[first:second]
        rows["test"] += own[second:]
    place = {row: i for i, row in enumerate(order)}
    train, val, test = (sorted(rows[part], key=place.__getitem__) for part in ("train", "val", "test"))
    train = train[: files.capped(len(train), limit, Path("digits"))]
    return Parts((x[train], y[train]), (x[val], y[val]), (x[test], y[test]), len(rows["train"]))


def read_idx(path: Path, dims: int) -> np.ndarray:
    """An IDX file of unsigned bytes: magic number, sizes, values."""
    np = files.require("numpy")
    data, header = files.read_bytes(path), 4 + 4 * dims
    magic = int.from_bytes(data[:4], "big")
    if len(data) < header or magic != _MAGIC[dims]:
        raise PliantError(
            got=f"{path} with magic number {magic:#010x} and {len(data)} bytes",
            expected=f"an IDX file with magic number {_MAGIC[dims]:#010x}",
            do=FRESH,
        )
    shape = struct.unpack(f">{dims}I", data[4:header])
    values = np.frombuffer(data, np.uint8, offset=header)
    size = 1
    for length in shape:
        size *= length
    if values.size != size:
        raise PliantError(
            got=f"{values.size} values in {path}", expected=f"{size} values for its shape {shape}", do=FRESH
        )
    return values.reshape(shape)


def fashion_idx(folder: Path, limit: int | None) -> Parts:
    """Fashion-MNIST's four IDX files, packed or not; the test part's are called t10k-* by the authors."""
    loaded = []
    for stems in (("train",), ("t10k", "test")):
        image_path = files.find(folder, *(f"{stem}-images-idx3-ubyte" for stem in stems))
        label_path = files.find(folder, *(f"{stem}-labels-idx1-ubyte" for stem in stems))
        images, labels = read_idx(image_path, 3), read_idx(label_path, 1)
        files.check_counts(label_path, len(images), len(labels))
        loaded.append((images[:, None], labels))
    (x, y), test = loaded
    train, val = files.cut(len(y), limit, folder)
    return Parts(_rows(x, y, train), _rows(x, y, val), test, len(y))


def cifar_jpeg(folder: Path, limit: int | None) -> Parts:
    """CIFAR-10 as JPEG bytes laid end to end in train.npz and test.npz; only the images asked for are decoded."""
    path = files.find(folder, "train.npz")
    packed = _packed(path)
    train, val = files.cut(len(packed["labels"]), limit, path)
    if limit is None:
        whole = files.cached(path, ("images", "labels"), lambda: _decoded(path, packed, range(len(packed["labels"]))))
        parts = [_rows(whole["images"], whole["labels"], rows) for rows in (train, val)]
    else:
        parts = [(part["images"], part["labels"]) for part in (_decoded(path, packed, rows) for rows in (train, val))]
    path = files.find(folder, "test.npz")
    test = _packed(path)
    cases = range(len(test["labels"]))
    done = files.cached(path, ("images", "labels"), lambda: _decoded(path, test, cases))
    return Parts(parts[0], parts[1], (done["images"], done["labels"]), len(packed["labels"]))


def _packed(path: Path) -> dict[str, np.ndarray]:
    """JPEG bytes, offsets and labels."""
    packed = files.read_npz(path, "jpeg", "offsets", "labels")
    files.check_ragged(path, packed["jpeg"], packed["offsets"], packed["labels"])
    return packed


def _decoded(path: Path, packed: dict[str, np.ndarray], rows: Iterable[int]) -> dict[str, np.ndarray]:
    """Images (N, 3, 32, 32) uint8 and labels of the given rows."""
    np, image = files.require("numpy"), files.require("PIL.Image")
    rows = list(rows)
    out = np.empty((len(rows), 3, 32, 32), np.uint8)
    jpeg, offsets = packed["jpeg"], packed["offsets"]
    for place, row in enumerate(rows):
        try:
            with image.open(io.BytesIO(jpeg[offsets[row] : offsets[row + 1]].tobytes()), formats=("JPEG",)) as picture:
                pixels = np.asarray(picture.convert("RGB"))
        except (OSError, ValueError, SyntaxError) as error:
            raise PliantError(
                got=f"image {row} of {path}, which is no whole JPEG ({error})", expected="a JPEG image", do=FRESH
            ) from error
        if pixels.shape != (32, 32, 3):
            raise PliantError(got=f"image {row} of {path} of shape {pixels.shape}", expected="(32, 32, 3)", do=FRESH)
        out[place] = pixels.transpose(2, 0, 1)
    return {"images": out, "labels": packed["labels"][rows]}


def cifar_binary(folder: Path, limit: int | None) -> Parts:
    """CIFAR-10's binary version: records of 1 label and 3,072 values."""
    return _from_batches(folder, ".bin", _binary_batch, limit)


def _binary_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """One .bin file."""
    np = files.require("numpy")
    data = np.frombuffer(files.read_bytes(path), np.uint8)
    if not data.size or data.size % _RECORD:
        raise PliantError(got=f"{data.size} bytes in {path}", expected=f"a multiple of {_RECORD} bytes", do=FRESH)
    data = data.reshape(-1, _RECORD)
    return data[:, 1:].reshape(-1, 3, 32, 32), data[:, 0]


def cifar_python(folder: Path, limit: int | None) -> Parts:
    """CIFAR-10's Python version: pickles, read by an unpickler that knows arrays and plain containers only."""
    return _from_batches(folder, "", _python_batch, limit)


def _python_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """One pickled batch."""
    np = files.require("numpy")
    try:
        with warnings.catch_warnings():
            # NumPy warns about the old spelling of a dtype inside the authors' pickles; the values are checked below.
            warnings.simplefilter("ignore")
            batch = _ArraysOnly(io.BytesIO(files.read_bytes(path)), encoding="bytes").load()
        data, labels = (batch[key] if key in batch else batch[key.decode()] for key in (b"data", b"labels"))
        labels = np.asarray(labels)
        good = type(data) is np.ndarray and data.dtype == np.uint8 and data.shape == (len(labels), _RECORD - 1)
    except PliantError:
        raise
    except Exception as error:  # a broken pickle raises almost anything
        raise PliantError(
            got=f"{path}, which cannot be unpickled ({type(error).__name__}: {error})",
            expected="a batch of the Python version of CIFAR-10",
            do=FRESH,
        ) from error
    if not good or labels.dtype.kind not in "iu":
        raise PliantError(
            got=f"'data' or 'labels' of another form in {path}",
            expected="uint8 data of shape (N, 3072) and N whole numbers as labels",
            do=FRESH,
        )
    return data.reshape(-1, 3, 32, 32), labels


class _ArraysOnly(pickle.Unpickler):
    """Dicts, lists, numbers, bytes and NumPy arrays; every other name in the pickle is refused."""

    def find_class(self, module: str, name: str) -> Any:
        np = files.require("numpy")
        allowed = {
            ("numpy.core.multiarray", "_reconstruct"): _empty_array,
            ("numpy._core.multiarray", "_reconstruct"): _empty_array,
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
            ("_codecs", "encode"): _latin1,
        }
        if (module, name) not in allowed:
            raise PliantError(
                got=f"a pickle which asks for {module}.{name}",
                expected="arrays and plain containers only",
                do="do not use this file; get the data set from its authors",
            )
        return allowed[module, name]


def _empty_array(*_: object) -> np.ndarray:
    """An array to be filled by the pickle's state."""
    np = files.require("numpy")
    return np.empty(0, np.uint8)


def _latin1(text: str, _: str = "latin1") -> bytes:
    """How Python 3 writes bytes into an old pickle."""
    return text.encode("latin1")


def _from_batches(folder: Path, suffix: str, read: Any, limit: int | None) -> Parts:
    """Five training batches and one test batch."""
    np = files.require("numpy")
    batches = [read(files.find(folder, f"data_batch_{i}{suffix}")) for i in range(1, 6)]
    x, y = (np.concatenate([batch[part] for batch in batches]) for part in (0, 1))
    train, val = files.cut(len(y), limit, folder)
    return Parts(_rows(x, y, train), _rows(x, y, val), read(files.find(folder, f"test_batch{suffix}")), len(y))


def _rows(x: np.ndarray, y: np.ndarray, rows: range) -> tuple[np.ndarray, np.ndarray]:
    """A run of rows."""
    return x[rows.start : rows.stop], y[rows.start : rows.stop]


def moments(x: np.ndarray, white: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation per channel of uint8 images, in units of white; exact, by counting the 256 values."""
    np = files.require("numpy")
    values, means, deviations = np.arange(256) / white, [], []
    for channel in range(x.shape[1]):
        counts = sum(np.bincount(x[i : i + 4096, channel].ravel(), minlength=256) for i in range(0, len(x), 4096))
        share = counts / x[:, channel].size
        mean = float(share @ values)
        deviation = float(share @ (values - mean) ** 2) ** 0.5
        means.append(mean)
        deviations.append(deviation or 1.0)
    return tuple(means), tuple(deviations)


def normalised(x: np.ndarray, white: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 images as float32, (x / white - mean) / std per channel."""
    np = files.require("numpy")
    out = torch.from_numpy(np.ascontiguousarray(x).astype(np.float32))
    channels = (1, -1, 1, 1)
    return out.div_(white).sub_(torch.tensor(mean).view(channels)).div_(torch.tensor(std).view(channels))
