"""Every layout of every data set, small and synthetic, and every way in which its files can be damaged."""

from __future__ import annotations

import gzip
import io
import pickle
import struct
import wave
from pathlib import Path

import pytest
import torch

from pliant import data
from pliant.core.errors import PliantError
from pliant.data import audio, images

np = pytest.importorskip("numpy", reason="the extra 'data' is not installed")
pytest.importorskip("PIL", reason="the extra 'data' is not installed")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PLIANT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PLIANT_DATA", raising=False)


def idx(values: np.ndarray) -> bytes:
    return struct.pack(f">{1 + values.ndim}I", 0x800 + values.ndim, *values.shape) + values.tobytes()


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def pictures(n: int, *shape: int) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(n)
    return draw.integers(0, 256, (n, *shape), dtype=np.uint8), np.arange(n, dtype=np.uint8) % 10


def fashion(folder: Path, test: str = "t10k", end: str = ".gz") -> Path:
    for stem, n in (("train", 40), (test, 20)):
        x, y = pictures(n, 28, 28)
        write(folder / f"{stem}-images-idx3-ubyte{end}", idx(x))
        write(folder / f"{stem}-labels-idx1-ubyte{end}", idx(y))
    return folder


@pytest.mark.parametrize(
    ("place", "test", "end"),
    [
        ("fashion_mnist", "test", ".gz"),
        ("fashion_mnist", "t10k", ".gz"),
        ("FashionMNIST/raw", "t10k", ""),
        (".", "t10k", ".gz"),
    ],
)
def test_fashion_mnist(tmp_path, place, test, end):
    fashion(tmp_path / place, test, end)
    got = data.load("fashion_mnist", tmp_path)
    assert [len(part) for part in (got.train, got.val, got.test)] == [36, 4, 20]
    assert got.shape == (1, 28, 28)
    raw = torch.from_numpy(pictures(40, 28, 28)[0])
    want = raw[:36].double() / 255
    assert torch.allclose(got.train.x[:, 0].double() * got.std[0] + got.mean[0], want, atol=1e-6)
    assert got.mean == pytest.approx([float(want.mean())])
    assert got.std == pytest.approx([float(want.std(correction=0))])
    assert "40 of 60,000" in got.note


def test_limit_keeps_validation_and_test(tmp_path):
    fashion(tmp_path)
    whole, part = data.load("fashion_mnist", tmp_path), data.load("fashion_mnist", tmp_path, limit=7)
    assert torch.equal(part.train.y, whole.train.y[:7])
    assert torch.equal(part.val.y, whole.val.y)
    assert "first 7 training cases only" in part.note
    with pytest.raises(PliantError, match=r"limit=37.*smaller limit"):
        data.load("fashion_mnist", tmp_path, limit=37)


def cifar_batches(folder: Path, kind: str) -> Path:
    for i, name in enumerate((*(f"data_batch_{k}" for k in range(1, 6)), "test_batch")):
        x, y = pictures(10 + i, 3072)
        if kind == "bin":
            write(folder / f"{name}.bin", np.concatenate([y[:, None], x], 1).tobytes())
        else:
            write(folder / name, old_pickle(x, y) if kind == "old" else new_pickle(x, y))
    return folder


def new_pickle(x: np.ndarray, y: np.ndarray) -> bytes:
    return pickle.dumps({b"batch_label": b"some", b"labels": y.tolist(), b"data": x}, protocol=2)


def old_pickle(x: np.ndarray, y: np.ndarray) -> bytes:
    """As Python 2 and NumPy 1 wrote the authors' files: byte strings, and NumPy's module under its old name."""

    def string(value: bytes) -> bytes:
        return b"T" + struct.pack("<i", len(value)) + value

    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + string(b"b") + b"\x87R"
    dtype = b"cnumpy\ndtype\n" + string(b"u1") + b"K\x00K\x01\x87R(K\x03" + string(b"|")
    dtype += b"NNN" + b"J\xff\xff\xff\xff" * 2 + b"K\x00tb"
    shape = b"J" + struct.pack("<i", len(x)) + b"M\x00\x0c\x86"
    state = b"(K\x01" + shape + dtype + b"\x89" + string(x.tobytes()) + b"tb"
    labels = b"](" + b"".join(b"K" + bytes([label]) for label in y) + b"e"
    return b"\x80\x02}(" + string(b"labels") + labels + string(b"data") + array + state + b"u."


@pytest.mark.parametrize(("kind", "place"), [("bin", "bin"), ("old", "py"), ("new", "py")])
def test_cifar10_batches(tmp_path, kind, place):
    cifar_batches(tmp_path / f"cifar-10-batches-{place}", kind)
    got = data.load("cifar10", tmp_path)
    assert [len(part) for part in (got.train, got.val, got.test)] == [54, 6, 15]
    raw = torch.from_numpy(pictures(15, 3072)[0]).reshape(-1, 3, 32, 32)
    back = got.test.x * torch.tensor(got.std).view(-1, 1, 1) + torch.tensor(got.mean).view(-1, 1, 1)
    assert torch.allclose(back * 255, raw.float(), atol=1e-3)
    assert got.test.y.tolist() == pictures(15, 1)[1].tolist()


