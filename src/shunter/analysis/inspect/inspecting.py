"""Inspection: from mixture-of-experts models and data to all that is measured, as one dictionary for JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging

from ...data.documents import built_in_domains, read_domains
from ...errors import UserError
from ...hf.checkpoints.folders import has_tokenizer, load_tokenizer, local_folder
from ...hf.checkpoints.loading import load_folder
from ...hf.observe.taps import taps
from ...hf.sparsifying import router_name
from ...metrics import expert_load
from ...moe import moe_layers, plain_experts
from ..expert_weights import expert_parameters, moved
from ..specialisation import label_counts, label_shares
from .ablation import ablate
from .findings import describe_data, describe_usage, describe_weights, specialisation_of, tokens_served
from .material import Material, image_material, text_material
from .recording import Recording, batch_losses, record
from .saturation import chance_saturation, saturation

__all__ = ["Inspected", "inspect", "load", "material_for", "specialisation"]

ABLATION_TOKENS = 4096
T = TypeVar("T")


@dataclass(frozen=True)
class Inspected:
    """A model and what it is called.

    Args:
        name: for people.
        model: itself.
        folder: where it lies.
    """

    name: str
    model: PreTrainedModel
    folder: Path

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that lies beside the model.

        Raises:
            UserError: where there is none.
        """
        tokenizer = load_tokenizer(self.folder)
        assert isinstance(tokenizer, PreTrainedTokenizerBase)
        return tokenizer

    def must_share_words(self, other: PreTrainedModel, folder: Path) -> None:
        """See that a number is the same word, or class, for another model, which lies in a folder.

        Raises:
            UserError: where it is not, by the sizes of both vocabularies or by the tokenizers of both folders.
        """
        configs = (model.config.get_text_config() for model in (other, self.model))
        sizes = [getattr(each, "vocab_size", None) or getattr(each, "num_labels", None) for each in configs]
        if sizes[0] != sizes[1]:
            raise UserError(
                f"{folder} has a vocabulary of {sizes[0]}, {self.name} one of {sizes[1]}; they must have the same"
            )
        if not (has_tokenizer(folder) and has_tokenizer(self.folder)):
            return
        found = (load_tokenizer(each).get_vocab() for each in (folder, self.folder))
        theirs, ours = ({number: word for word, number in vocabulary.items()} for vocabulary in found)
        if unlike := sorted(number for number in theirs.keys() & ours.keys() if theirs[number] != ours[number]):
            raise UserError(
                f"the tokenizers of {folder} and {self.name} differ: token {unlike[0]} is {theirs[unlike[0]]!r} and "
                f"{ours[unlike[0]]!r}; they must be the same"
            )


def material_for(subject: Inspected, data: Sequence[str] | None, tokens: int = 16384, length: int = 128) -> Material:
    """What a model is shown: windows of text, or images.

    Args:
        subject: the model.
        data: as `shunter.data.documents.read_domains` takes it, or image files and folders for a model of images; None
            takes the built-in text.
        tokens: how many.
        length: of a window of text.

    Raises:
        UserError: where there are no data for it, or they cannot be read, and for fewer than 2 tokens.
    """
    for name, value in (("tokens", tokens), ("length", length)):
        if value < 2:
            raise UserError(f"{name} {value} must be at least 2, a token and the one that follows it")
    if subject.model.main_input_name == "pixel_values":
        if data is None:
            raise UserError("this model sees images, and is of no run; give --data with a folder of images")
        return image_material(subject.model, subject.folder, data, tokens=tokens)
    if subject.model.main_input_name == "input_features":
        raise UserError(f"{subject.name} hears sounds: give the folder of its run, without --data")
    domains = built_in_domains() if data is None else read_domains(data)
    return text_material(subject.model, subject.tokenizer(), domains, tokens=tokens, length=length)


