"""Sound: the Free Spoken Digit Dataset as pictures of time and pitch (log-mel), by torch.stft alone."""

from __future__ import annotations

import math
import re
import wave
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pliant.core.errors import PliantError
from pliant.data import files
from pliant.data.files import FRESH, Parts

if TYPE_CHECKING:
    import numpy as np

RATE, FRAMES, BANDS, WINDOW, HOP = 8000, 64, 40, 256, 100
_FLOOR = 1e-6


def mel_filters(bands: int = BANDS, window: int = WINDOW, rate: int = RATE) -> Tensor:
    """Triangles at equal distances on the mel scale, (window / 2 + 1, bands)."""
    top = 2595 * math.log10(1 + rate / 2 / 700)
    corners = 700 * (10 ** (torch.linspace(0, top, bands + 2, dtype=torch.float64) / 2595) - 1)
    hertz = torch.linspace(0, rate / 2, window // 2 + 1, dtype=torch.float64)[:, None]
    up = (hertz - corners[:-2]) / (corners[1:-1] - corners[:-2])
    down = (corners[2:] - hertz) / (corners[2:] - corners[1:-1])
    return torch.minimum(up, down).clamp_min(0).float()


def log_mel(clips: Sequence[np.ndarray]) -> Tensor:
    """int16 clips at 8 kHz to (N, 1, 64, 40): 64 frames of 32 ms, one every 12.5 ms, cut or padded with silence."""
    length = (FRAMES - 1) * HOP + WINDOW
    filters, shape = mel_filters(), torch.hann_window(WINDOW)
    out = torch.empty(len(clips), 1, FRAMES, BANDS)
    for start in range(0, len(clips), 256):
        chunk = clips[start : start + 256]
        wavs = torch.zeros(len(chunk), length)
        for row, clip in enumerate(chunk):
            wavs[row, : min(length, len(clip))] = torch.tensor(clip[:length], dtype=torch.float32) / 32768
        spectrum = torch.stft(wavs, WINDOW, HOP, window=shape, center=False, return_complex=True)
        power = spectrum.real.square() + spectrum.imag.square()
        out[start : start + 256, 0] = (power.transpose(1, 2) @ filters + _FLOOR).log()
    return out


def fsdd_npz(folder: Path, limit: int | None) -> Parts:
    """train.npz and test.npz: samples laid end to end, offsets, labels."""
    np = files.require("numpy")
    parts = []
    for name in ("train.npz", "test.npz"):
        path = files.find(folder, name)
        packed = files.read_npz(path, "audio", "offsets", "labels")
        audio, offsets = packed["audio"], packed["offsets"]
        files.check_ragged(path, audio, offsets, packed["labels"])
        if audio.dtype != np.int16:
            raise PliantError(got=f"samples of type {audio.dtype} in {path}", expected="int16", do=FRESH)
        clips = [audio[a:b] for a, b in pairwise(offsets)]
        parts.append((clips, packed["labels"].astype(np.int64).tolist()))
    return _split(parts, limit, folder)


def fsdd_wav(folder: Path, limit: int | None) -> Parts:
    """recordings/{digit}_{speaker}_{take}.wav, takes 0 to 4 for the test, in a fixed shuffled order."""
    paths = sorted((folder / "recordings").glob("*.wav"))
    order = files.fixed_order([path.name for path in paths])
    parts: list[tuple[list[Any], list[int]]] = [([], []), ([], [])]
    for path in (paths[i] for i in order):
        name = re.fullmatch(r"([0-9])_(.+)_([0-9]+)", path.stem)
        if name is None:
            raise PliantError(got=f"a file named {path}", expected="digit_speaker_take.wav", do="take it out")
        clips, labels = parts[int(name[3]) < 5]
        clips.append(_wav(path))
        labels.append(int(name[1]))
    if not parts[1][0]:
        raise PliantError(
            got=f"no recording of a take 0 to 4 among {len(paths)} in {folder / 'recordings'}",
            expected="the whole data set",
            do="put all its recordings there",
        )
    return _split(parts, limit, folder)


def _split(parts: list[tuple[list[Any], list[int]]], limit: int | None, folder: Path) -> Parts:
    """Hold out the tail of the training clips."""
    (clips, labels), test = parts
    train, val = files.cut(len(labels), limit, folder)
    kept, held = slice(train.start, train.stop), slice(val.start, val.stop)
    return Parts((clips[kept], labels[kept]), (clips[held], labels[held]), test, len(labels))


def _wav(path: Path) -> np.ndarray:
    """The samples of a WAV file, 8 kHz, 16 bit, one channel."""
    np = files.require("numpy")
    try:
        with wave.open(str(path), "rb") as file:
            form = (file.getnchannels(), file.getsampwidth(), file.getframerate())
            count, data = file.getnframes(), file.readframes(file.getnframes())
    except (wave.Error, OSError, EOFError) as error:
        raise PliantError(
            got=f"{path}, which is no WAV file ({error})", expected="a whole WAV file", do=FRESH
        ) from error
    if form != (1, 2, RATE) or len(data) != 2 * count:
        raise PliantError(
            got=f"{path}: {form[0]} channels, {8 * form[1]} bit, {form[2]} Hz, {len(data)} of {2 * count} bytes",
            expected=f"1 channel, 16 bit, {RATE} Hz and all bytes",
            do=FRESH,
        )
    return np.frombuffer(data, "<i2")