class Evil:
    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize("value", [Evil(), {b"data": Evil(), b"labels": [1]}, {b"data": print, b"labels": [1]}])
def test_pickles_cannot_call_anything(tmp_path, capsys, value):
    folder = cifar_batches(tmp_path / "cifar-10-batches-py", "new")
    write(folder / "data_batch_3", pickle.dumps(value, protocol=2))
    with pytest.raises(PliantError, match="print"):
        data.load("cifar10", tmp_path)
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "value",
    [
        {b"data": np.zeros((2, 3072)), b"labels": [0, 1]},
        {b"data": np.zeros((2, 3072), np.uint8), b"labels": [0]},
        {b"data": np.zeros((1, 3072), np.uint8), b"labels": [b"x"]},
        {b"labels": [0]},
        [1, 2],
    ],
)
def test_wrong_pickles(tmp_path, value):
    folder = cifar_batches(tmp_path / "cifar-10-batches-py", "new")
    write(folder / "data_batch_3", pickle.dumps(value, protocol=2))
    with pytest.raises(PliantError, match="data_batch_3"):
        data.load("cifar10", tmp_path)


def cifar_jpeg(folder: Path) -> Path:
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for name, n in (("train", 30), ("test", 12)):
        blobs = []
        for pixels in pictures(n, 32, 32, 3)[0]:
            out = io.BytesIO()
            Image.fromarray(pixels).save(out, "JPEG")
            blobs.append(np.frombuffer(out.getvalue(), np.uint8))
        offsets = np.cumsum([0, *map(len, blobs)])
        np.savez(folder / f"{name}.npz", jpeg=np.concatenate(blobs), offsets=offsets, labels=pictures(n, 1)[1])
    return folder


def test_cifar10_jpeg_and_its_cache(tmp_path, monkeypatch):
    folder = cifar_jpeg(tmp_path / "cifar10")
    first = data.load("cifar10", tmp_path)
    assert [len(part) for part in (first.train, first.val, first.test)] == [27, 3, 12]
    assert first.note.startswith("CIFAR-10, JPEG copy")
    part = data.load("cifar10", tmp_path, limit=5)
    assert torch.equal(part.train.y, first.train.y[:5])
    kept = sorted((tmp_path / "cache").iterdir())
    assert len(kept) == 2
    assert not [path for path in kept if path.suffix != ".npz"]

    with monkeypatch.context() as patch:  # a second start decodes nothing
        patch.setattr(images, "_decoded", None)
        assert torch.equal(data.load("cifar10", tmp_path).train.x, first.train.x)
    for path in kept:  # a damaged cache is made anew
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.warns(RuntimeWarning, match="made anew"):
        assert torch.equal(data.load("cifar10", tmp_path).train.x, first.train.x)
    assert torch.equal(data.load("cifar10", tmp_path).train.x, first.train.x)

    packed = dict(np.load(folder / "train.npz"))  # another source: the old cache is not used
    np.savez(folder / "train.npz", **(packed | {"labels": (packed["labels"] + 1) % 10}))
    assert torch.equal(data.load("cifar10", tmp_path).train.y, (first.train.y + 1) % 10)


def test_a_full_cache_disk_only_warns(tmp_path, monkeypatch):
    cifar_jpeg(tmp_path / "cifar10")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pliant.data.files.os.replace", full)
    with pytest.warns(RuntimeWarning, match="No space left"):
        assert len(data.load("cifar10", tmp_path).test) == 12
    assert not list((tmp_path / "cache").iterdir())


SST = "4\tgood fun\n2\tso so\n0\tbad dull film\n3\tgood film\n1\tdull\n"
AG = "".join(f"{i % 4}\tTitle {i}\tmany words here\n" for i in range(20))
IMDB = "".join(f"{i % 2}\t{1 + 9 * (i % 2)}\tbad film<br />number {i}\n" for i in range(20))


def test_sst2(tmp_path):
    for name in ("train", "dev", "test"):
        write(tmp_path / "sst" / f"{name}.tsv.gz", SST)
    got = data.load("sst2", tmp_path)
    assert got.train.y.tolist() == got.val.y.tolist() == got.test.y.tolist() == [1, 0, 1, 0]
    assert got.vocabulary == ("<pad>", "<unknown>", "dull", "film", "good")
    assert got.train.x.shape == (4, 64)
    assert got.train.x[1, :4].tolist() == [1, 2, 3, 0]
    assert data.load("sst2", tmp_path / "sst", max_length=2).shape == (2,)


