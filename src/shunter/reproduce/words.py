"""Text as words: the recipe of text with a vocabulary of whole words, rarer ones spelled in bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedTokenizerFast

from ..data.documents import built_in_domains
from ..data.windows import TextData, train_tokenizer
from ..recipes.text import TextConfig, TextRecipe

__all__ = ["RECIPE_OF_WORDS", "word_tokenizer", "words"]


def word_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of the most frequent words of texts, each with the space before it, and of bytes for all others.

    Args:
        texts: in any order.
        vocab_size: of bytes, words and the end of a document.
    """
    from tokenizers import models

    tokenizer = train_tokenizer((), None)
    backend = tokenizer.backend_tokenizer
    split = backend.pre_tokenizer.pre_tokenize_str
    counts = Counter(word for text in texts for word, _ in split(text) if len(word) > 1)
    vocabulary = backend.get_vocab()
    for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if len(vocabulary) == vocab_size:
            break
        vocabulary.setdefault(word, len(vocabulary))
    backend.model = models.BPE(vocabulary, [], ignore_merges=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=tokenizer.eos_token, clean_up_tokenization_spaces=False
    )


class _TextOfWords(TextRecipe):
    """The recipe of text, whose tokenizer is one of words unless it is given."""

    def windows(self, config: TextConfig, tokenizer: Any = None, more: int = 0) -> TextData:
        """As of the recipe of text."""
        if tokenizer is None:
            d = config.data
            domains = [one for one in built_in_domains(d.max_bytes) if one.name in (d.domains or [one.name])]
            tokenizer = word_tokenizer((text for one in domains for text in one.documents), d.vocab_size)
        return super().windows(config, tokenizer, more)


RECIPE_OF_WORDS = _TextOfWords()


def words() -> TextConfig:
    """A decoder of English words."""
    steps = 150
    return TextConfig.model_validate(
        {
            "name": "words",
            "data": {"domains": ["english"], "vocab_size": 4096, "max_bytes": 1_000_000},
            "model": {"dim": 64, "layers": 2, "heads": 2, "hidden": 128},
            "training": {"steps": steps, "warmup": 30, "learning_rate": 1e-2, "save_every": steps, "eval_every": steps},
            "sparse": {
                "router": "topk", "num_experts": 16, "options": {"top_k": 2, "load_balancing_loss": 0.01}
            },
        }
    )  # fmt: skip
