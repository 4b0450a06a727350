"""A sparse teacher and data in, a smaller student out: dense, of fewer layers, or pruned; and what of the gain is kept.

The student begins with the teacher's own weights where both have them, and learns from the labels and from the
teacher's probabilities. A twin that learns from the labels alone says what the teacher was good for.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..analysis.inspect.inspecting import Inspected, load, material_for
from ..analysis.inspect.material import Batch, Material
from ..analysis.inspect.recording import batch_logits, batch_losses
from ..durable import check_new_folder, new_folder
from ..environment import VERSION, machine, run_versions
from ..errors import Diverged, UserError
from ..hf.checkpoints.folders import model_class
from ..hf.checkpoints.formats import made_here, sparse_class
from ..hf.checkpoints.loading import load_folder
from ..hf.checkpoints.native import FAMILIES
from ..hf.checkpoints.writing import copy_companions
from ..hf.config_file import forget_layers
from ..hf.observe.taps import taps
from ..moe import aux_loss, moe_layers, update_routers
from .balance import Balance
from .roles import roles

__all__ = ["LEARNING_RATE", "STEPS", "describe", "distill", "distillation_loss", "gain_kept", "student_of"]

STEPS, LEARNING_RATE = 300, 1e-3  # unless a run says how long and at which rate its dense model learned


def distill(
    teacher: str | Path,
    out: str | Path,
    *,
    student: str | Path | None = None,
    layers: int | None = None,
    data: Sequence[str] | None = None,
    material: Material | None = None,
    held_out: Sequence[Batch] | None = None,
    steps: int = STEPS,
    learning_rate: float = LEARNING_RATE,
    soft: float = 0.25,
    stop: float = 1.0,
    baseline: str | Path | None = None,
    tokens: int = 500_000,
    length: int = 128,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Train a smaller model on data and on what a sparse teacher makes of them, and write it as a folder.

    Args:
        teacher: the folder of a sparse model of transformers or of Shunter, or of a run of `shunter train`.
        out: the folder to make; it appears when it is whole.
        student: the folder of a model that is to learn, such as a pruned one, in at least float32, to be saved in its
            own dtype; None makes a dense one, whose weights are
            the teacher's but for the feed-forward blocks, which are drawn and as wide as the experts of a token
            are together.
        layers: make a student of the teacher's kind with so many of its layers instead, in equal steps.
        data: as `shunter.data.documents.read_domains` takes it, or images; None takes the built-in text. A tenth
            of it is held out.
        material: batches in place of data.
        held_out: batches to measure the losses on; None takes every tenth of the material, which is then not learned.
        steps: of the optimizer.
        learning_rate: of AdamW, after a warm-up over a twentieth of the steps, and falling to 0 with a cosine.
        soft: the weight of the teacher's probabilities in the loss; the labels have the rest. 0 shows what the
            teacher's weights alone are good for (the last row of table 6).
        stop: after which share of the steps the labels alone teach (staged distillation).
        baseline: the folder of the model that the gain is counted from, which learned for as many steps; None trains
            one: the student's twin, from drawn weights (those of a given student), on the same batches and the labels
            alone.
        tokens: how many of the data at most.
        length: of a window of text.
        seed: of the drawn weights and the order of the batches.
        say: what is told of the progress, a line at a time.

    Returns:
        What receipt.json in the new folder holds: the held-out losses of teacher, baseline and student, the share of
        the gain kept, which weights were copied.

    Raises:
        UserError: for a student or baseline of another vocabulary or tokenizer, a teacher without a dense counterpart,
            impossible numbers.
        Diverged: where a loss is not finite.
        NotWritten: where `out` cannot be made, before the training begins, or the disk is full.

    Source: Fedus et al. 2021 (Switch), section 4.2 and tables 6 and 7, which count the gain from the dense model of the
    student's shape that was trained from scratch (T5-Base); Rajbhandari et al. 2022 (DeepSpeed-MoE), section 4.2, for
    fewer layers and stopping early.
    """
    for name, value, low, high in (("soft", soft, 0, 1), ("stop", stop, 0, 1)):
        if not low <= value <= high:
            raise UserError(f"distill: {name}={value} must be from {low} to {high}")
    if steps < 1 or not (math.isfinite(learning_rate) and learning_rate > 0):
        raise UserError(f"distill: steps={steps} and learning_rate={learning_rate} must be above 0")
    if student is not None and layers is not None:
        raise UserError("distill: a student and layers both say what is to learn; give one")
    subject = load(str(teacher))
    check_new_folder(Path(out))
    material = material or material_for(subject, data, tokens, length)
    held, shown = held_out, material.batches
    if held is None:
        held, shown = material.batches[::10], [b for i, b in enumerate(material.batches) if i % 10]
    if not held or not shown:
        raise UserError("distill: the data are too few to hold a tenth out; give more")
    torch.manual_seed(seed)
    copied: list[str] = []
    if student is not None:
        learner: Any = load_folder(Path(student))
        subject.must_share_words(learner, Path(student))
        twin = copy.deepcopy(learner)
    else:
        learner = student_of(subject, layers)
        twin = copy.deepcopy(learner)
        copied = _copy_weights(subject.model, learner, layers)
    device = next(subject.model.parameters()).device
    kept = {name: tensor.dtype for name, tensor in learner.state_dict().items()}
    wide = torch.promote_types(learner.dtype, torch.float32)  # in half precision small steps would round to none
    learner, twin = learner.to(device, wide), twin.to(device, wide)
    losses = {"teacher": _loss(subject.model, held), "student_before": _loss(learner, held)}
    options: dict[str, Any] = {"steps": steps, "learning_rate": learning_rate, "seed": seed}
    if baseline is None:
        say("baseline: learns from the labels alone")
        _train(twin, None, shown, soft=0.0, stop=0.0, say=say, **options)
    else:
        twin = load_folder(Path(baseline)).to(device)  # type: ignore[arg-type]
        subject.must_share_words(twin, Path(baseline))
    losses["baseline"] = _loss(twin, held)
    del twin
    say("student: learns from the labels and the teacher")
    _train(learner, subject.model, shown, soft=soft, stop=stop, say=say, **options)
    for name, tensor in learner.state_dict(keep_vars=True).items():
        tensor.data = tensor.data.to(kept[name])
    losses["student"] = _loss(learner, held)
    receipt = {
        "made_by": f"shunter {VERSION} distill",
        "teacher": subject.name,
        "student": type(learner).__name__,
        "parameters": {
            "teacher": sum(p.numel() for p in subject.model.parameters()),
            "student": sum(p.numel() for p in learner.parameters()),
        },
        "options": options | {"soft": soft, "stop": stop, "layers": layers, "baseline": baseline and str(baseline)},
        "losses": losses,
        "gain_kept": gain_kept(losses["baseline"], losses["teacher"], losses["student"]),
        "copied": copied,
        "machine": machine(),
        "versions": run_versions(),
    }
    with new_folder(Path(out)) as folder:
        learner.save_pretrained(folder)
        copy_companions(subject.folder, folder)
        (folder / "receipt.json").write_text(json.dumps(receipt, indent=1) + "\n", encoding="utf-8")
    return receipt


