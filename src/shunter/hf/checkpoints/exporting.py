"""A sparse model in one format to the same in another, bit for bit: Shunter's own, transformers' families, GGUF.

Tensors pass one by one. Where each expert's matrices lie is named by a layout, which the receipt tags; nothing is
guessed from shapes.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ...durable import write
from ...environment import VERSION, Memory
from ...errors import UserError
from . import converting
from .check import probe
from .converting import Plan, convert, loader_of, megabytes
from .folders import has_tokenizer, load_tokenizer, local_folder, match_names, model_class, read_config
from .formats import OWN, Format, find, made_here
from .gguf import unpack, unpacked
from .gguf_writing import write_gguf
from .layouts import Form, layers_of
from .loading import load_folder
from .native import FAMILIES, family_for
from .reading import Checkpoint, Stored

__all__ = ["describe", "export"]


def export(
    model: str | Path,
    out: str | Path,
    to: str = "auto",
    *,
    check: bool = True,
    max_shard_bytes: int = 5_000_000_000,
) -> dict[str, Any]:
    """Write a sparse model of Shunter's as one of a family of transformers, or the other way round, bit for bit.

    Mixtral, Qwen3-MoE, OLMoE, FlexOlmo and DeepSeek-V3 are the families: plain transformers loads them with no Shunter
    installed. The balancing loss keeps its strength; transformers takes it where output_router_logits=True.

    Args:
        model: the folder of a model that `sparsify` made and `save_pretrained` wrote (or `upcycle`), or of one of the
            families; or a GGUF file of Mixtral or Qwen3-MoE.
        out: the folder to make; it appears when it is whole. A name that ends in .gguf: the file to make for llama.cpp,
            of a model of one of the first three families or of Shunter's, quantised or not, beside which the receipt
            is NAME.gguf.json.
        to: "shunter", or the family's name; "auto" is the family for a model of Shunter's, and "shunter" for others;
            a GGUF file takes "auto" or "gguf".
        check: load both models in float32 (float64 for float64) and compare their logits; a difference beyond rounding
            is an error.
        max_shard_bytes: of a file.

    Returns:
        What receipt.json in the new folder holds: what became of each tensor, both layouts, the peak of memory, the
        measured difference.

    Raises:
        UserError: where the family cannot express the routing or the experts (saying why and what to change), for
            damaged folders and an `out` that exists; nothing is left behind.
    """
    memory = Memory()
    is_gguf, to_gguf = (Path(path).suffix == ".gguf" for path in (model, out))
    if (to == "gguf") > to_gguf or (to_gguf and to not in ("auto", "gguf")):
        raise UserError(f"export: to={to!r} does not go with {out}; GGUF files, and they alone, end in .gguf")
    with unpacked(Path(model), Path(out).parent) if is_gguf else nullcontext(local_folder(model)) as folder:
        if to_gguf:
            return _to_gguf(folder, Path(out), memory, check)
        return convert("export", _planned(folder, to), Path(out), memory, check, max_shard_bytes)


def _to_gguf(folder: Path, out: Path, memory: Memory, check: bool) -> dict[str, Any]:
    """A folder's model as a GGUF file and its receipt; read back, where a check is wanted."""
    beside = out.with_name(f"{out.name}.json")
    for path in (out, beside):
        if path.exists():
            raise UserError(f"export: {path} exists already")
    model = load_folder(folder)
    made = write_gguf(model, out, load_tokenizer(folder) if has_tokenizer(folder) else None)
    memory.note()
    receipt: dict[str, Any] = {"made_by": f"shunter {VERSION} export", "from": type(model).__name__, "format": "gguf"}
    receipt |= {"bytes": out.stat().st_size, "peak_bytes": memory.peak, "check": None}
    if check:
        with tempfile.TemporaryDirectory(dir=out.parent) as room:
            unpack(out, Path(room) / "back", tokenizer=False)
            inputs = probe(model)
            with torch.no_grad():
                ours, theirs = (m(**inputs).logits.double() for m in (model.float(), load_folder(Path(room) / "back")))
        difference, size = ours - theirs, ours.square().mean().sqrt().item()
        receipt["check"] = {"rms_difference": difference.square().mean().sqrt().item(), "rms_logits": size}
        moved = max(entry["error"] for entry in made["tensors"].values())
        if not receipt["check"]["rms_difference"] <= (1e-3 + 100 * moved) * size:
            out.unlink()
            raise UserError(f"export: {out} read back has other logits than {folder}; report this")
    receipt |= made
    write(beside, json.dumps(receipt, indent=1) + "\n")
    return receipt


def _planned(folder: Path, to: str) -> Plan:
    """The plan of the new folder.

    Raises:
        UserError: where there is none.
    """
    checkpoint = Checkpoint(folder)
    config = read_config(folder, checkpoint.tensors)
    source = _format_of(config, folder)
    target = _target(source, config, folder, to)
    sparse, here = source.read(checkpoint, config)
    try:
        there = target.write(sparse)
    except ValueError as error:
        raise UserError(f"export: cannot write {target.name}: {error}") from None
    return _plan(checkpoint, sparse, here, there)


def describe(receipt: dict[str, Any]) -> str:
    """A receipt of `export` in words."""
    if receipt["format"] == "gguf":
        return _describe_gguf(receipt)
    lines = [
        f"{receipt['from']} as {receipt['format']}; {loader_of(receipt)} loads it.",
        f"Tensors: {len(receipt['tensors'])} accounted for, bit for bit (receipt.json); {megabytes(receipt['bytes'])}, "
        f"peak memory of the conversion {megabytes(receipt['peak_bytes'])}.",
    ]
    if receipt["left_behind"]:
        lines.append(f"Of training alone, and without a field there: {', '.join(receipt['left_behind'])}.")
    return converting.describe(receipt, lines, "first")


