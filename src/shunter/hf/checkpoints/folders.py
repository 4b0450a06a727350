"""A model folder to what may be believed of it: configuration, class, which tensor is which. No code in it is run."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from ...errors import UserError, one_line
from ...untrusted import few_values, inside, open_file, read_file
from ..config_file import MARKS, as_dense, introduce
from .reading import Stored, read_json

__all__ = [
    "COMPUTED",
    "has_tokenizer",
    "load_tokenizer",
    "local_folder",
    "match_names",
    "model_class",
    "on_meta",
    "read_config",
    "without_marks",
]

_MOST, _MOST_LAYERS, _MOST_MODULES = 2**31, 1000, 50_000
_MOST_SIZE, _MOST_PLACES, _MOST_ROTATED = 2**14, 2**17, 2**25
_MOST_TABLES = 2**28  # bytes; masks of GPT-Neo's 2.7 billion parameters take 2**27

COMPUTED = (r"rotary_emb\.inv_freq$", r"position_ids$", r"\.attn\.(masked_)?bias$")
"""Buffers of old checkpoints that models compute themselves today."""

_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def local_folder(model: str | Path) -> Path:
    """The folder of a model that is given by its path or its name on the Hugging Face Hub; of a run, its sparse one.

    Raises:
        UserError: where there is neither.
    """
    path = Path(model)
    if not (path / "config.json").is_file() and (path / "sparse" / "config.json").is_file():
        return path / "sparse"
    if path.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(model)):
        return path
    from huggingface_hub import snapshot_download

    wanted = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
    try:
        return Path(snapshot_download(str(model), allow_patterns=wanted))
    except Exception as error:  # no network, no such model, no access
        raise UserError(f"{model}: no such folder, and not a model that can be downloaded: {one_line(error)}") from None


def read_config(folder: Path, tensors: Mapping[str, Stored], quantised: bool = False) -> PreTrainedConfig:
    """A folder's configuration, by transformers, without running code from the folder or reading a file outside of it.

    Args:
        folder: holds config.json.
        tensors: those of the folder: a configuration cannot have more layers, nor sizes beyond theirs.
        quantised: whether a model may be quantised.

    Raises:
        UserError: where it is missing, damaged, absurd, or of a model that transformers does not have, and where the
            folder holds what would make transformers read something else.
    """
    _check_companions(folder)
    file = folder / "config.json"
    raw = read_json(file)
    _plausible(file, raw, len(tensors), max((side for stored in tensors.values() for side in stored.shape), default=0))
    if ("quantization_config" in raw or "shunter_quantised" in raw) and not quantised:
        raise UserError(f"{folder}: the weights are quantised; take the model that they were made of")
    dense = as_dense(raw)
    introduce(dense.get("model_type"))
    if "transformers_weights" in dense:
        raise UserError(f"{file}: names other weights by transformers_weights; put them under their usual name")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # a hostile configuration fails in as many ways as there are fields
        raise UserError(f"{file}: transformers cannot use it: {one_line(error)}") from None
    # Where the model's code lies, for models that transformers has itself: it is not run, and not handed on.
    vars(config).pop("auto_map", None)
    return without_marks(config)


_SETTINGS = re.compile(r"(.*config|added_tokens|chat_template|special_tokens_map|tokenizer|vocab)\.json")
_READ = {".json", ".jinja", ".model", ".safetensors", ".tiktoken", ".txt"}


def _check_companions(folder: Path) -> None:
    """Raises UserError where a file that transformers may read is no plain one, or would lead it to other files."""
    templates = folder / "additional_chat_templates"
    for file in sorted([*folder.iterdir(), *(templates.iterdir() if templates.is_dir() else [])]):
        if re.match(r"shard-\d{5}-model-", file.name):
            raise UserError(f"{file}: is of a distributed checkpoint, which would be read in place of the weights")
        if file.name == "adapter_config.json":
            raise UserError(f"{file}: is of an adapter, which would change the model; merge it and save the model")
        if file.suffix.lower() in _READ or file == templates:
            inside(file)
            if _SETTINGS.fullmatch(file.name):
                _check_json(file)
            elif file != templates:
                open_file(file).close()
    settings = folder / "tokenizer_config.json"
    for name, value in (read_json(settings) if settings.exists() else {}).items():
        elsewhere = isinstance(value, str) and name.endswith("_file") and re.search(r"[/\\]", value)
        if elsewhere and Path(folder, value).exists():
            raise UserError(f"{settings}: {name}={value!r} leads out of the folder; put the file itself there")


_MOST_TEXTS = 1000  # that are written at a time


def _check_json(file: Path) -> None:
    """Raises UserError for a JSON file that costs too much to read, or generation settings that cost too much to use.

    transformers reads many such files, without limits.
    """
    try:
        few_values(read_file(file))
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{file}: {error}") from None
    if file.name == "generation_config.json":
        settings = read_json(file)
        for name in ("num_beams", "num_beam_groups", "num_return_sequences"):
            if isinstance(value := settings.get(name), int | float) and value > _MOST_TEXTS:
                raise UserError(
                    f"{file}: {name}={value} is absurd; at most {_MOST_TEXTS:,} texts are written at a time"
                )


_LARGEST_TOKENIZER = 2**26  # bytes of a file
_MOST_TOKENS, _MOST_ADDED = 1_000_000, 20_000
_MOST_GROWTH = 1000  # times that a normalizer makes a text longer


def _check_tokenizer(folder: Path) -> dict[int, Any] | None:
    """The added tokens of tokenizer.json by their ids, where no other file has any; None where they are not to be had.

    transformers parses the whole file for them alone, and holds it while it parses it again for the rest.

    Raises:
        UserError: where a tokenizer has more entries than any needs, or makes texts grow without bound.
    """
    added: Any = None
    elsewhere = False
    for file in folder.iterdir():
        if file.suffix.lower() in {".model", ".tiktoken", ".txt"} and file.is_file():
            lines = read_file(file, _LARGEST_TOKENIZER).count(b"\n")
            if lines > _MOST_TOKENS:
                raise UserError(f"{file}: has {lines:,} lines; at most {_MOST_TOKENS:,} are read")
    others = ("tokenizer_config.json", "added_tokens.json", "special_tokens_map.json")
    for name in ("tokenizer.json", "vocab.json", *others):
        if (file := folder / name).exists():
            found = read_json(file)
            if name == "tokenizer.json":
                added = found.get("added_tokens")
            elsewhere |= name in others[1:] or "added_tokens_decoder" in found
            most = _MOST_ADDED if name in others else _MOST_TOKENS
            model = found.get("model")
            parts = {"": found, **found, **(model if isinstance(model, dict) else {})}
            for part, values in parts.items():
                limit = _MOST_ADDED if part in ("added_tokens", *_ADDED) else most
                if isinstance(values, dict | list) and len(values) > limit:
                    raise UserError(f"{file}: {part or 'it'} has {len(values):,} entries; at most {limit:,} are read")
            if (growth := _growth(found)) > _MOST_GROWTH:
                raise UserError(f"{file}: makes a text {growth:,.0f} times as long; at most {_MOST_GROWTH} are taken")
    if elsewhere or not isinstance(added, list):
        return None
    if not all(isinstance(token, dict) and type(token.get("id")) is int for token in added):
        return None  # which transformers refuses
    return {token["id"]: {name: value for name, value in token.items() if name != "id"} for token in added}


_ADDED = ("added_tokens_decoder", "additional_special_tokens", "extra_special_tokens")


def _growth(settings: Any) -> float:
    """How much longer the replacements among a tokenizer's settings may make a text, all together."""
    times, rest = 1.0, [settings.get(part) for part in ("normalizer", "pre_tokenizer", "decoder")]
    while rest:
        value = rest.pop()
        if isinstance(value, dict):
            pattern, content = value.get("pattern"), value.get("content")
            if isinstance(pattern, dict) and isinstance(content, str):
                shortest = len(str(pattern.get("String", "")).encode()) or 1
                times = min(times * max(1.0, len(content.encode()) / shortest), 1e9)
            rest.extend(value.values())
        elif isinstance(value, list):
            rest.extend(value)
    return times


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has files of a tokenizer."""
    return any((folder / name).exists() for name in _TOKENIZERS)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder, by transformers, without running code from the folder or reading a file outside of it.

    Raises:
        UserError: where there is none that can be loaded.
    """
    _check_companions(folder)
    added = _check_tokenizer(folder)
    given = {} if added is None else {"added_tokens_decoder": added}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **given)
        if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
            backend.no_padding(), backend.no_truncation()  # how long texts may be is the caller's
        tokenizer("some text")  # what is damaged may show only here
        return tokenizer
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the library in Rust is no Exception
        raise UserError(f"{folder}: no tokenizer can be loaded: {one_line(error)}") from None