def describe(receipt: dict[str, Any]) -> str:
    """A receipt of `distill` in words."""
    losses, sizes, kept, options = (receipt[name] for name in ("losses", "parameters", "gain_kept", "options"))
    share = "the teacher has no gain over the baseline" if kept is None else f"{kept:.0%} of the teacher's gain is kept"
    twin = options["baseline"] or f"the student's twin after {options['steps']} steps without a teacher"
    return "\n".join(
        [
            f"{receipt['student']} with {sizes['student']:,} parameters; the teacher has {sizes['teacher']:,}.",
            f"Held-out loss: teacher {losses['teacher']:.4f}, baseline ({twin}) {losses['baseline']:.4f}, student "
            f"after {options['steps']} steps {losses['student']:.4f} (before: "
            f"{losses['student_before']:.4f}); {share}.",
        ]
    )


def gain_kept(baseline: float, teacher: float, student: float) -> float | None:
    """Which share of what a teacher is better than a baseline by a student is: of losses, or of any other measure.

    None where the teacher is no better (its loss is not lower).

    >>> round(gain_kept(1.636, 1.505, 1.587), 2)
    0.37
    """
    return None if not teacher < baseline else (baseline - student) / (baseline - teacher)


def distillation_loss(logits: Tensor, targets: Tensor, teacher: Tensor | None, soft: float) -> Tensor:
    """Mean over the targets of (1 - soft) cross-entropy of the label + soft cross-entropy of the teacher, in nats.

    Args:
        logits: (…, V) of the student.
        targets: (…) the labels; -100 where there is none, and nothing is learned.
        teacher: (…, V) logits of the teacher; None for the labels alone.
        soft: the weight of the teacher.

    Source: Fedus et al. 2021 (Switch), section 4.2: 0.75 and 0.25.
    """
    real = targets != -100
    rows, labels = logits[real].float(), targets[real]
    hard = F.cross_entropy(rows, labels)
    if teacher is None or not soft:
        return hard
    return (1 - soft) * hard + soft * F.cross_entropy(rows, teacher[real].float().softmax(-1))