def _describe_gguf(receipt: dict[str, Any]) -> str:
    tensors = receipt["tensors"].values()
    kinds = Counter(entry["type"] for entry in tensors)
    moved = [entry["error"] for entry in tensors if entry["error"]]
    lines = [
        f"{receipt['from']} as GGUF of the architecture {receipt['architecture']!r}; llama.cpp loads it.",
        f"Tensors: {', '.join(f'{count} {kind}' for kind, count in kinds.items())}; {megabytes(receipt['bytes'])}. "
        + (
            f"Scales or zeros of {len(moved)} were rounded to float16, which moves their weights by {max(moved):.1e} "
            "at most, relative; codes are kept bit for bit."
            if moved
            else "Every weight is kept bit for bit."
        ),
        f"Tokenizer: {receipt['tokenizer']}.",
    ]
    if check := receipt["check"]:
        lines.append(
            f"Read back, its logits differ by {check['rms_difference']:.2g} (root mean square) of "
            f"{check['rms_logits']:.2g}."
        )
    return "\n".join(lines)


def _format_of(config: PreTrainedConfig, folder: Path) -> Format:
    if made_here(config):
        return OWN
    family = FAMILIES.get(config.model_type)
    if family is None or model_class(config, str(folder)).__name__ != family.architecture:
        known = ", ".join(f.architecture for f in FAMILIES.values())
        raise UserError(
            f"export: {folder} holds {(config.architectures or ['?'])[0]}, which is neither of shunter.sparsify nor of "
            f"{known}; a dense model becomes sparse with shunter upcycle"
        )
    return family


def _target(source: Format, config: PreTrainedConfig, folder: Path, to: str) -> Format:
    wanted = find(to, "export")
    if source is not OWN:
        if wanted not in (None, OWN):
            raise UserError(f"export: {folder} is {source.name} already and goes to shunter, not to {to}")
        return OWN
    if wanted is OWN:
        raise UserError(f"export: {folder} is in Shunter's format already; leave `to` out, or name a family")
    architecture = model_class(config, str(folder)).__name__
    try:
        family = family_for(config, architecture)
    except UserError as error:
        raise UserError(f"export: {folder} stays in Shunter's format: {error}") from None
    if wanted not in (None, family):
        raise UserError(f"export: a {config.model_type} model continues as {family.name}, not as {to}")
    return family


_EMPTY = "empty: there is no shared expert"


def _plan(checkpoint: Checkpoint, sparse: PreTrainedModel, here: Form, there: Form) -> Plan:
    names, unused = _match(checkpoint, sparse, here)
    tensors = {name: checkpoint.tensors[disk] for disk, name in names.items()}
    became: dict[str, dict[str, Any]] = {disk: {"how": "unused by the model", "to": []} for disk in unused}
    became |= {disk: {"how": "copied", "to": [name]} for disk, name in names.items()}
    new = {}
    for path, source in here.pieces.items():
        target = there.pieces[path]
        for key, piece in target.items():
            # A width of 0 is a tensor without elements in one format and no tensor in the other.
            spec = Stored(checkpoint.tensors[source.get(key, source["up", 0]).name].dtype, piece.tensor)
            if tensors.setdefault(piece.name, spec) != spec:
                raise UserError(
                    f"export: {piece.name} would be made of tensors of different dtypes; save the model in one"
                )
            if key not in source:
                new[piece.name] = _EMPTY
        for key, piece in source.items():
            entry = became.setdefault(piece.name, {"how": _EMPTY, "to": []})
            if key in target and target[key].name not in entry["to"]:
                entry["how"] = "moved"
                entry["to"].append(target[key].name)
    facts = {
        "from": here.format,
        "from_layout": here.layout,
        "format": there.format,
        "layout": there.layout,
        "left_behind": list(there.left_behind),
        "bytes": sum(stored.nbytes for stored in tensors.values()),
    }
    widest = max((s.dtype for s in tensors.values() if s.dtype.is_floating_point), key=lambda d: d.itemsize)
    values = _values(checkpoint, names, here, there)
    dtype = torch.promote_types(widest, torch.float32)
    return Plan(checkpoint, there.config, tensors, became, new, values, facts, dtype, exact=True)


def _match(checkpoint: Checkpoint, sparse: PreTrainedModel, here: Form) -> tuple[dict[str, str], list[str]]:
    """The tensors outside the sparse layers: name on disk -> name in the model; and what the model has no use for."""
    lying = {piece.name: piece.tensor for pieces in here.pieces.values() for piece in pieces.values()}
    for name, shape in lying.items():
        checkpoint.must_hold(name, shape)
    placed = {f"{path}.{name}" for path, layer in layers_of(sparse).items() for name in layer.state_dict()}
    rest = {name: stored for name, stored in checkpoint.tensors.items() if name not in lying}
    return match_names(checkpoint.folder, sparse, rest, placed)


def _values(
    checkpoint: Checkpoint, names: dict[str, str], here: Form, there: Form
) -> Iterator[tuple[str, int, Tensor]]:
    for disk, name in names.items():
        yield name, 0, checkpoint.read(disk)
    for path, source in here.pieces.items():
        for key, piece in there.pieces[path].items():
            if key in source:
                old = source[key]
                assert old.shape == piece.shape
                yield piece.name, piece.offset, checkpoint.read(old.name, old.offset, old.shape)
