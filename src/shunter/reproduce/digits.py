"""Section 5.2 on handwritten digits: tasks that come in turn, modules chosen for each image, experts to transfer."""

from __future__ import annotations

import copy
import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.images import pixels_of
from ..data.labelled_images import built_in_images, split
from ..layers.expert_gate import ExpertGate, Way, forgetting_loss
from ..layers.modular_network import ModularLayer, ModularNetwork, ViterbiEM
from ..layers.transfer import choose_expert
from .results import Result, Row, judge

__all__ = ["expert_gate", "modular", "transfer"]

SIDE, BATCH, RATE = 14, 64, 1e-3
PAIRS = tuple((2 * i, 2 * i + 1) for i in range(5))


def _digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pixels (N, 196) and digits (N,) to train on, and those that are held out."""
    images = built_in_images()
    parts = split(images, share=0.2, most=10_000, most_held_out=10_000)
    found: list[Tensor] = []
    for rows in (parts.train, parts.held_out):
        found.append(torch.stack([pixels_of(images.open(i), SIDE, 1).flatten() for i in rows]))
        found.append(torch.tensor([int(images.labels[i]) for i in rows]))
    x, y, held_x, held_y = found
    return x, y, held_x, held_y


def _network(hidden: int = 64, classes: int = 10) -> nn.Sequential:
    return nn.Sequential(nn.Linear(SIDE**2, hidden), nn.ReLU(), nn.Linear(hidden, classes))


def _train(network: nn.Module, x: Tensor, y: Tensor, steps: int = 300, before: nn.Module | None = None) -> None:
    """Train on images, with what another network said of them to be kept, where there is one."""
    optimizer = torch.optim.Adam(network.parameters(), RATE)
    for _ in range(steps):
        rows = torch.randint(len(x), (BATCH,))
        logits = network(x[rows])
        loss = F.cross_entropy(logits, y[rows])
        if before is not None:
            with torch.no_grad():
                said = before(x[rows])
            loss = loss + forgetting_loss(logits, said)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def _learn(x: Tensor, y: Tensor, expert: nn.Module, way: Way, parent: nn.Module | None) -> None:
    _train(expert, x, y, before=parent if way == "without_forgetting" else None)


@torch.no_grad()
def _accuracy(logits: Tensor, y: Tensor) -> float:
    return float((logits.argmax(-1) == y).double().mean())


def expert_gate() -> Result:
    """Five tasks of two digits in turn: a gate of autoencoders with an expert each, and one network for all."""
    torch.manual_seed(0)
    x, y, held_x, held_y = _digits()
    gate, alone, together = ExpertGate(SIDE**2, code=32), _network(), _network()
    ways = []
    for pair in PAIRS:
        rows = torch.isin(y, torch.tensor(pair))
        images, labels = x[rows], y[rows]

        ways.append(gate.learn(images, make=_network, train=partial(_learn, images, labels)))
        _train(alone, images, labels)
    _train(together, x, y, steps=300 * len(PAIRS))
    with torch.no_grad():
        task = gate.probs(held_x).argmax(-1)
        own = held_y // 2
        right = float((task == own).double().mean())
        found = {
            "gate": _accuracy(gate(held_x), held_y),
            "one network in turn": _accuracy(alone(held_x), held_y),
            "one network, all at once": _accuracy(together(held_x), held_y),
        }
        related = [[float(v) for v in gate.errors(held_x[own == i]).mean(0)] for i in range(len(PAIRS))]
    rows_ = [
        Row(
            "the autoencoders say whose task an image is",
            "the gate picks the right expert",
            f"for {right:.1%} of held-out images; chance is {1 / len(PAIRS):.0%}",
            judge(right > 0.9, direction=right > 2 / len(PAIRS)),
        ),
        Row(
            "tasks in turn are kept, where one network forgets them",
            "no task is forgotten",
            f"{found['gate']:.1%} right over all ten digits, and {found['one network in turn']:.1%} by one network "
            "that learned the tasks in turn",
            judge(found["gate"] > 0.8, direction=found["gate"] > found["one network in turn"] + 0.1),
        ),
        Row(
            "nearly as good as learning all at once",
            "close to joint training",
            f"{found['gate']:.1%}, and {found['one network, all at once']:.1%} by one network on all at once",
            judge(found["gate"] > found["one network, all at once"] - 0.1, direction=found["gate"] > 0.5),
        ),
    ]
    notes = [
        "4,000 handwritten digits of 14 by 14 pixels in five tasks of two digits, 1,000 held out. Experts began: "
        + "; ".join(
            f"{a} and {b}: {way.replace('_', ' ')}"
            + ("" if parent is None else f" from {PAIRS[parent][0]} and {PAIRS[parent][1]}")
            for (a, b), (way, parent) in zip(PAIRS, ways, strict=True)
        )
        + "."
    ]
    return Result("expert-gate", rows_, {"accuracy": found, "gate": right, "errors": related}, notes=notes)


def modular(epochs: int = 20) -> Result:
    """Modules chosen by EM for each digit, against one network of the same computing and a choice by a fixed rule."""
    x, y, held_x, held_y = _digits()
    modules, width = 6, 8
    found: dict[str, float] = {}
    entropies: list[float] = []
    for name, count in (("one module", 1), ("modules by EM", modules)):
        torch.manual_seed(0)
        network = ModularNetwork([ModularLayer([_network(width) for _ in range(count)], nn.Linear(SIDE**2, count))])
        em = ViterbiEM(network, lambda out, y: -F.cross_entropy(out, y, reduction="none"), len(x))
        optimizer = torch.optim.Adam(network.parameters(), RATE)
        for _ in range(epochs):
            em.e_step(torch.arange(len(x)), x, y, samples=10)
            for rows in torch.randperm(len(x)).split(BATCH):
                optimizer.zero_grad()
                em.loss(rows, x[rows], y[rows]).backward()
                optimizer.step()
        with torch.no_grad():
            found[name] = _accuracy(network(held_x).output, held_y)
            if count > 1:
                entropies = [float(v) for v in network.entropies(held_x)[0]]
                chosen = network(held_x).choices[:, 0, 0]
                table = torch.stack([torch.bincount(chosen[held_y == d], minlength=count) for d in range(10)])
    joint = table.double() / table.sum()
    shares = joint.sum(0, keepdim=True) * joint.sum(1, keepdim=True)
    information = float(torch.xlogy(joint, joint / shares.clamp_min(1e-12)).sum())
    rows_ = [
        Row(
            "all modules stay in use without a loss that balances them",
            "no module collapses",
            f"entropy {entropies[0]:.2f} nats over the images, {math.log(modules):.2f} at most; of an image "
            f"{entropies[1]:.2f}",
            judge(entropies[0] > 0.8 * math.log(modules), direction=entropies[0] > 0.5 * math.log(modules)),
        ),
        Row(
            "modules go by what is in the image",
            "they specialise",
            f"{information:.2f} nats of information between the module and the digit, which nobody told",
            judge(information > 0.5, direction=information > 0.1),
        ),
        Row(
            "modules are better than one at the same computing of an image",
            "they are",
            f"{found['modules by EM']:.1%} of held-out digits right, and {found['one module']:.1%} by one",
            judge(found["modules by EM"] > found["one module"] + 0.005, found["modules by EM"] > found["one module"]),
        ),
    ]
    notes = [
        f"{modules} networks of width {width}, one chosen for each image; {epochs} epochs of 4,000 digits, an E-step "
        "of all of them before each."
    ]
    return Result("modular-networks", rows_, {"accuracy": found, "modules of digits": table.tolist()}, notes=notes)


def transfer(tasks: int = 12, shots: int = 20) -> Result:
    """Experts on slices of the digits; which one to fine-tune on a new task, by the proxy and by trying them all."""
    x, y, held_x, held_y = _digits()
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    experts: dict[str, nn.Sequential] = {}
    slices = {"curved": (0, 3, 6, 8), "straight": (1, 4, 7), "others": (2, 5, 9), "even": (0, 2, 4, 6, 8)}
    for name, own in slices.items():
        rows = torch.isin(y, torch.tensor(own))
        experts[name] = _network(24)
        _train(experts[name], x[rows], y[rows], steps=400)
    gained, regrets, picks = [], [], []
    for _ in range(tasks):
        classes = torch.randperm(10, generator=generator)[:4]
        shuffled = torch.randperm(len(y), generator=generator)
        few = torch.cat([shuffled[y[shuffled] == c][:shots] for c in classes])
        labels = (y[few][:, None] == classes).int().argmax(1)
        inside = torch.isin(held_y, classes)
        targets = (held_y[inside][:, None] == classes).int().argmax(1)
        after = {}
        for name, expert in experts.items():
            tuned = copy.deepcopy(expert)
            tuned[2] = nn.Linear(24, 4)
            _train(tuned, x[few], labels, steps=60)
            after[name] = _accuracy(tuned(held_x[inside]), targets)
        ranking = choose_expert({n: e[:2] for n, e in experts.items()}, x[few], labels, neighbours=1)
        pick = next(iter(ranking))
        mean, best = sum(after.values()) / len(after), max(after.values())
        gained.append(after[pick] - mean)
        regrets.append(best - after[pick])
        picks.append({"picked": pick, "proxy": ranking, "after": after})
    gain, regret = sum(gained) / tasks, sum(regrets) / tasks
    hits = sum(r == 0 for r in regrets)
    rows_ = [
        Row(
            "the expert that the proxy picks is better than a random one, after fine-tuning",
            "it is (Puigcerver et al. 2020)",
            f"{gain:+.1%} accuracy over the mean expert, in the mean of {tasks} tasks",
            judge(gain > 0.01, direction=gain > 0),
        ),
        Row(
            "and close to the best, found by fine-tuning all",
            "close, at a fraction of the cost",
            f"{regret:.1%} below it; it is the best in {hits} of {tasks} tasks",
            judge(regret < 0.02, direction=gain > 0),
        ),
    ]
    notes = [
        f"Four experts, trained on slices of the digits; a task is four random digits with {shots} examples each, "
        "of which the rest of the network and a new last layer are fine-tuned for 60 steps."
    ]
    return Result("expert-transfer", rows_, {"tasks": picks}, notes=notes)
