"""A run small enough for a test: the user's own text, bytes, a few steps."""

import random

import pytest

from shunter.recipes.config import load_config
from shunter.recipes.text import TextConfig

SMALL = [
    "data.tokenizer=bytes", "data.sequence_length=16", "data.eval_windows=4", "data.eval_share=0.2",
    "model.dim=16", "model.layers=2", "model.heads=2", "model.hidden=24",
    "sparse.num_experts=4", "sparse.router=[bigram_hash, topk]", "training.batch_tokens=64", "training.warmup=2",
    "training.threads=1", "training.eval_every=4", "training.log_every=3", "training.save_every=100",
]  # fmt: skip


def write_corpus(root):
    """A folder of three domains with a few documents each."""
    words = {"letters": "abc de fgh", "digits": "12 345 6 78", "signs": "+ - == (()) ;"}
    for domain, text in words.items():
        (root / domain).mkdir(parents=True)
        for i in range(6):
            parts = text.split()
            random.Random(f"{domain}{i}").shuffle(parts)
            (root / domain / f"{i}.txt").write_text(" ".join(parts * 12), encoding="utf-8")
    return root


@pytest.fixture
def corpus(tmp_path):
    """The folder of `write_corpus`."""
    return write_corpus(tmp_path / "corpus")


@pytest.fixture
def small(corpus):
    """Overrides -> a configuration of a run of seconds."""

    def make(*overrides):
        return load_config(TextConfig, None, [*SMALL, f"data.source=['{corpus}']", *overrides])

    return make
