"""GGUF files and token ids to logits by llama.cpp, through the C functions of `llama-cpp-python`."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError

__all__ = ["LlamaCpp"]

_KINDS = {"float32": "GGML_TYPE_F32", "float16": "GGML_TYPE_F16", "bfloat16": "GGML_TYPE_BF16"}


class LlamaCpp:
    """A model of a GGUF file in llama.cpp, with a cache of keys and values for several sequences.

    Args:
        file: as `write_gguf` writes it.
        sequences: how many are decoded side by side, B.
        length: tokens of each sequence, at most.
        threads: of the products.
        cache: the dtype of keys and values.

    Raises:
        ImportError: where `llama-cpp-python` is not installed.
        UserError: where llama.cpp cannot load the file.
    """

    def __init__(self, file: Path, sequences: int, length: int, threads: int, cache: str = "float32") -> None:
        from llama_cpp import llama_cpp as lib

        self.lib: Any = lib
        self._quiet = lib.llama_log_callback(lambda level, text, data: None)  # it is called as long as this lives
        lib.llama_log_set(self._quiet, None)
        lib.llama_backend_init()
        room = sequences * length
        self.model = lib.llama_model_load_from_file(str(file).encode(), lib.llama_model_default_params())
        if not self.model:
            raise UserError(f"{file}: llama.cpp cannot load it")
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = room, room, min(room, 512), sequences
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = getattr(lib, _KINDS[cache])
        params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED  # whose sums are in float16
        self.context = lib.llama_init_from_model(self.model, params)
        if not self.context:
            raise UserError(f"{file}: llama.cpp has no memory for {room} tokens of it")
        self.batch = lib.llama_batch_init(room, 0, 1)
        self.vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *raised: object) -> None:
        self.lib.llama_batch_free(self.batch)
        self.lib.llama_free(self.context)
        self.lib.llama_model_free(self.model)

    def forget(self) -> None:
        """Empty the cache."""
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)

    def forward(self, ids: Tensor, past: int = 0, everywhere: bool = False) -> Tensor:
        """The logits behind the last token of each sequence (B, V), or behind all (B, n, V), in float32.

        Args:
            ids: (B, n), the next tokens of each.
            past: how many tokens of each are in the cache.
            everywhere: whether all are wanted.

        Raises:
            UserError: where llama.cpp fails.
        """
        rows, length = ids.shape
        wanted = []
        for at, token in enumerate(ids.flatten().tolist()):
            sequence, place = divmod(at, length)
            self.batch.token[at], self.batch.pos[at] = token, past + place
            self.batch.n_seq_id[at], self.batch.seq_id[at][0] = 1, sequence
            self.batch.logits[at] = everywhere or place == length - 1
            wanted += [at] if self.batch.logits[at] else []
        self.batch.n_tokens = rows * length
        if code := self.lib.llama_decode(self.context, self.batch):
            raise UserError(f"llama.cpp: llama_decode ended with {code}")
        found = torch.empty(len(wanted), self.vocabulary)
        for row, at in zip(found, wanted, strict=True):
            pointer = self.lib.llama_get_logits_ith(self.context, at)
            ctypes.memmove(row.data_ptr(), ctypes.cast(pointer, ctypes.c_void_p), 4 * self.vocabulary)
        return found.view(rows, length, -1) if everywhere else found

    def features(self) -> str:
        """The instructions that llama.cpp was built for, in its own words."""
        return str(self.lib.llama_print_system_info().decode())
