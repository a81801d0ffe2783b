"""Splits, loaders, augmentation, the embedded digits, and the real sets where a folder of them is given."""

from __future__ import annotations

import os
import sys

import pytest
import torch

from pliant import data
from pliant.core.errors import PliantError
from pliant.data import text

pytest.importorskip("sklearn", reason="the extra 'data' is not installed")

needs_folder = pytest.mark.skipif(not os.environ.get("PLIANT_DATA"), reason="PLIANT_DATA names no folder of data sets")


def split(n: int = 10) -> data.Split:
    return data.Split(torch.arange(float(n))[:, None], torch.arange(n))


def test_loader_in_order_without_a_seed():
    batches = list(split().loader(4))
    assert [y.tolist() for _, y in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert all(torch.equal(x[:, 0].long(), y) for x, y in batches)
    assert len(split().loader(4)) == 3


def test_loader_shuffles_anew_each_epoch_and_repeats_with_its_seed():
    def epochs() -> list[list[int]]:
        loader = split(100).loader(7, seed=3)
        return [torch.cat([y for _, y in loader]).tolist() for _ in range(2)]

    first, second = epochs()
    assert first != second
    assert sorted(first) == sorted(second) == list(range(100))
    assert epochs() == [first, second]


def test_loader_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    for seed in (None, 1):
        list(split().loader(2, seed=seed))
    assert torch.equal(torch.get_rng_state(), before)


def test_loader_with_transforms():
    part = data.Split(torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0)), torch.zeros(8).long())
    runs = [torch.cat([x for x, _ in part.loader(3, seed=1, transforms=(data.RandomCrop(2),))]) for _ in range(2)]
    plain = torch.cat([x for x, _ in part.loader(3, seed=1)])
    assert torch.equal(*runs)
    assert runs[0].shape == plain.shape
    assert not torch.equal(runs[0], plain)
    with pytest.raises(PliantError, match="without a seed"):
        part.loader(3, transforms=(data.RandomFlip(),))
    with pytest.raises(PliantError, match="batch_size=0"):
        part.loader(0)


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        (torch.zeros(3, 1), torch.zeros(2).long(), "3 inputs"),
        (torch.zeros(2, 1), torch.zeros(2), "float32"),
        (torch.tensor([[0.0], [float("nan")]]), torch.zeros(2).long(), "1 of 2 inputs"),
        (torch.tensor([[float("inf")]]), torch.zeros(1).long(), "1 of 1 inputs"),
    ],
)
def test_splits_refuse_wrong_tensors(x, y, words):
    with pytest.raises(PliantError, match=words):
        data.Split(x, y)


def test_crop_and_flip_against_a_plain_loop():
    x = torch.randn(50, 2, 5, 4, generator=torch.Generator().manual_seed(0))
    out = data.RandomCrop(2, fill=9.0)(x, torch.Generator().manual_seed(1))
    padded = torch.nn.functional.pad(x, (2, 2, 2, 2), value=9.0)
    seen = set()
    for row, image in zip(out, padded, strict=True):
        places = [(i, j) for i in range(5) for j in range(5) if torch.equal(row, image[:, i : i + 5, j : j + 4])]
        assert len(places) == 1
        seen.update(places)
    assert len(seen) > 15
    flipped = data.RandomFlip()(x, torch.Generator().manual_seed(1))
    kinds = [(torch.equal(a, b), torch.equal(a, b.flip(-1))) for a, b in zip(flipped, x, strict=True)]
    assert set(kinds) == {(True, False), (False, True)}
    assert torch.equal(data.RandomCrop(0)(x, torch.Generator()), x)
    assert data.augment(x[:0], torch.Generator(), (data.RandomCrop(4), data.RandomFlip())).shape == (0, 2, 5, 4)


def test_transforms_refuse_wrong_values():
    for make, words in ((lambda: data.RandomCrop(-1), "pad=-1"), (lambda: data.RandomFlip(1.5), "p=1.5")):
        with pytest.raises(PliantError, match=words):
            make()
    with pytest.raises(PliantError, match="N, C, H, W"):
        data.RandomFlip()(torch.zeros(3, 3), torch.Generator())