def student_of(subject: Inspected, layers: int | None = None) -> PreTrainedModel:
    """A model to learn from a sparse teacher, its weights drawn: dense, or with fewer layers.

    Raises:
        UserError: where there is none.
    """
    teacher: Any = subject.model
    config = copy.deepcopy(teacher.config)
    if layers is None:
        config = _dense_config(config, subject)
        kind = model_class(config, str(subject.folder))
    else:
        _take_layers(config, layers)
        kind = sparse_class(config, str(subject.folder)) if made_here(config) else type(teacher)
    config.dtype = torch.float32
    model: Any = kind(config)
    if layers is None and taps(model):
        raise UserError(
            f"distill: {type(model).__name__} has experts in every layer; there is no dense {config.model_type}"
        )
    return model.float()


def _dense_config(config: PreTrainedConfig, subject: Inspected) -> PreTrainedConfig:
    """The configuration of the dense model with the teacher's attention, as wide as the experts of a token together."""
    if made_here(config):
        forget_layers(config)
        return config
    family = FAMILIES.get(config.model_type)
    if family is None or family.sparse_only:
        known = ", ".join(name for name, each in FAMILIES.items() if not each.sparse_only)
        raise UserError(
            f"distill: no dense model of transformers is known to have the attention and norms of {config.model_type}; "
            f"there is one for {known} and models of Shunter. Give layers= or a student"
        )
    width = getattr(config, family.width_field) * config.num_experts_per_tok
    if family.shared_field:
        width += getattr(config, family.width_field) * getattr(config, family.shared_field)
    dense = family.dense_config(config)
    dense.intermediate_size = width
    dense.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[dense.model_type]]
    return dense


_NUMBERS_OF_LAYERS = ("mlp_only_layers", "moe_layers")
_DENSE_BEFORE = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
"""What configurations call lists of the numbers of layers, and the number of the first layer with experts."""


def _kept_layers(total: int, layers: int) -> list[int]:
    """So many of the numbers below a total, in equal steps, the last among them."""
    return [math.ceil((i + 1) * total / layers) - 1 for i in range(layers)]


