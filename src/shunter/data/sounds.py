"""A sound file to the samples of one channel at 16,000 a second, or one line on why it cannot be used."""

from __future__ import annotations

import io
import math
import re
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError, escaped, one_line
from ..untrusted import open_file

__all__ = ["RATE", "SHORTEST", "SUFFIXES", "Sound", "read_sound", "resampled"]

RATE = 16000  # samples a second
SHORTEST = 0.05  # seconds
SUFFIXES = {".aif", ".aiff", ".au", ".flac", ".mp3", ".ogg", ".opus", ".wav"}
_RATES = (1000, 384_000)
_LONGEST_PERIOD = 2**13  # samples after which both rates fall together again
_SILENCE = 1e-3  # of full scale, -60 dB
_AT_A_TIME = 2**20  # samples, of all channels together, that are decoded
# What libsndfile says of a file that ends before its header says so. Writers to a pipe leave the length open.
_CUT = re.compile(r"(\d+) \(should be \d+\)|(> file length)", re.IGNORECASE)
_OPEN = {0, 2**31 - 1, 2**32 - 1}


class Sound(NamedTuple):
    """Samples (n,) float32 from -1 to 1, `RATE` a second, and the rate that they came at."""

    samples: NDArray[np.float32]
    rate: int


def read_sound(file: Path, seconds: float, raw: bytes | None = None) -> Sound:
    """A file of whatever libsndfile reads, its channels averaged; nothing behind the longest duration is decoded.

    Args:
        file: one sound.
        raw: what the file holds, where it is none on the disk.
        seconds: the longest that is wanted.

    Raises:
        UserError: where it cannot be read, is cut short, empty, silent or longer.
    """
    import soundfile

    try:
        with open_file(file) if raw is None else io.BytesIO(raw) as stream, soundfile.SoundFile(stream) as sound:
            rate, frames, said = int(sound.samplerate), int(sound.frames), str(sound.extra_info)
            if not _RATES[0] <= rate <= _RATES[1]:
                raise UserError(f"has {rate} samples a second; {_RATES[0]} to {_RATES[1]} can be resampled")
            most = math.floor(seconds * rate)
            if frames > most:
                raise UserError(f"lasts {frames / rate:.2f} s, longer than data.seconds={seconds:g}")
            parts, left = [np.zeros(0, np.float32)], most
            step = max(1, _AT_A_TIME // sound.channels)
            while len(block := sound.read(frames=min(left, step), dtype="float32", always_2d=True)):
                parts.append(block.mean(1))
                left -= len(block)
            mono = np.concatenate(parts)
    except UserError as error:
        raise UserError(f"{escaped(str(file))}: {error}") from None
    except OSError as error:
        raise UserError(f"{escaped(str(file))}: {error.strerror or one_line(error)}") from None
    except (RuntimeError, ValueError, TypeError) as error:  # soundfile's own
        reason = re.sub(r"Error opening <[^>]*>: ", "", one_line(error))
        raise UserError(f"{escaped(str(file))}: not a sound that can be read ({reason})") from None
    cut = any(match[2] or int(match[1]) not in _OPEN for match in _CUT.finditer(said))
    if cut or len(mono) < frames:
        raise UserError(f"{escaped(str(file))}: is cut short: it ends after {len(mono) / rate:.2f} s")
    if len(mono) < SHORTEST * rate:
        raise UserError(f"{escaped(str(file))}: lasts {len(mono) / rate:.3f} s; a sound needs {SHORTEST} at least")
    if not np.isfinite(mono).all():
        raise UserError(f"{escaped(str(file))}: holds samples that are not finite")
    if max(mono.max() - mono.mean(), mono.mean() - mono.min()) < _SILENCE:
        raise UserError(f"{escaped(str(file))}: is silent, below -60 dB of full scale throughout")
    return Sound(resampled(mono, rate), rate)


def resampled(samples: NDArray[np.float32], rate: int) -> NDArray[np.float32]:
    """Samples (n,) of a rate at `RATE`, by a polyphase filter.

    The filter grows with the terms of the ratio of both rates; of one that takes larger ones than any device has, the
    nearest is taken.
    """
    from scipy.signal import resample_poly

    if rate == RATE:
        return samples
    ratio = Fraction(RATE, rate).limit_denominator(_LONGEST_PERIOD)
    return np.asarray(resample_poly(samples, ratio.numerator, ratio.denominator), dtype=np.float32)
