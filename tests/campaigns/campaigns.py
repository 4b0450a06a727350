"""Every campaign by its name."""

from tests.campaigns import alarms, damages, hostile, layers, museum, numbers, settings, soak, stops, texts, verbs
from tests.campaigns.campaign import Campaign

CAMPAIGNS = {
    "soak": Campaign("R", "seconds of a training: memory, files, threads, disk", soak.soak, 1800, 20, 1800, slow=True),
    "kills": Campaign("A", "SIGKILL at random times of a run, first and resumed", stops.kills, 5000, 3, 20),
    "crash_points": Campaign(
        "B",
        "SIGKILL before an operation on files, and twice with it a power loss",
        stops.crash_points,
        None,
        5,
        15,
        slow=True,
    ),
    "chains": Campaign("C", "five stops like Ctrl-C in one run", stops.chains, 200, 1, 5),
    "disks": Campaign("D", "full disks, and operations on files that fail", stops.disks, 1000, 4, 15),
    "broken_verbs": Campaign(
        "D",
        "each verb with a full or read-only disk, a file for a folder, no file handles, no output, bad input, Ctrl-C",
        verbs.broken_verbs,
        500,
        24,
        24,
        slow=True,
    ),
    "damage": Campaign(
        "E", "a file of a stopped run flipped, cut, lost or swapped", damages.damage, 1000, 5, 20, slow=True
    ),
    "flips": Campaign("E", "one bit of a sealed folder flipped", damages.flips, 10000, 200, 5000),
    "hostile": Campaign(
        "F",
        "files of models, tokenizers and settings, and GGUF, that lie: in bounded time and memory",
        hostile.hostile,
        20000,
        40,
        500,
        slow=True,
    ),
    "numbers": Campaign(
        "G", "NaN and infinities at six sites, on one process and on two", numbers.numbers, 216, 6, 12, slow=True
    ),
    "spikes": Campaign(
        "H",
        "a leap of the loss in a training, and in numbers; no false alarm before",
        alarms.spikes,
        100,
        3,
        10,
        slow=True,
    ),
    "loads": Campaign(
        "I",
        "a dead expert or a collapse in a training, heard within 50 steps; no false alarm before",
        alarms.loads,
        50,
        3,
        5,
        slow=True,
    ),
    "settings": Campaign("P", "settings of wrong names, types and ranges", settings.settings, 20000, 300, 5000),
    "trials": Campaign(
        "P",
        "settings of the right types that no model, router or batch can have, before the first step",
        settings.trials,
        500,
        8,
        25,
        slow=True,
    ),
    "shapes": Campaign(
        "K", "numbers of tokens and choices, layouts in memory, extreme logits", layers.shapes, 2000, 60, 250
    ),
    "invariants": Campaign(
        "J", "properties of a layer with each backend, on random layers", layers.invariants, 60000, 120, 2000
    ),
    "data": Campaign("O", "files of text, JSON, Parquet that are damaged or lie", texts.data, 1000, 80, 250),
    "museum": Campaign(
        "N",
        "known bugs put back, each found by the tests named for it",
        museum.museum,
        len(museum.MUSEUM),
        2,
        3,
        slow=True,
    ),
}