def _take_layers(config: Any, layers: int) -> None:
    total = getattr(config, "num_hidden_layers", 0)
    if not 1 <= layers < total or getattr(config, "is_encoder_decoder", False):
        raise UserError(f"distill: layers={layers} must be from 1 to {total - 1}, of a model with one stack of layers")
    kept = _kept_layers(total, layers)
    for name, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == total and "layer" in name and name not in _NUMBERS_OF_LAYERS:
            setattr(config, name, [value[i] for i in kept])
    for name in _NUMBERS_OF_LAYERS:
        if getattr(config, name, None):
            setattr(config, name, [new for new, old in enumerate(kept) if old in getattr(config, name)])
    for name in _DENSE_BEFORE:
        if isinstance(first := getattr(config, name, None), int):
            setattr(config, name, sum(old < first for old in kept))
    config.num_hidden_layers = layers
    if made_here(config):
        for part in {"layers", "attention"} & config.shunter.keys():
            entries = []
            for entry in config.shunter[part]:
                number = int(re.findall(r"\b\d+\b", entry["name"])[0])
                if number in kept:
                    renamed = re.sub(r"\b\d+\b", str(kept.index(number)), entry["name"], count=1)
                    entries.append({**entry, "name": renamed})
            config.shunter[part] = entries


@torch.no_grad()
def _copy_weights(teacher: PreTrainedModel, student: PreTrainedModel, layers: int | None) -> list[str]:
    """Give a student the teacher's weights of the same name; returns the names.

    Raises:
        UserError: where other weights than those of dense feed-forward blocks would stay drawn; of fewer layers, any.
    """
    theirs, of = teacher.state_dict(), roles(student)
    kept = None if layers is None else _kept_layers(teacher.config.num_hidden_layers, layers)
    copied = []
    for name, tensor in student.state_dict().items():
        old = name
        if kept is not None:
            old = re.sub(r"(?<=\.)\d+(?=\.)", lambda match: str(kept[int(match[0])]), name, count=1)
        if old in theirs and theirs[old].shape == tensor.shape:
            tensor.copy_(theirs[old])
            copied.append(name)
        elif kept is not None:
            raise UserError(
                f"distill: with {layers} layers {name} of the student would be another than {old} of the teacher, "
                "whose layers are of several kinds; try another number of layers"
            )
        elif of.get(name) not in (None, "feed_forward"):
            raise UserError(
                f"distill: the teacher has no weights for {name} of the student; they are of different kinds"
            )
    return copied


def _train(
    model: Any,
    teacher: Any,
    batches: list[Batch],
    *,
    steps: int,
    learning_rate: float,
    soft: float,
    stop: float,
    seed: int,
    say: Callable[[str], None],
) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * min(1, step / steps)))
    )
    own = bool(moe_layers(model))
    balance = Balance().attach(model) if not own and taps(model) else None
    model.train()
    for step, batch in enumerate(_order(batches, steps, seed)):
        told = None
        if teacher is not None and step < stop * steps:
            with torch.no_grad():
                told = batch_logits(teacher, batch)
        logits = batch_logits(model, batch)
        assert logits is not None  # or the losses before had not been found
        loss = distillation_loss(logits, batch.targets.flatten().to(logits.device), told, soft)
        extra = aux_loss(model) if own else balance.loss() if balance is not None else 0.0
        total = loss + extra
        if not bool(total.isfinite()):
            raise Diverged(f"distill: the loss of step {step + 1} is not finite; try a lower learning rate", since=step)
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if own:
            update_routers(model)
        if balance is not None:
            balance.step()
        if (step + 1) % max(1, steps // 10) == 0:
            say(f"step {step + 1} of {steps}: loss {float(loss.detach()):.4f}")
    if balance is not None:
        balance.detach()
    model.eval()


def _order(batches: list[Batch], steps: int, seed: int) -> Iterator[Batch]:
    """Each batch once in a drawn order, again and again, for so many steps."""
    generator = torch.Generator().manual_seed(seed)
    done = 0
    while done < steps:
        for number in torch.randperm(len(batches), generator=generator).tolist()[: steps - done]:
            yield batches[number]
            done += 1


def _loss(model: Any, batches: Sequence[Batch]) -> float:
    """The mean cross-entropy in nats over the targets of some batches."""
    model.eval()
    parts = [batch_losses(model, batch) for batch in batches]
    found = [part for part in parts if part is not None]
    if not found:
        raise UserError(f"distill: {type(model).__name__} has no logits for the data's targets")
    nats = torch.cat(found).double()
    return float(nats[~nats.isnan()].mean())