def load(
    path: str, *, experts: bool = True, by: Callable[..., PreTrainedModel] = load_folder, **options: Any
) -> Inspected:
    """Load a model of Hugging Face or of Shunter, or of a run of `shunter train`, whose sparse model it takes.

    Weights are read from safetensors alone, and no code of the folder is run.

    Args:
        path: a folder, or a name on the Hugging Face Hub.
        experts: refuse a model without any.
        by: what reads the folder; a recipe’s own `load` knows models that transformers does not.
        **options: of `by`.

    Raises:
        UserError: where there is no such model, or it cannot be loaded whole.
    """
    try:
        folder = local_folder(path)
    except ValueError as error:
        raise UserError(str(error)) from None
    if not folder.is_dir():
        raise UserError(f"{path}: no such folder; give the folder of a model, with its config.json")
    if not (folder / "config.json").is_file():
        raise UserError(f"{path}: holds no config.json; give the folder that save_pretrained wrote")
    hf_logging.disable_progress_bar()
    try:
        model = by(folder, **options)
    except ValueError as error:
        raise UserError(str(error)) from None
    plain_experts(model)
    if experts and not taps(model):
        name = type(model).__name__
        raise UserError(f"{path}: {name} has no mixture-of-experts layer: there is no expert to look at")
    if "device_map" not in options:
        model.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
    return Inspected(Path(path).resolve().name, model, folder)


def inspect(
    subject: Inspected,
    material: Material,
    *,
    earlier: Inspected | None = None,
    ablations: int = 256,
    quiet: bool = False,
) -> dict[str, Any]:
    """Measure what the experts of a model do.

    Args:
        subject: the model.
        material: what it is shown.
        earlier: another checkpoint of it, to compare with: before fine-tuning, or earlier in training.
        ablations: how many experts to remove in turn at most, the busiest of each layer first; 0 for none.
        quiet: show no progress.

    Returns:
        What JSON can hold, the same for the same input. Ctrl-C ends the work early: "complete" is then False, and what
        was not measured is None.

    Raises:
        UserError: where the two models do not have the same layers.
        KeyboardInterrupt: where Ctrl-C comes before anything is measured.
    """
    show = _Progress(quiet)
    subjects = [subject] if earlier is None else [earlier, subject]
    findings: dict[str, Any] = {
        "complete": True,
        "notices": list(material.notices),
        "data": describe_data(material),
        "models": [],
        "comparison": None,
    }
    recordings: list[Recording] = []
    try:
        for one in subjects:
            recording = record(one.model, material, show.steps)
            if recording.batches < len(material.batches):
                _stopped(findings, f"{recording.batches} of {len(material.batches)} batches were seen")
                material = material.first(recording.batches)  # for the second checkpoint, too
            recordings.append(recording)
            findings["models"].append(_describe_model(one, recording))
        if earlier is not None:
            findings["comparison"] = _compare(earlier, subject, recordings)
        for recording, found in zip(recordings, findings["models"], strict=True):
            for name in show.steps(list(recording.layers), "what experts serve", len(recording.layers)):
                stream = material.stream(name, len(recording.layers[name].index), recording.batches)
                found["layers"][name] |= specialisation_of(recording.layers[name], stream, material)
        for one, found in zip(subjects, findings["models"], strict=True):
            for name, tap in show.steps(taps(one.model).items(), "experts' weights", len(found["layers"])):
                found["layers"][name]["similarity"] = describe_weights(
                    tap.layer, tap.num_experts, one.model.config.get_text_config()
                )
        if findings["complete"] and ablations:
            _ablate_all(subject, material, findings, ablations, show)
    except KeyboardInterrupt:
        if not findings["models"]:
            raise
        _stopped(findings, "what had not been measured by then is missing")
    return _finite(findings)


def specialisation(model: PreTrainedModel, material: Material) -> dict[str, Any]:
    """Measure which domains, and of text which tokens, the experts of a model serve.

    Args:
        model: it is run in evaluation mode, its own mode restored.
        material: of one stream.

    Returns:
        What specialisation.json of a run holds: {"domains": names, "layers": {layer: {"load": (E,) shares of all
        assignments, "domains": {name: (E,) shares of that domain's assignments}, "tokens": `tokens_served`}}}, the
        latter a list without anything for each expert where there are no tokens of text.

    Raises:
        ValueError: where the model has no layer whose routing can be read.
        KeyboardInterrupt: where Ctrl-C comes before it is done.
    """
    recording = record(model, material, lambda batches, what, total: batches)
    if recording.batches < len(material.batches):
        raise KeyboardInterrupt
    layers = {}
    for name, layer in recording.layers.items():
        stream = material.stream(name, len(layer.index), recording.batches)
        if stream is None:  # it is sent something else than tokens
            continue
        counts = label_counts(layer.index, stream.labels["domain"], layer.num_experts, len(material.domains))
        text = "token" in stream.labels
        layers[name] = {
            "load": (counts.sum(0) / counts.sum().clamp_min(1)).tolist(),
            "domains": dict(zip(material.domains, label_shares(counts).tolist(), strict=True)),
            "tokens": tokens_served(layer, stream) if text else [[] for _ in range(layer.num_experts)],
        }
    return {"domains": material.domains, "layers": layers}


