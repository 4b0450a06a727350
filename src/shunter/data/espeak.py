"""Texts to 16-bit samples: eSpeak NG speaks a list of texts in voices of its own, in a process of its own.

What eSpeak says depends on what it has said before (its flutter goes on), so each list has a fresh process, and is the
same samples each time. That process runs this very file as a script, without the rest of the package.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["RATE", "Utterance", "speak", "version"]

RATE = 22050  # samples a second
_SECONDS = 600, 1  # that a list may take, and each of its texts besides
_AUDIO_RETRIEVAL, _UTF8, _SPEED, _PITCH = 2, 1, 1, 3  # of speak_lib.h


class Utterance(NamedTuple):
    """What is said, and how: a voice of eSpeak (`en-us+f2`), words a minute, a pitch from 0 to 100."""

    text: str
    voice: str
    speed: int
    pitch: int


def speak(utterances: Sequence[Utterance]) -> list[NDArray[np.int16]]:
    """The samples of each utterance, `RATE` a second.

    Raises:
        ModuleNotFoundError: without the package espeakng-loader, which brings eSpeak NG.
        RuntimeError: where eSpeak fails.
    """
    import espeakng_loader  # noqa: F401  said here, where it is missing

    asked = json.dumps(utterances).encode()
    most = _SECONDS[0] + _SECONDS[1] * len(utterances)
    try:
        done = subprocess.run([sys.executable, __file__], input=asked, capture_output=True, timeout=most)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"eSpeak said {len(utterances):,} texts in no {most:,} seconds") from None
    if done.returncode:
        raise RuntimeError(f"eSpeak ended with {done.returncode}: {done.stderr.decode(errors='replace')[-300:]}")
    counts = np.frombuffer(done.stdout[: 4 * len(utterances)], dtype=np.int32)
    samples = np.frombuffer(done.stdout[4 * len(utterances) :], dtype=np.int16)
    return np.split(samples, np.cumsum(counts)[:-1])


def version() -> str:
    """That of the package."""
    from importlib.metadata import version

    return version("espeakng-loader")


def _say_all(utterances: list[list[Any]]) -> list[NDArray[np.int16]]:
    import espeakng_loader

    lib = ctypes.CDLL(espeakng_loader.get_library_path())
    if lib.espeak_Initialize(_AUDIO_RETRIEVAL, 0, espeakng_loader.get_data_path().encode(), 0) != RATE:
        raise RuntimeError("it speaks at another rate")
    heard: list[NDArray[np.int16]] = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    def hear(samples: Any, count: int, events: Any) -> int:
        if samples and count > 0:
            heard.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    lib.espeak_SetSynthCallback(hear)
    sizes: list[Any] = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int, ctypes.c_uint, ctypes.c_uint]
    lib.espeak_Synth.argtypes = [*sizes, ctypes.c_void_p, ctypes.c_void_p]
    said = []
    for text, voice, speed, pitch in utterances:
        heard.clear()
        lib.espeak_ng_SetRandSeed(ctypes.c_long(1))
        if lib.espeak_SetVoiceByName(voice.encode()):
            raise RuntimeError(f"it has no voice {voice!r}")
        lib.espeak_SetParameter(_SPEED, speed, 0)
        lib.espeak_SetParameter(_PITCH, pitch, 0)
        words = text.encode()
        lib.espeak_Synth(words, len(words) + 1, 0, 1, 0, _UTF8, None, None)
        lib.espeak_Synchronize()
        said.append(np.concatenate(heard) if heard else np.zeros(0, dtype=np.int16))
    return said


if __name__ == "__main__":
    found = _say_all(json.load(sys.stdin))
    sys.stdout.buffer.write(np.array([len(samples) for samples in found], dtype=np.int32).tobytes())
    sys.stdout.buffer.write(b"".join(samples.tobytes() for samples in found))