def without_marks(config: PreTrainedConfig) -> PreTrainedConfig:
    """A configuration as transformers read it; of a sparse one, without the layers that an Auto class is to put in."""
    if any(getattr(config, name, None) is not None for name in MARKS):
        vars(config).pop("quantization_config", None)
    return config


# What is no size, whatever its number: parts of the names of fields.
_NO_SIZE = ("base", "freq", "seed", "steps", "theta", "token_id", "token_index")
# How long a text may be: no table of it need be in the folder where the embedding rotates.
_LENGTHS = ("context", "length", "max_", "n_ctx", "position", "seq", "window")


def _plausible(file: Path, values: dict[str, Any], num_tensors: int, largest: int, rotates: bool = False) -> None:
    """Raises UserError for numbers that would build what no tensor of the folder is there for."""
    rotates = rotates or any("rope" in name for name in values)
    for name, value in values.items():
        if isinstance(value, dict):
            _plausible(file, value, num_tensors, largest, rotates)
        numbers = value if isinstance(value, list) else [value]
        for entry in numbers:
            if isinstance(entry, dict):
                _plausible(file, entry if value is not entry else {}, num_tensors, largest, rotates)
            if isinstance(entry, bool) or not isinstance(entry, int):
                continue
            if not -_MOST < entry < _MOST:
                raise UserError(f"{file}: {name}={entry} is absurd")
            if any(part in name for part in _NO_SIZE):
                continue
            if ("layer" in name or "depth" in name or "block" in name) and entry > max(num_tensors, _MOST_LAYERS):
                raise UserError(f"{file}: {name}={entry}, but the folder holds {num_tensors} tensors in all")
            length = any(part in name for part in _LENGTHS)
            most = (_MOST_ROTATED if rotates else _MOST_PLACES) if length else _MOST_SIZE
            if entry > max(largest, most):
                raise UserError(f"{file}: {name}={entry} is absurd: no tensor of the folder has a side above {largest}")


