"""From the arguments of a model's forward to the `Context` of its tokens: ids, padding, sequences, places in them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..context import Context, places_in, present
from ..errors import UserError
from ..moe import moe_layers
from ..routers.hash import PreviousTokenHash

__all__ = [
    "among_others",
    "arguments",
    "cache_argument",
    "decoder_padding",
    "fitted",
    "has_tokens",
    "hands_on_others",
    "has_others",
    "takes_cache",
    "takes_tokens",
    "tokens_of",
]

# Masks that are True, or 1, at padding: of XLNet, of FSMT's decoder.
_INVERTED = ("input_mask", "decoder_padding_mask")
_MASKS = ("pixel_attention_mask", "pixel_mask", "attention_mask", "padding_mask")
# What models of words are given to make more tokens of: patches, regions, entities, queries.
_OTHERS = ("pixel_values", "image", "image_embeds", "visual_feats", "visual_embeds", "entity_ids", "query_embeds")
# What is added to scores to forbid them is below this, whatever it is: -inf, the least of a dtype, -1e9, -1e4.
_FORBIDDEN = -1e3
# A model that takes these has a grid of tokens of its own: patches of images, frames of sound.
_GRIDS = ("pixel_values", "input_features", "input_values")


def arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a module's forward by name."""
    return {**dict(zip(inspect.signature(module.forward).parameters, args, strict=False)), **kwargs}


def takes_tokens(module: nn.Module) -> bool:
    """Whether a module takes token ids, or is a model that takes an attention mask."""
    names = set(inspect.signature(module.forward).parameters)
    return "input_ids" in names or (isinstance(module, PreTrainedModel) and "attention_mask" in names)


def has_tokens(module: nn.Module) -> bool:
    """Whether a module takes tokens, or is a model that makes them of what it takes: patches of images, frames."""
    grids = isinstance(module, PreTrainedModel) and set(_GRIDS) & set(inspect.signature(module.forward).parameters)
    return takes_tokens(module) or bool(grids)


def tokens_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Context:
    """What the arguments of a model's forward say of its tokens (B, S): ids, padding (None: none), sequences, places.

    Sequences packed in a row are told apart by `seq_idx`, `cu_seq_lens_q`, `position_ids` that start again, or a mask
    of queries and keys that is block diagonal. After a cache of earlier tokens the places go on from there. A mask of
    sound (B, frames) becomes one of tokens by the model's own rule, where it has one. What does not fit the tokens of
    a layer is refused there: padding is never dropped.

    Raises:
        UserError: for a mask of which padding cannot be read.
    """
    given = arguments(module, args, kwargs)
    ids = _tensor(given, "input_ids")
    known = ids if ids is not None else _tensor(given, "inputs_embeds")
    if known is None:
        return Context(mask=_of_grid(module, given))
    if known.dim() != (2 if known is ids else 3):
        return Context(token_ids=ids)  # a model that cuts its tokens itself, for a model inside of it
    batch, length = known.shape[:2]
    past = _past(given)
    paged = given.get("cu_seq_lens_q") is not None and _cache(given) is not None
    mask = given.get("attention_mask")
    if mask is None:
        mask = next((given[name] == 0 for name in _INVERTED if _tensor(given, name) is not None), None)
    real, starts = (None, None) if paged else _read_mask(module, mask, batch, length, past)
    if real is None and ids is not None and _is_zero(past) and _tensor(given, "encoder_hidden_states") is not None:
        real = _until_padding(ids, module)
    real = _unless_all(real)
    starts = _packed_starts(given, real, batch, length, starts)
    first = torch.zeros(batch, length, dtype=torch.bool, device=known.device)
    first[:, :1] = True
    if starts is not None:
        first = first | starts
    sequence = first.reshape(-1).cumsum(0).reshape(batch, length) - 1
    position = None
    if paged or not _is_zero(past):
        position = _tensor(given, "position_ids")
        if position is None or position.shape != known.shape[:2]:
            flat = None if real is None else real.reshape(-1)
            position = places_in(sequence.reshape(-1), flat).reshape(batch, length) + _earlier(given, length, past)
    return Context(mask=real, token_ids=ids, sequence=sequence, position=position)