def test_sst2_as_in_glue(tmp_path):
    lines = "sentence\tlabel\n" + "".join(f"good {i} \t{i % 2}\n" for i in range(20))
    for name in ("train", "dev"):
        write(tmp_path / "SST-2" / f"{name}.tsv", lines)
    for root in (tmp_path, tmp_path / "SST-2"):
        got = data.load("sst2", root)
        assert [len(part) for part in (got.train, got.val, got.test)] == [18, 2, 20]
        assert "GLUE" in got.note


def test_ag_news(tmp_path):
    for name in ("train", "test"):
        write(tmp_path / "small" / "ag_news" / f"{name}.tsv.gz", AG)
        lines = "".join(f'"{1 + i % 4}","Title, ""{i}""","many words\\here"\n' for i in range(20))
        write(tmp_path / "whole" / "ag_news" / f"{name}.csv", lines)
    small, whole = data.load("ag_news", tmp_path / "small"), data.load("ag_news", tmp_path / "whole")
    assert "not comparable" in small.note
    for got in (small, whole):
        assert got.train.y.tolist() == [i % 4 for i in range(18)]
        assert got.shape == (128,)
        assert {"title", "many", "words", "here", "."} <= set(got.vocabulary)


def test_imdb(tmp_path):
    for part in ("train", "test"):
        write(tmp_path / "tsv" / "imdb" / f"{part}.tsv.gz", IMDB)
        for i in range(20):
            path = tmp_path / "tree" / "aclImdb" / part / ("neg", "pos")[i % 2] / f"{i}_7.txt"
            write(path, f"{('bad', 'good')[i % 2]} film<br /><br />number {i}")
    tsv, tree = data.load("imdb", tmp_path / "tsv"), data.load("imdb", tmp_path / "tree")
    assert tsv.shape == tree.shape == (256,)
    assert "br" not in tsv.vocabulary
    good = tree.vocabulary.index("good")
    assert torch.equal((tree.train.x == good).any(1).long(), tree.train.y)
    assert 0 < int(tree.train.y[:9].sum()) < 9, "the authors' folders are mixed, not one class after the other"


def sound(n: int) -> np.ndarray:
    return (np.sin(np.arange(2000 + 10 * n) * 2 * np.pi * 1000 / 8000) * 8000).astype("<i2")


def test_fsdd_folder_and_npz_agree(tmp_path):
    takes = [(digit, take) for digit in range(10) for take in range(10)]
    for digit, take in takes:
        path = tmp_path / "wav" / "fsdd" / "recordings" / f"{digit}_some_one_{take}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        with wave.open(str(path), "wb") as file:
            file.setparams((1, 2, 8000, 0, "NONE", ""))
            file.writeframes(sound(digit).tobytes())
    got = data.load("fsdd", tmp_path / "wav")
    assert [len(part) for part in (got.train, got.val, got.test)] == [45, 5, 50]
    assert got.shape == (1, 64, 40)
    assert got.test.y.bincount().tolist() == [5] * 10

    (tmp_path / "npz" / "fsdd").mkdir(parents=True)
    for name, rows in (("train", takes[:40]), ("test", takes[40:])):
        clips = [sound(digit) for digit, _ in rows]
        arrays = {"offsets": np.cumsum([0, *map(len, clips)]), "labels": np.array([d for d, _ in rows], np.uint8)}
        np.savez(tmp_path / "npz" / "fsdd" / f"{name}.npz", audio=np.concatenate(clips), **arrays)
    packed = data.load("fsdd", tmp_path / "npz")
    raw = [part.test.x[part.test.y == 7][0] * part.std[0] + part.mean[0] for part in (got, packed)]
    assert torch.allclose(*raw, atol=1e-4)


def test_log_mel_finds_the_tone_and_pads_with_silence():
    filters = audio.mel_filters()
    assert (filters.sum(0) > 0).all()
    out = audio.log_mel([sound(0), np.zeros(0, np.int16), np.zeros(9000, np.int16)])
    assert out.shape == (3, 1, 64, 40)
    assert int(out[0, 0, 5].argmax()) == int(filters[round(1000 / 8000 * 256)].argmax())
    assert torch.allclose(out[0, 0, 40:], out[1, 0, 40:])
    assert torch.equal(out[1], out[2])