def model_class(config: PreTrainedConfig, path: str) -> type[PreTrainedModel]:
    """The class that a configuration names: of transformers, or the `model_class` of a configuration of Shunter's own.

    Raises:
        UserError: where there is none.
    """
    if own := getattr(type(config), "model_class", None):
        return own
    given = config.architectures
    if not isinstance(given, list) or not given or not isinstance(given[0], str):
        raise UserError(f"{path}: config.json names no architecture; give its class of transformers in architectures")
    name = given[0]
    found = getattr(transformers, name, None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise UserError(f"{path}: names the architecture {name!r}, which transformers does not have")
    return found


def on_meta(
    kind: Callable[[PreTrainedConfig], PreTrainedModel], config: PreTrainedConfig, folder: Path
) -> PreTrainedModel:
    """The modules of a model without memory.

    Raises:
        UserError: where the configuration does not describe one, or one with tables far larger than its weights: those
            are computed, so no file need hold them.
    """
    count = 0

    def note(module: Any, name: str, child: Any) -> None:
        nonlocal count
        count += 1
        if count > _MOST_MODULES:
            raise ValueError(f"it would have more than {_MOST_MODULES:,} modules")

    watch = torch.nn.modules.module.register_module_module_registration_hook(note)
    try:
        with torch.device("meta"):
            model = kind(config)
    except Exception as error:  # as many ways to fail as there are fields
        raise UserError(f"{folder}: config.json does not describe a model: {one_line(error)}") from None
    finally:
        watch.remove()
    tables = sum(buffer.nbytes for module in model.modules() for buffer in _unsaved(module))
    if tables > _MOST_TABLES and tables > _MOST_TABLES + (held := sum(t.nbytes for t in model.state_dict().values())):
        raise UserError(f"{folder}: config.json asks for tables of {tables:,} bytes beside {held:,} of weights")
    return model


def _unsaved(module: torch.nn.Module) -> list[torch.Tensor]:
    """A module's own buffers that are in no file."""
    found = (module._buffers[name] for name in module._non_persistent_buffers_set)
    return [buffer for buffer in found if buffer is not None]


def match_names(
    folder: Path, model: PreTrainedModel, tensors: Mapping[str, Stored], placed: Collection[str] = ()
) -> tuple[dict[str, str], list[str]]:
    """What each tensor on disk is called in the model, and which it has no use for.

    Args:
        folder: for the messages.
        model: its modules, without memory.
        tensors: name on disk -> dtype and shape.
        placed: names in the model that are accounted for otherwise.

    Raises:
        UserError: for a tensor too many, one too few and a wrong shape.
    """
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in placed}
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    ignored = [*COMPUTED, *(model._keys_to_ignore_on_load_unexpected or ())]
    names: dict[str, str] = {}
    unused = []
    for disk, stored in tensors.items():
        name, converted = rename_source_key(disk, renamings, converters, model.base_model_prefix, state)
        if converted is not None:
            raise UserError(
                f"{folder}: {disk!r} is stored in a layout that transformers converts; load the model with "
                "transformers 5, save_pretrained it and take that folder"
            )
        if name in state:
            if tuple(state[name].shape) != stored.shape:
                raise UserError(
                    f"{folder}: {disk!r} has shape {list(stored.shape)}; config.json asks for {list(state[name].shape)}"
                )
            ours, theirs = state[name].dtype, stored.dtype
            if ours != theirs and not (ours.is_floating_point and theirs.is_floating_point):
                raise UserError(f"{folder}: {disk!r} is of {theirs}; the model has {ours} there")
            names[disk] = name
        elif any(re.search(pattern, name) for pattern in ignored):
            unused.append(disk)
        else:
            raise UserError(f"{folder}: {type(model).__name__} has no place for the tensor {disk!r}; it is left over")
    taken = set(names.values())
    if len(taken) < len(names):
        raise UserError(f"{folder}: two tensors stand for the same parameter of {type(model).__name__}")
    tied: dict[str, str] = model.all_tied_weights_keys
    optional = [*COMPUTED, *(model._keys_to_ignore_on_load_missing or ())]
    for name in state:
        if name not in taken and tied.get(name) not in taken and not any(re.search(p, name) for p in optional):
            raise UserError(f"{folder}: lacks the tensor {name!r} of {type(model).__name__}")
    return names, unused