def decoder_padding(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Where the decoder of an encoder-decoder model has tokens (B, S), by the mask for it or the labels.

    None where neither tells, and where a mask is of earlier tokens too, which the decoder itself is given.
    """
    given = arguments(module, args, kwargs)
    if not getattr(module.config, "is_encoder_decoder", False):
        return None
    labels, ids = _tensor(given, "labels"), _tensor(given, "decoder_input_ids")
    mask = _tensor(given, "decoder_attention_mask")
    if mask is not None:
        known = labels if ids is None else ids
        return _unless_all(mask != 0) if known is not None and known.shape == mask.shape else None
    if (
        labels is None
        or labels.dim() != 2
        or labels.is_floating_point()
        or (ids is not None and ids.shape != labels.shape)
    ):
        return None
    return _unless_all(_up_to_last(labels != -100))


def hands_on_others(module: Any) -> bool:
    """Whether a model makes other tokens of those that it is given, as `fitted` and `among_others` know."""
    return bool(
        _pads(module)
        or _downsamples(module)
        or getattr(module, "ngram", None)
        or hasattr(_encoder(module), _STRUCTURE)
        or not _parameters(module) & {"input_ids", "inputs_embeds", *_GRIDS}
        or ("input_ids" in _parameters(module) and _parameters(module) & set(_OTHERS))
    )


def has_others(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a forward's tokens are not, or not all, words or a grid that it is given."""
    given = arguments(module, args, kwargs)
    if not _parameters(module) & {"input_ids", "inputs_embeds", *_GRIDS}:
        return True
    return "input_ids" in _parameters(module) and any(given.get(name) is not None for name in _OTHERS)


def among_others(module: nn.Module, known: Context, attention: tuple[Any] | None, shape: torch.Size) -> Context:
    """What is known of the tokens (B, S') of a layer in a model of words and others, by the attention mask around it.

    LUKE, VisualBERT, LayoutLM, ViLT, GIT, UDOP and FLAVA put others behind or before the words; LXMERT, BridgeTower and
    the Q-Former have layers for the others alone. Ids are those of no others, and so are refused where they are needed.

    Args:
        module: the model.
        known: of the words (B, S).
        attention: the mask that the block around the layer is given; None where it takes none.
        shape: of the layer's tokens.

    Raises:
        UserError: where the words have padding, and it cannot be told whether the layer's tokens are they.
    """
    if len(shape) != 2:
        return known
    batch, length = shape
    mask = None if attention is None else attention[0]
    bare = replace(known, token_ids=None, position=None, sequence=_unless_rows(known.sequence))
    if attention is not None and (not isinstance(mask, Tensor) or mask.shape[-1] == length):
        return replace(bare, mask=_unless_all(_read_mask(module, mask, batch, length, 0)[0]))
    words = next((value for value in (known.mask, known.token_ids) if value is not None), None)
    if words is None or words.shape != shape or (isinstance(mask, Tensor) and mask.shape[-1] != 2 * length):
        return known  # of other tokens; or of words, behind a known number of others, as in the Q-Former
    if known.mask is not None and not _is_told(module):
        raise UserError(
            f"{type(module).__name__}: its words have padding, and nothing tells whether the tokens of one of its "
            "sparse layers are they, or others; give words without padding, or say which are real by "
            "shunter.tell(model, mask=…)"
        )
    return bare


def fitted(module: Any, known: Context, shape: torch.Size) -> Context:
    """What is known of a model's tokens (B, S), of those (B, S') that it makes of them for a layer inside.

    Longformer, LED, BigBird and Reformer pad the end of each row; CANINE makes a token of several, real where one of
    them is; Funnel of two, real where both are; ProphetNet's decoder has the same tokens once more for each n-gram.
    Ids, and sequences packed in a row, are not those of other tokens, and so are refused where they are needed.
    """
    given = next((value for value in (known.mask, known.token_ids, known.sequence) if value is not None), None)
    if given is None or given.dim() != 2 or len(shape) != 2 or shape[0] != given.shape[0] or shape[1] == given.shape[1]:
        return known
    more = shape[1] - given.shape[1]
    mask = known.mask
    if _pads(module):
        if more < 0:
            return known
        real = torch.ones_like(given, dtype=torch.bool) if mask is None else mask
        ids, sequence, position = known.token_ids, known.sequence, known.position
        return replace(
            known,
            mask=F.pad(real, (0, more)),
            token_ids=None if ids is None else F.pad(ids, (0, more)),
            sequence=None if sequence is None else torch.cat((sequence, sequence[:, -1:].expand(-1, more)), 1),
            position=None if position is None else F.pad(position, (0, more)),
        )
    sequence, position = _unless_rows(known.sequence), known.position
    if getattr(module, "ngram", None):
        if position is None:
            position = (torch.ones_like(given) if mask is None else mask).cumsum(1) - 1
        position = position.repeat(1, 1 + module.ngram)
    if mask is None:
        pass
    elif _downsamples(module):
        mask = module._downsample_attention_mask(mask.to(torch.int64), module.config.downsampling_rate) != 0
    elif getattr(module, "ngram", None):
        mask = mask.repeat(1, 1 + module.ngram)
    else:
        structure = getattr(_encoder(module), _STRUCTURE)
        while mask.shape[1] > shape[1]:
            mask = structure.pool_tensor(mask.float(), mode="min") != 0
    return replace(known, mask=mask, sequence=sequence, position=position)


_STRUCTURE = "attention_structure"  # of Funnel
_PADDING = ("_pad_to_window_size", "_pad_to_block_size", "_pad_to_mult_of_chunk_length")


def _pads(module: Any) -> bool:
    return any(hasattr(module, name) for name in _PADDING)


def _parameters(module: nn.Module) -> set[str]:
    return set(inspect.signature(module.forward).parameters)


def _unless_rows(sequence: Tensor | None) -> Tensor | None:
    """None where a row (S,) of (B, S) is one sequence, of whatever tokens; a compiled graph does not ask."""
    if sequence is None or torch.compiler.is_compiling() or not bool((sequence == sequence[:, :1]).all()):
        return sequence
    return None


def _downsamples(module: Any) -> bool:
    return hasattr(module, "_downsample_attention_mask")


def _encoder(module: Any) -> Any:
    return getattr(module, "encoder", None)


def _tensor(given: Mapping[str, Any], name: str) -> Tensor | None:
    value = given.get(name)
    return value if isinstance(value, Tensor) else None


def _unless_all(real: Tensor | None) -> Tensor | None:
    """None where all are real; a compiled graph does not ask."""
    return None if real is None or (not torch.compiler.is_compiling() and bool(real.all())) else real


def _up_to_last(marked: Tensor) -> Tensor:
    """(B, S) True up to the last True of each row."""
    return marked.flip(1).cumsum(1).flip(1) > 0


def _cache(given: Mapping[str, Any]) -> Any:
    return next((given[name] for name in ("cache", "past_key_values") if given.get(name) is not None), None)


def _past(given: Mapping[str, Any]) -> int | Tensor:
    """How many earlier tokens a cache holds."""
    length = getattr(_cache(given), "get_seq_length", None)
    return 0 if length is None else length()


def _earlier(given: Mapping[str, Any], length: int, past: int | Tensor) -> Tensor | int:
    """How many of the earlier tokens are real: (B, 1), or of all rows alike."""
    mask = _tensor(given, "attention_mask")
    if mask is not None and mask.dim() == 2 and mask.shape[1] > length:
        return (mask[:, :-length] != 0).sum(1, keepdim=True)
    return past


def _is_zero(past: int | Tensor) -> bool:
    return isinstance(past, int) and past == 0


def _read_mask(
    module: nn.Module, mask: Any, batch: int, length: int, past: int | Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Where the present tokens are real (B, S), and where sequences start; each None where the mask does not say."""
    if isinstance(mask, Mapping):  # one for each kind of attention
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if mask is None:
        return None, None
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 3, 4):
        return _unreadable(module, mask)
    if mask.dim() == 2:
        # While generating from a cache the mask covers the past too; the present tokens are its last columns.
        return mask[:, -length:] != 0, None
    additive = mask.is_floating_point() and mask.dim() == 4
    allowed = mask > _FORBIDDEN if additive else mask != 0
    if allowed.dim() == 4:
        allowed = allowed.any(1)
    allowed = allowed.expand(batch, -1, -1)
    if not _is_zero(past) and int(past):
        # Behind a cache, of which a sliding one holds the last tokens alone: what sees something is a token.
        return allowed.any(-1).expand(batch, length), None
    allowed = allowed[:, :, :length]
    if allowed.shape[1] == 1 and length > 1:
        return allowed[:, 0], None
    if allowed.shape[1:] != (length, length):
        return _unreadable(module, mask)
    # A row of padding sees nothing, or, where kernels cannot have such rows, everything: later tokens too, although no
    # other row sees it.
    everything = allowed.all(-1)
    seen = (allowed & ~everything[:, :, None]).any(1)
    blind = everything & ~seen & ~everything.all(1, keepdim=True)
    blind[:, -1] = False  # in a causal mask the last token sees everything
    return allowed.diagonal(dim1=1, dim2=2) & ~blind, ~allowed.tril(-1).any(-1)


def _unreadable(module: nn.Module, mask: Any) -> tuple[None, None]:
    """Nothing, where the layers inside are told of their padding otherwise."""
    if _is_told(module):
        return None, None
    raise UserError(
        f"{type(module).__name__}: padding cannot be read of an attention_mask that is "
        f"{tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__}; give one of tokens, (B, S), or say "
        "which are real by shunter.tell(model, mask=…)"
    )


def _is_told(module: nn.Module) -> bool:
    """Whether the layers inside are told of their padding by `shunter.tell`."""
    layers = set(moe_layers(module).values())
    return any("mask" in scope.told and (scope.layers is None or layers <= scope.layers) for scope in present())


def _until_padding(ids: Tensor, module: Any) -> Tensor | None:
    """Where a decoder's ids (B, S) are tokens: up to the padding at their end; the first, which may be padding, starts.

    None where the model's padding is a word, too.
    """
    pad, end = getattr(module, "padding_idx", None), None
    if isinstance(module, PreTrainedModel):
        config = module.config.get_text_config(decoder=True)
        pad, end = getattr(config, "pad_token_id", None), getattr(config, "eos_token_id", None)
    if pad is None or pad in (end if isinstance(end, list) else [end]):
        return None
    real = ids != pad
    real[:, :1] = True
    return _up_to_last(real)


def _packed_starts(
    given: Mapping[str, Any], real: Tensor | None, batch: int, length: int, seen: Tensor | None
) -> Tensor | None:
    """Where another sequence starts within a row (B, S); None where nothing says that one does.

    Args:
        given: the arguments of the forward.
        real: (B, S) where tokens are real; None for everywhere.
        seen: (B, S) True at tokens that see no earlier one; None where it is not known.
    """
    numbers, ends, places = _tensor(given, "seq_idx"), given.get("cu_seq_lens_q"), _tensor(given, "position_ids")
    size = (batch, length)
    if places is not None and places.dim() == 3 and places.shape[0] == 4:
        places = places[0]  # of text, before those of time, height and width
    elif places is not None and places.dim() == 3 and places.shape[0] == 3 and places.shape[1:] == size:
        starts = F.pad((places[:, :, 1:] == 0).all(0), (1, 0))  # of an image's patches only the first is at 0 in all
        return starts if real is None else starts & real & (real.cumsum(1) > 1)
    if numbers is not None and numbers.shape == size:
        starts = F.pad(numbers[:, 1:] != numbers[:, :-1], (1, 0))
    elif ends is not None and batch == 1:
        ends = torch.as_tensor(ends)
        starts = torch.zeros(1, length + 1, dtype=torch.bool, device=ends.device)
        starts[0, ends.to(torch.int64).clamp(0, length)] = True
        starts = starts[:, :length]
    elif places is not None and places.shape in (size, (1, length)):
        starts = _start_again(places.expand(size), real)
    elif seen is not None:
        starts = seen
    else:
        return None
    if real is None:
        return starts
    starts = starts.to(real.device)
    return starts & real & (real.cumsum(1) > 1)  # a row's first token starts no other sequence than the row's


def _start_again(places: Tensor, real: Tensor | None) -> Tensor:
    """(B, S) True where a token's place is not behind that of the real token before."""
    if real is None:
        return F.pad(places[:, 1:] <= places[:, :-1], (1, 0))
    own = torch.arange(places.shape[1], device=places.device).expand_as(places)
    last = F.pad(torch.where(real, own, -1).cummax(1).values[:, :-1], (1, 0), value=-1)
    return (last >= 0) & (places <= places.gather(1, last.clamp_min(0)))


def _of_grid(module: nn.Module, given: Mapping[str, Any]) -> Tensor | None:
    """Where the patches or frames of a model that has those are real, (B, S); None where all are."""
    if not any(name in given for name in _GRIDS):
        return None
    mask = next((given[name] for name in _MASKS if _tensor(given, name) is not None), None)
    real = _unless_all(None if mask is None else mask != 0)
    return None if real is None else _of_frames(module, real)


def _of_frames(module: Any, mask: Tensor) -> Tensor:
    """The mask (B, S) of the tokens that convolutions make of sound, of that (B, frames) of the sound."""
    lengths = getattr(module, "_get_feat_extract_output_lengths", None)
    if lengths is None or mask.dim() != 2:
        return mask
    # What comes after the encoder shortens its output further, not its tokens.
    rest = {"add_adapter": False} if "add_adapter" in inspect.signature(lengths).parameters else {}
    real = lengths(mask.sum(-1), **rest).to(mask.device)
    longest = int(lengths(torch.tensor(mask.shape[1]), **rest))
    return torch.arange(longest, device=mask.device) < real[:, None]


def takes_cache(model: nn.Module) -> bool:
    """Whether a model may generate with a cache: not where a layer goes by the token before, which a cache hides."""
    return not any(isinstance(layer.decider.innermost, PreviousTokenHash) for layer in moe_layers(model).values())


def cache_argument(model: nn.Module) -> str:
    """As what the forward of a model takes its cache of keys and values."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
