"""JSON of others in bounds that are the same with every version of Python."""

import json
import random

import pytest

from shunter.untrusted import MAX_DEPTH, parse_json


def test_json_is_read_up_to_a_depth(seed):
    draw = random.Random(seed)
    for depth, read in ((1, True), (MAX_DEPTH, True), (MAX_DEPTH + 1, False), (800, False), (10**5, False)):
        inner, text = 7, "7"
        for _ in range(depth):
            beside = draw.choice([[], [1], [[]] if read and depth < MAX_DEPTH else []])
            opened = draw.random() < 0.5
            inner = [*beside, inner] if opened else {"a": inner}
            text = f"[{','.join([*map(json.dumps, beside), text])}]" if opened else f'{{"a":{text}}}'
            if depth > 10**4:
                text = "[" * depth
                break
        if read:
            assert parse_json(text) == inner
            continue
        with pytest.raises(ValueError, match="it is nested too deep"):
            parse_json(text)