def nearest(x: torch.Tensor, y: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    return y[torch.cdist(queries.flatten(1), x.flatten(1)).argmin(1)]


def test_digits():
    digits = data.load("digits")
    assert (digits.kind, digits.shape, digits.note) == ("image", (1, 8, 8), "")
    assert float(digits.train.x.mean()) == pytest.approx(0, abs=1e-5)
    parts = [digits.train, digits.val, digits.test]
    for part in parts:
        assert part.y.bincount().min() >= 0.09 * len(part)
    rows = torch.cat([part.x for part in parts]).flatten(1)
    assert len(rows) == 1797
    assert len(rows.unique(dim=0)) == 1797, "no image is in two parts"
    right = nearest(digits.train.x, digits.train.y, digits.test.x) == digits.test.y
    assert float(right.float().mean()) > 0.95
    again = data.load("digits", limit=100)
    assert torch.equal(again.train.y, digits.train.y[:100])
    assert torch.equal(again.test.y, digits.test.y)


def test_vocabulary_by_count_then_by_the_alphabet():
    made = text.build_vocabulary(["b b a a c", "c rare"], size=4)
    assert made == ("<pad>", "<unknown>", "a", "b")
    assert text.encode(["A rare b!", ""], made, 3).tolist() == [[2, 1, 3], [1, 0, 0]]


def test_what_load_refuses(tmp_path, monkeypatch):
    monkeypatch.delenv("PLIANT_DATA", raising=False)
    with pytest.raises(PliantError, match="expected one of digits"):
        data.load("mnist")
    with pytest.raises(PliantError, match="PLIANT_DATA"):
        data.load("cifar10")
    with pytest.raises(PliantError, match=r"no data set 'cifar10'.*cifar-10-batches-bin"):
        data.load("cifar10", tmp_path)
    for limit in (0, -1, 1.5, True):
        with pytest.raises(PliantError, match="limit="):
            data.load("digits", limit=limit)
    with pytest.raises(PliantError, match="max_length"):
        data.load("digits", max_length=5)
    with pytest.raises(PliantError, match="limit=5000"):
        data.load("digits", limit=5000)


@pytest.mark.parametrize(
    ("module", "name"), [("sklearn.datasets", "digits"), ("numpy", "fsdd"), ("pooch", "imdb"), ("PIL.Image", "cifar10")]
)
def test_a_missing_extra_is_named(tmp_path, monkeypatch, module, name):
    import numpy as np

    for folder in ("fsdd", "cifar10"):
        (tmp_path / folder).mkdir()
        packed = {"jpeg": np.zeros(2, np.uint8), "offsets": np.array([0, 1, 2]), "labels": np.zeros(2, np.uint8)}
        np.savez(tmp_path / folder / "train.npz", **packed)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(PliantError, match=r"pip install 'pliant\[data\]'"):
        (data.fetch if module == "pooch" else data.load)(name, tmp_path)


@needs_folder
@pytest.mark.parametrize(
    ("name", "shape", "val"),
    [
        ("fashion_mnist", (1, 28, 28), 5000),
        ("cifar10", (3, 32, 32), 5000),
        ("sst2", (64,), 872),
        ("ag_news", (128,), None),
        ("fsdd", (1, 64, 40), None),
    ],
)
def test_real_sets(name, shape, val, tmp_path, monkeypatch):
    monkeypatch.setenv("PLIANT_CACHE", str(tmp_path))
    got = data.load(name, limit=500)
    assert (len(got.train), got.shape) == (500, shape)
    assert val is None or len(got.val) == val
    for part in (got.train, got.val, got.test):
        assert len(part.y.unique()) == len(got.classes)


@needs_folder
def test_real_figures_of_the_nearest_neighbour():
    fashion = data.load("fashion_mnist", limit=10_000)
    test = fashion.test.take(1000)
    assert float((nearest(fashion.train.x, fashion.train.y, test.x) == test.y).float().mean()) > 0.77
    fsdd = data.load("fsdd")
    assert float((nearest(fsdd.train.x, fsdd.train.y, fsdd.test.x) == fsdd.test.y).float().mean()) > 0.85