class _Progress:
    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet

    def steps(self, items: Iterable[T], what: str, total: int) -> Iterator[T]:
        yield from tqdm(items, desc=what, total=total, leave=False, disable=self.quiet)


def _stopped(findings: dict[str, Any], how_far: str) -> None:
    findings["complete"] = False
    findings["notices"].append(f"Stopped early: {how_far}.")


def _describe_model(subject: Inspected, recording: Recording) -> dict[str, Any]:
    loss, own = recording.loss, moe_layers(subject.model)
    routers = {name: _named(layer.decider.innermost.kind) for name, layer in own.items()}
    return {
        "name": subject.name,
        "architecture": type(subject.model).__name__,
        "parameters": sum(p.numel() for p in subject.model.parameters()),
        "loss": None if loss is None else loss.mean,
        "targets": 0 if loss is None else loss.targets,
        "domain_loss": {} if loss is None else {d: nats / count for d, (nats, count) in loss.domains.items()},
        "ablated_targets": None,
        "layers": {
            name: {"router": routers.get(name)} | describe_usage(layer) for name, layer in recording.layers.items()
        },
    }


def _named(router: type) -> str:
    """The registered name of a router's class, or the class's own."""
    try:
        return router_name(router)
    except UserError:
        return router.__name__


def _compare(earlier: Inspected, subject: Inspected, recordings: list[Recording]) -> dict[str, Any]:
    before, after = recordings
    if {n: d.num_experts for n, d in before.layers.items()} != {n: d.num_experts for n, d in after.layers.items()}:
        raise UserError(
            f"{earlier.folder} and {subject.folder} do not have the same layers of experts; "
            "give two checkpoints of one model"
        )
    tapped = [taps(side.model) for side in (earlier, subject)]
    layers = {}
    for name, now in after.layers.items():
        old, tokens = before.layers[name], min(len(before.layers[name].index), len(now.index))
        had, has = old.index[:tokens], now.index[:tokens]
        sides = [expert_parameters(side[name].layer, side[name].num_experts) for side in tapped]
        counts = [expert_load(one, now.num_experts) for one in (had, has)]
        share = [count / count.sum().clamp_min(1) for count in counts]
        change = [moved(a, b) for a, b in zip(*sides, strict=True)]
        layers[name] = {
            "saturation": saturation(had, has),
            "chance": chance_saturation(had, has, now.num_experts),
            "load_moved": float((share[0] - share[1]).abs().sum()) / 2,
            "weights_moved": [None if math.isnan(value) else value for value in change],
        }
    return {"before": earlier.name, "after": subject.name, "layers": layers}


def _ablate_all(subject: Inspected, material: Material, findings: dict[str, Any], most: int, show: _Progress) -> None:
    model, found = subject.model, findings["models"][-1]
    if found["loss"] is None:
        findings["notices"].append("No loss can be taken from this model and these data, so no expert was removed.")
        return
    batches, tokens = [], 0
    for batch in material.batches:
        if tokens < ABLATION_TOKENS:
            batches.append(batch)
            tokens += batch.targets.numel() * (1 if material.images is None else material.window)
    whole = [loss for batch in batches if (loss := batch_losses(model, batch)) is not None]
    found["ablated_targets"] = sum(int((~loss.isnan()).sum()) for loss in whole)
    ranked = []
    for name, tap in taps(model).items():
        load = found["layers"][name]["load"]
        parameters = expert_parameters(tap.layer, tap.num_experts)
        if not parameters[0]:
            findings["notices"].append(f"The experts of {name} are kept in a way that is not known: none was removed.")
            continue
        found["layers"][name]["ablation"] = [None] * len(load)
        order = sorted((e for e in range(len(parameters)) if load[e] > 0), key=lambda e: -load[e])
        ranked += [(rank, name, e, parameters[e]) for rank, e in enumerate(order)]
    queue = sorted(ranked, key=lambda item: item[0])  # the busiest of every layer, then the next
    if len(queue) > most:
        findings["notices"].append(
            f"The {most} busiest of {len(queue)} experts were removed in turn; --ablate {len(queue)} removes all."
        )
    for _, name, expert, weights in show.steps(queue[:most], "removing experts", min(most, len(queue))):
        found["layers"][name]["ablation"][expert] = asdict(ablate(model, weights, batches, whole))


def _finite(value: Any) -> Any:
    """The same with None for every number that is not finite, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
