#!/usr/bin/env bash
# eSpeak NG (espeakng-loader 0.2.4): the samples of a sentence depend on what was said before, with the seed set each time.
#
# Data that are synthesised are taken to be a function of text, voice and seed: `espeak_ng_SetRandSeed` is there for
# samples that repeat. But the phase of a voice's flutter goes on from one utterance to the next, so a clip that is made
# in another order, or again after a run was stopped, is another clip.
#
# Seen: one process says the same sentence twice, the seed set before each: the samples differ. Two fresh processes that
# say it once: the samples are the same. Expected: the same in both cases.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check espeakng-loader==0.2.4
cat > "$folder/say.py" <<'PYTHON'
import ctypes
import hashlib
import sys

import espeakng_loader

lib = ctypes.CDLL(espeakng_loader.get_library_path())
assert lib.espeak_Initialize(2, 0, espeakng_loader.get_data_path().encode(), 0) > 0  # samples are handed over
heard = []


@ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
def hear(samples, count, events):
    if samples and count > 0:
        heard.append(bytes(ctypes.string_at(samples, 2 * count)))
    return 0


lib.espeak_SetSynthCallback(hear)
lib.espeak_Synth.argtypes = [ctypes.c_char_p, ctypes.c_size_t, *[ctypes.c_uint] * 4, ctypes.c_void_p, ctypes.c_void_p]
assert lib.espeak_SetVoiceByName(b"en-us") == 0
text = b"seven hundred and twenty one"
for _ in range(int(sys.argv[1])):
    heard.clear()
    lib.espeak_ng_SetRandSeed(ctypes.c_long(1))
    assert lib.espeak_Synth(text, len(text) + 1, 0, 1, 0, 1, None, None) == 0
    lib.espeak_Synchronize()
    samples = b"".join(heard)
    print(len(samples) // 2, hashlib.sha256(samples).hexdigest()[:16])
PYTHON
python="$folder/venv/bin/python"
twice=$("$python" "$folder/say.py" 2)
once=$("$python" "$folder/say.py" 1)
again=$("$python" "$folder/say.py" 1)
echo "espeakng-loader 0.2.4
in one process, samples and their hash:
$twice
in two processes:
$once
$again"
first=$(echo "$twice" | head -1)
second=$(echo "$twice" | tail -1)
if [ "$first" = "$second" ] || [ "$once" != "$again" ] || [ "$once" != "$first" ]; then
    echo "the behaviour has changed"
    exit 1
fi
