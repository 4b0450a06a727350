"""A Conformer from log-mel frames to labels, by CTC, a transducer and an attending head, with SpeechMoE's network."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, Wav2Vec2BertConfig, Wav2Vec2BertForCTC
from transformers.modeling_outputs import CausalLMOutput

from ..moe import tell

__all__ = ["BLANK", "Recogniser", "RecogniserConfig", "best_path", "ctc_nats", "transducer_nats"]

BLANK = 0
"""The label for nothing of CTC and the transducer; no text has it, and the attending head begins and ends with it."""
_KERNEL = 5  # frames that a convolution of the embedding network sees


class RecogniserConfig(Wav2Vec2BertConfig):
    """The sizes of a `Recogniser`, beside those of transformers' Wav2Vec2-BERT.

    Args:
        embedding_dim: the width of what the embedding network knows of a frame; 0 leaves the network out.
        embedding_loss: the weight of its CTC loss; 0.01 as in SpeechMoE's reference configuration.
        decoder_layers: of the attending head; 0 leaves the head out.
        attention_loss: the weight of its loss.
        transducer_dim: the width of the transducer's prediction network; 0 leaves the head out.
        transducer_loss: the weight of its loss; that of CTC is what both heads leave of 1.
        most_labels: of a text, for the heads beside CTC.
    """

    model_type = "shunter_recogniser"
    model_class: ClassVar[Any] = None

    def __init__(
        self,
        embedding_dim: int = 0,
        embedding_loss: float = 0.01,
        decoder_layers: int = 0,
        attention_loss: float = 0.5,
        transducer_dim: int = 0,
        transducer_loss: float = 0.3,
        most_labels: int = 64,
        **rest: Any,
    ) -> None:
        super().__init__(**rest)
        self.embedding_dim, self.embedding_loss = embedding_dim, embedding_loss
        self.decoder_layers, self.attention_loss = decoder_layers, attention_loss
        self.transducer_dim, self.transducer_loss = transducer_dim, transducer_loss
        self.most_labels = most_labels


class EmbeddingNetwork(nn.Module):
    """Two convolutions over frames (B, S, f) to what they know of each, (B, S, w), and logits of labels (B, S, V).

    Source: You et al. 2021 (SpeechMoE), section 3.1: a network that all routers share, trained by CTC.
    """

    def __init__(self, features: int, dim: int, labels: int) -> None:
        super().__init__()
        self.first = nn.Conv1d(features, dim, _KERNEL, padding=_KERNEL // 2)
        self.second = nn.Conv1d(dim, dim, _KERNEL, padding=_KERNEL // 2)
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, labels)

    def forward(self, frames: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """Padding is 0 before each convolution, so that no real frame sees it."""
        known = frames
        for convolution in (self.first, self.second):
            known = F.silu(convolution((known * real[..., None]).mT)).mT
        known = self.norm(known)
        return known, self.head(known)


class AttentionHead(nn.Module):
    """A Transformer decoder: it attends to the encoder's frames (B, S, d) and says one label after another.

    Source: Kumatani et al. 2021, a sequence-to-sequence head on an encoder with experts.
    """

    def __init__(self, config: RecogniserConfig) -> None:
        super().__init__()
        d, layers, labels = config.hidden_size, config.decoder_layers, int(config.vocab_size or 0)
        self.labels, self.places = nn.Embedding(labels, d), nn.Embedding(config.most_labels + 1, d)
        layer = nn.TransformerDecoderLayer(
            d, config.num_attention_heads, config.intermediate_size, dropout=0.0, batch_first=True, norm_first=True
        )
        self.decoder, self.head = nn.TransformerDecoder(layer, layers), nn.Linear(d, labels)

    def forward(self, said: Tensor, frames: Tensor, real: Tensor) -> Tensor:
        """The logits (B, L, V) of what follows on each label of said (B, L), by the frames that are real (B, S)."""
        length = said.shape[1]
        later = torch.ones(length, length, dtype=torch.bool, device=said.device).triu(1)
        x = self.labels(said) + self.places.weight[:length]
        return self.head(self.decoder(x, frames, tgt_mask=later, memory_key_padding_mask=~real))

    def loss(self, labels: Tensor, frames: Tensor, real: Tensor) -> Tensor:
        """The mean cross-entropy of each label (B, L), -100 for none, and of the end."""
        there = labels >= 0
        said = F.pad(labels.where(there, BLANK), (1, 0), value=BLANK)
        follows = F.pad(labels.where(there, BLANK), (0, 1), value=BLANK)
        counts = F.pad(there, (1, 0), value=True)  # the end counts, what is behind it not
        logits = self(said, frames, real)
        return F.cross_entropy(logits.flatten(0, 1), follows.where(counts, -100).flatten(), ignore_index=-100)

    def greedy(self, frames: Tensor, real: Tensor) -> list[list[int]]:
        """The likeliest label each time, until the end."""
        said = torch.full((len(frames), 1), BLANK, device=frames.device)
        done = torch.zeros(len(frames), dtype=torch.bool, device=frames.device)
        while said.shape[1] < len(self.places.weight) and not bool(done.all()):
            following = self(said, frames, real)[:, -1].argmax(-1).where(~done, BLANK)
            done |= following == BLANK
            said = torch.cat([said, following[:, None]], 1)
        return [[label for label in row if label != BLANK] for row in said[:, 1:].tolist()]


class TransducerHead(nn.Module):
    """The next label by a frame (B, S, d) and by the labels said before it, or `BLANK` to go on to the next frame.

    Source: Graves 2012 (Sequence Transduction with Recurrent Neural Networks), sections 2.2 and 2.3; on an encoder with
    experts Kumatani et al. 2021.
    """

    def __init__(self, config: RecogniserConfig) -> None:
        super().__init__()
        width, labels = config.transducer_dim, int(config.vocab_size or 0)
        self.labels, self.prediction = nn.Embedding(labels, width), nn.LSTM(width, width, batch_first=True)
        self.frames, self.head = nn.Linear(config.hidden_size, width), nn.Linear(width, labels)
        self.most_labels = config.most_labels

    def forward(self, said: Tensor, frames: Tensor) -> Tensor:
        """The logits (B, S, L, V) of what follows at each frame on each label of said (B, L), `BLANK` the first."""
        known, _ = self.prediction(self.labels(said))
        return self.head((self.frames(frames)[:, :, None] + known[:, None]).tanh())

    def loss(self, labels: Tensor, frames: Tensor, real: Tensor) -> Tensor:
        """Minus the log-probability of texts (B, L), -100 for none, by label."""
        there = labels >= 0
        logits = self(F.pad(labels.where(there, BLANK), (1, 0), value=BLANK), frames)
        return transducer_nats(logits, real, labels).sum() / there.sum().clamp_min(1)

    def greedy(self, frames: Tensor, real: Tensor) -> list[list[int]]:
        """The likeliest label each time, or the next frame, until the last."""
        heard, count = self.frames(frames), real.sum(-1)
        rows, place = torch.arange(len(frames), device=frames.device), torch.zeros_like(count)
        known, state = self.prediction(self.labels(torch.full_like(count, BLANK)[:, None]))
        texts: list[list[int]] = [[] for _ in rows]
        while bool((place < count).any()):
            logits = self.head((heard[rows, place.clamp_max(heard.shape[1] - 1)] + known[:, 0]).tanh())
            full = torch.tensor([len(text) >= self.most_labels for text in texts], device=frames.device)
            label = logits.argmax(-1).where((place < count) & ~full, BLANK)
            new = label != BLANK
            place = place + (~new).long()
            for row in new.nonzero().flatten().tolist():
                texts[row].append(int(label[row]))
            following, moved = self.prediction(self.labels(label[:, None]), state)
            known = following.where(new[:, None, None], known)
            state = tuple(after.where(new[:, None], before) for after, before in zip(moved, state, strict=True))
        return texts


class Recogniser(Wav2Vec2BertForCTC):
    """Log-mel frames (B, S, f) to logits of labels (B, S, V), by transformers' Conformer of Wav2Vec2-BERT.

    Where `config.embedding_dim` is set, the embedding network's output is told to the routers of the layers. `heads`
    are those beside CTC: each has `loss(labels, frames, real)` and `greedy(frames, real)`, of the encoder's frames.
    """

    config_class = RecogniserConfig

    def __init__(self, config: RecogniserConfig) -> None:
        super().__init__(config)
        self.heads = nn.ModuleDict()
        if config.decoder_layers:
            self.heads["attending"] = AttentionHead(config)
        if config.transducer_dim:
            self.heads["transducer"] = TransducerHead(config)
        self.embedding: EmbeddingNetwork | None = None
        if dim := config.embedding_dim:
            self.embedding = EmbeddingNetwork(config.feature_projection_input_dim, dim, self.lm_head.out_features)
        self.post_init()

    def forward(
        self, input_features: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> CausalLMOutput:
        """Logits, the encoder's frames in `hidden_states`, and with labels (B, L), -100 for none, the loss.

        Args:
            input_features: (B, S, f).
            attention_mask: (B, S), 0 at padding, behind what is real.
            labels: (B, L) int64.
        """
        if attention_mask is None:
            attention_mask = torch.ones(input_features.shape[:2], dtype=torch.long, device=input_features.device)
        real, told = attention_mask != 0, {}
        if self.embedding is not None:
            told["embedding"], guessed = self.embedding(input_features, real)
        with tell(self, **told):
            frames = self.wav2vec2_bert(input_features, attention_mask=attention_mask).last_hidden_state
        logits, loss = self.lm_head(frames), None
        if labels is not None:
            shares = {"attending": self.config.attention_loss, "transducer": self.config.transducer_loss}
            loss = (1 - sum(shares[name] for name in self.heads)) * _per_label(logits, real, labels)
            heads: Any = self.heads
            for name, head in heads.items():
                loss = loss + shares[name] * head.loss(labels, frames, real)
            if self.embedding is not None:
                loss = loss + self.config.embedding_loss * _per_label(guessed, real, labels)
        return CausalLMOutput(loss=loss, logits=logits, hidden_states=(frames,))


RecogniserConfig.model_class = Recogniser
AutoConfig.register(RecogniserConfig.model_type, RecogniserConfig, exist_ok=True)


def ctc_nats(logits: Tensor, real: Tensor, labels: Tensor) -> Tensor:
    """Minus the log-probability (B,) of each text under CTC.

    Args:
        logits: (B, S, V).
        real: (B, S) bool, the frames that are no padding, first.
        labels: (B, L) int64, -100 behind the last.

    Source: Graves et al. 2006, section 4.1.
    """
    there = labels >= 0
    probabilities = logits.float().log_softmax(-1).transpose(0, 1)
    return F.ctc_loss(probabilities, labels.where(there, 1), real.sum(-1), there.sum(-1), BLANK, reduction="none")


def transducer_nats(logits: Tensor, real: Tensor, labels: Tensor) -> Tensor:
    """Minus the log-probability (B,) of each text under a transducer, the sum over all its alignments with the frames.

    Args:
        logits: (B, S, L + 1, V) floating point, of what follows at each frame on each number of labels said.
        real: (B, S) bool, the frames that are no padding, first, at least one.
        labels: (B, L) int64, -100 behind the last.

    Source: Graves 2012 (Sequence Transduction with Recurrent Neural Networks), section 2.4, equation 16.
    """
    there, scores = labels >= 0, logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = scores.logsumexp(-1)
    blank = scores[..., BLANK] - total
    index = labels.where(there, BLANK)[:, None, :, None].expand(-1, scores.shape[1], -1, -1)
    label = scores[:, :, :-1].gather(-1, index)[..., 0] - total[:, :, :-1]
    said = F.pad(label.cumsum(-1), (1, 0))  # of the first labels, all at one frame
    reached = [said[:, 0]]
    for t in range(1, scores.shape[1]):  # come from the frame before by a blank, then some labels at this one
        reached.append(said[:, t] + (reached[-1] + blank[:, t - 1] - said[:, t]).logcumsumexp(-1))
    rows = torch.arange(len(labels), device=labels.device)
    return -(torch.stack(reached, 1) + blank)[rows, real.sum(-1) - 1, there.sum(-1)]


def _per_label(logits: Tensor, real: Tensor, labels: Tensor) -> Tensor:
    return ctc_nats(logits, real, labels).sum() / (labels >= 0).sum().clamp_min(1)


def best_path(logits: Tensor, real: Tensor) -> list[list[int]]:
    """The labels of each text by CTC's best path: the likeliest of each frame, repeats once, without blanks."""
    likeliest = logits.argmax(-1).where(real, BLANK)
    first = F.pad(likeliest[:, 1:] != likeliest[:, :-1], (1, 0), value=True)
    return [row[new & (row != BLANK)].tolist() for row, new in zip(likeliest, first, strict=True)]
