"""Named data sets: embedded, from a folder, or downloaded once with a checksum."""

from __future__ import annotations

from pliant.data.augment import RandomCrop, RandomFlip, Transform, augment
from pliant.data.dataset import Dataset, Split
from pliant.data.download import fetch
from pliant.data.frames import Decode
from pliant.data.registry import load, names

__all__ = ["Dataset", "Decode", "RandomCrop", "RandomFlip", "Split", "Transform", "augment", "fetch", "load", "names"]