def ragged(path: Path, **changes: object) -> None:
    arrays = {"audio": np.zeros(20, np.int16), "offsets": np.arange(0, 21, 2), "labels": np.arange(10)} | changes
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"labels": np.arange(9)}, "9 labels"),
        ({"offsets": np.arange(11)}, "11 offsets"),
        ({"offsets": np.array([0, 4, 2, *range(6, 21, 2)])}, "rising offsets"),
        ({"audio": np.full(20, np.nan)}, "NaN"),
        ({"audio": np.zeros(20, np.float32)}, "float32"),
        ({"labels": np.full(10, 11)}, "labels 11 to 11"),
    ],
)
def test_wrong_arrays(tmp_path, changes, words):
    ragged(tmp_path / "fsdd" / "train.npz", **changes)
    ragged(tmp_path / "fsdd" / "test.npz")
    with pytest.raises(PliantError, match=words):
        data.load("fsdd", tmp_path)


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("train-images-idx3-ubyte.gz", lambda b: b[: len(b) // 2], "cannot be read to its end"),
        ("t10k-labels-idx1-ubyte.gz", lambda b: b"", "magic number"),
        ("t10k-labels-idx1-ubyte.gz", lambda b: b"nothing packed", "cannot be read to its end"),
        ("train-labels-idx1-ubyte.gz", lambda _: gzip.compress(idx(np.zeros(39, np.uint8))), "39 labels for 40"),
        ("train-labels-idx1-ubyte.gz", lambda _: gzip.compress(idx(np.full(40, 10, np.uint8))), "expected 0 to 9"),
        ("t10k-images-idx3-ubyte.gz", lambda _: gzip.compress(idx(np.zeros(20, np.uint8))), "0x00000803"),
        ("t10k-images-idx3-ubyte.gz", lambda b: gzip.compress(gzip.decompress(b)[:-1]), "15679 values"),
        ("train-labels-idx1-ubyte.gz", None, "no file train-labels-idx1-ubyte"),
        ("train-images-idx3-ubyte.gz", None, "no data set 'fashion_mnist'"),
    ],
)
def test_damaged_idx(tmp_path, name, damage, words):
    path = fashion(tmp_path / "fashion_mnist") / name
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(PliantError, match=words) as caught:
        data.load("fashion_mnist", tmp_path)
    assert "Do: " in str(caught.value)
    assert str(tmp_path) in str(caught.value) or "labels" in words or "0 to 9" in words


@pytest.mark.parametrize(
    ("name", "file", "content", "words"),
    [
        ("sst2", "sst/train.tsv", SST[:-1], "last line has no end"),
        ("sst2", "sst/train.tsv", "x\tgood\n", "label 'x' in line 1"),
        ("sst2", "sst/train.tsv", "7\tgood\n", "label above 4"),
        ("sst2", "sst/train.tsv", "1 good\n", "1 fields in line 1"),
        ("sst2", "sst/train.tsv", "2\tso so\n", "0 training cases"),
        ("sst2", "sst/train.tsv", b"1\t\xff\n", "no UTF-8"),
        ("ag_news", "ag_news/train.csv", '"1","a"\n', "2 fields in row 1"),
        ("ag_news", "ag_news/train.csv", '"1","a","b\n', "no whole CSV"),
        ("ag_news", "ag_news/train.csv", '"0","a","b"\n' * 9, "labels -1 to"),
        ("imdb", "imdb/aclImdb/train/pos/0.txt", "good", "no .txt file"),
        ("cifar10", "cifar-10-batches-bin/data_batch_1.bin", b"\0" * 3072, "3072 bytes"),
        ("cifar10", "cifar10/train.npz", b"PK nothing", "cannot be read"),
        ("fsdd", "fsdd/recordings/3_me_9.wav", b"RIFF", "no WAV file"),
        ("fsdd", "fsdd/recordings/three.wav", b"RIFF", "digit_speaker_take"),
    ],
)
def test_damaged_files(tmp_path, name, file, content, words):
    write(tmp_path / "ag_news" / "test.csv", '"1","a","b"\n' * 9)
    for part in ("dev", "test"):
        write(tmp_path / "sst" / f"{part}.tsv", SST)
    write(tmp_path / file, content)
    with pytest.raises(PliantError, match=words):
        data.load(name, tmp_path)


def test_an_array_where_an_npz_should_be(tmp_path):
    ragged(tmp_path / "fsdd" / "train.npz")
    with open(tmp_path / "fsdd" / "train.npz", "wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(PliantError, match=r"train\.npz.*audio, offsets, labels"):
        data.load("fsdd", tmp_path)


def test_truncated_jpeg_and_wav(tmp_path):
    folder = cifar_jpeg(tmp_path / "cifar10")
    packed = dict(np.load(folder / "train.npz"))
    packed["jpeg"][: packed["offsets"][1]] = 7
    np.savez(folder / "train.npz", **packed)
    with pytest.raises(PliantError, match="image 0 of"):
        data.load("cifar10", tmp_path)
    path = tmp_path / "fsdd" / "recordings" / "1_me_0.wav"
    path.parent.mkdir(parents=True)
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(sound(1).tobytes())
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(PliantError, match=r"1_me_0\.wav"):
        data.load("fsdd", tmp_path)
