"""Branch-Train-Merge: a seed model branches to one for each domain, each is trained alone, and all are merged again.

A forest is a folder: `seed`, the model; `branches`, a run folder for each domain, which needs the seed and none of the
others; `together`, if it is wanted, a run on all domains, as long as all branches are.

Source: Li et al. 2022 (Branch-Train-Merge: Embarrassingly Parallel Training of Expert Language Models).
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, set_seed

from ..analysis.pages.forest_figures import losses_by_domain
from ..analysis.pages.style import PAPER, style
from ..analysis.runs import TEXT
from ..data.documents import built_in_domains, read_domains
from ..data.windows import TextData
from ..durable import MANIFEST, aside, check_new_folder, naming, new_folder, seal, verify
from ..environment import run_versions
from ..errors import UserError
from ..hf.checkpoints.folders import load_tokenizer
from ..hf.checkpoints.loading import load_folder
from ..hf.checkpoints.reading import read_json
from ..layers.domain_mixture import DomainMixture
from ..moe import moe_layers
from . import mixing, run
from .config import dump_config, load_config
from .text import EVAL_BATCH, RECIPE, TextConfig, TextRecipe, check_sampling, continued, encode

__all__ = [
    "Forest",
    "average",
    "branch",
    "evaluate_forest",
    "generate",
    "is_branch",
    "is_forest",
    "is_merged",
    "merge",
    "posterior_weights",
    "read_forest",
    "train_branch",
]

SEED, BRANCHES, TOGETHER, START = "seed", "branches", "together", "start"
_FACTS, _MERGED, _EXPERTS = run.BRANCH, "merged.json", "experts"
_MODEL = "branch"
"""What the metrics and the folder of a branch call its model."""
_LABELS = ("domain", "language", "task", "modality")


def is_forest(folder: Path) -> bool:
    """Whether a folder is one that `branch` made."""
    return (folder / SEED / "config.json").is_file() and (folder / BRANCHES).is_dir()


def is_branch(folder: Path) -> bool:
    """Whether a folder is a run of one model that branches from a seed."""
    return (folder / _FACTS).is_file()


def is_merged(folder: Path) -> bool:
    """Whether a folder is one that `merge` made."""
    return (folder / _MERGED).is_file()


class _BranchRecipe(TextRecipe):
    """Text in the tokens of a seed, whose training begins with the weights of a model that there is.

    Args:
        start: the folder of that model and its tokenizer.
    """

    def __init__(self, start: Path) -> None:
        self.start = start

    def prepare(self, config: TextConfig) -> TextData:
        """Windows of the configuration's domains."""
        return self.windows(config, load_tokenizer(self.start))

    def model(self, config: TextConfig, data: TextData, name: str) -> PreTrainedModel:
        """The model to begin with."""
        return self.load(self.start)


def branch(
    source: Path,
    out: Path | None = None,
    *,
    which: str = "dense",
    domains: Sequence[str] | None = None,
    data: Sequence[str] | None = None,
    start: str = "seed",
    together: bool = False,
    overrides: Sequence[str] = (),
) -> list[Path]:
    """Make a forest from a run of text, or add domains to one; every branch is then a run that waits to be trained.

    Args:
        source: a finished run, whose model is the seed; or a forest.
        out: the forest's new folder; None for a forest that is there.
        which: the seed, of a run: "dense" or "sparse".
        domains: of the text; None takes all, of a forest all that it has not.
        data: text as `read_domains` takes it; None takes the run's own.
        start: with what weights the branches begin: "seed"; "posterior", the average of the trained branches by how
            well each explains held-out text of the new domain.
        together: also make a run on all domains, as long as all branches are: what the same training does to one model.
        overrides: `training.key=value`, in which the branches differ from the run.

    Returns:
        The folders of the new branches, in the order of their domains.

    Raises:
        UserError: for a run of another recipe or without that model, a model that cannot be a seed, an unknown domain
            or one that the forest has, other overrides, and where `out` exists.
    """
    if wrong := [text for text in overrides if not text.lstrip("-").startswith("training.")]:
        raise UserError(
            f"a branch differs from its seed in its training alone, as training.steps=500; got {wrong[0]!r}"
        )
    if start not in ("seed", "posterior"):
        raise UserError(f"--start {start!r} is unknown; choose seed or posterior")
    if is_forest(source):
        if out is not None or together or which != "dense":
            raise UserError(f"{source} is a forest, to which branches are added; leave --out, --model, --together out")
        return _add(source, source, domains, data, start, overrides)
    if start != "seed":
        raise UserError("--start posterior averages branches that are trained; a run has none")
    if out is None:
        raise UserError("--out FOLDER is needed: where the forest is to be")
    config = _seed_config(source, which)
    check_new_folder(out)
    with aside(out) as part:
        _copy(source / which, part / SEED)
        (part / "config.yaml").write_text(dump_config(config), encoding="utf-8")
        (part / BRANCHES).mkdir()
        made = _add(part, out, domains, data, start, overrides)
        if together:
            names = [name for path in made for name in read_json(part / BRANCHES / path.name / _FACTS)["domains"]]
            steps = len(names) * _config(part, names, data, overrides).training.steps
            _make(part / TOGETHER, part, names, data, [*overrides, f"training.steps={steps}"])
        with naming(out):
            part.rename(out)
    return made


def _copy(source: Path, target: Path, without: Sequence[str] = ()) -> None:
    """Copy the files of a model's folder, but for some; shutil's copytree has no plain error for a full disk."""
    for file in sorted(source.rglob("*")):
        if file.is_file() and file.name not in without:
            place = target / file.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, place)


def _seed_config(source: Path, which: str) -> TextConfig:
    """The configuration of a run whose model can be a seed."""
    if is_branch(source) or is_merged(source):
        raise UserError(f"{source} is no run of train text; a forest grows from one")
    recipe, config = run.configuration_of(source)
    if recipe is not RECIPE:
        raise UserError(f"{source} is a run of {recipe.name}; branches are of text")
    if config.model.kind != "decoder":
        raise UserError(
            f"{source} has an {config.model.kind}; branches are of decoders, whose predictions can be mixed"
        )
    if which not in ("dense", "sparse"):
        raise UserError(f"--model {which!r} is unknown; choose dense or sparse")
    model = run.load_model(source, which)
    needs = {need for layer in moe_layers(model).values() for need in layer.decider.required}
    if label := next((need for need in _LABELS if need in needs), None):
        raise UserError(
            f"{source / which}: its experts go by {label}, which a branch of one domain has not; take dense"
        )
    verify(source / which)
    return config


def _add(
    forest: Path,
    shown: Path,
    domains: Sequence[str] | None,
    data: Sequence[str] | None,
    start: str,
    overrides: Sequence[str],
) -> list[Path]:
    """Make branches in a forest, which people know as `shown`; all are seen to have text before one is made."""
    known = [name for path in _branch_folders(forest) for name in _facts(path)["domains"]]
    config = _config(forest, None, data, overrides)
    d = config.data
    text = built_in_domains(d.max_bytes) if d.source is None else read_domains(d.source, d.max_bytes)
    there = [domain.name for domain in text]
    for name in domains or ():
        if name not in there:
            raise UserError(f"the text has no domain {name!r}; it has {', '.join(there)}")
        if name in known:
            raise UserError(f"{shown} has a branch of {name!r} already; remove its folder to make it anew")
    names = list(dict.fromkeys(domains)) if domains else [name for name in there if name not in known]
    if not names:
        raise UserError(f"{shown} has a branch of each domain of the text: {', '.join(known)}")
    weights: dict[str, dict[str, float]] = {}
    if start == "posterior":
        grown = read_forest(forest)
        for name in names:
            weights[name] = posterior_weights(grown, _held_out(forest, _config(forest, [name], data, overrides))[1])
    made = []
    for name in names:
        folder = forest / BRANCHES / _folder_name(name, {path.name for path in _branch_folders(forest)})
        _make(folder, forest, [name], data, overrides, weights.get(name))
        made.append(shown / BRANCHES / folder.name)
    return made


def _make(
    folder: Path,
    forest: Path,
    domains: list[str],
    data: Sequence[str] | None,
    overrides: Sequence[str],
    weights: Mapping[str, float] | None = None,
) -> None:
    """A run folder that waits to be trained."""
    config = _config(forest, domains, data, overrides)
    facts = {"domains": domains, **_origin(forest / SEED), "start": dict(weights or {})}
    with new_folder(folder, versions=run_versions()) as part:
        (part / "config.yaml").write_text(dump_config(config), encoding="utf-8")
        (part / _FACTS).write_text(json.dumps(facts), encoding="utf-8")
        TEXT.save(part)
        if weights:
            grown = read_forest(forest)
            average([grown.model_folder(name) for name in weights], list(weights.values())).save_pretrained(
                part / START
            )
            load_tokenizer(forest / SEED).save_pretrained(part / START)
            seal(part / START)


def _config(
    forest: Path, domains: Sequence[str] | None, data: Sequence[str] | None, overrides: Sequence[str]
) -> TextConfig:
    given = [] if data is None else [f"data.source={json.dumps(list(data))}"]
    given += [] if domains is None and data is None else [f"data.domains={json.dumps(domains and list(domains))}"]
    return load_config(TextConfig, forest / "config.yaml", [*overrides, *given])


def _folder_name(domain: str, taken: set[str]) -> str:
    """A name for the folder of a domain that any file system takes."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", domain).strip(".-")[:60] or "domain"
    numbered = (f"{plain}-{n}" for n in range(2, len(taken) + 3))
    return plain if plain not in taken else next(name for name in numbered if name not in taken)


def _origin(seed: Path) -> dict[str, str]:
    """SHA-256 of the weights and of the tokenizer of a seed, by its manifest, with which its files are compared."""
    files = verify(seed)["files"]
    weights = sorted((name, one["sha256"]) for name, one in files.items() if name.endswith(".safetensors"))
    if "tokenizer.json" not in files or not weights:
        raise UserError(f"{seed}: has no model with its tokenizer")
    digest = hashlib.sha256(json.dumps(weights).encode()).hexdigest()
    return {"seed": digest, "tokenizer": files["tokenizer.json"]["sha256"]}


def _branch_folders(forest: Path) -> list[Path]:
    found = (forest / BRANCHES).iterdir()
    return sorted(path for path in found if is_branch(path) and not path.name.startswith("."))


def _facts(folder: Path) -> dict[str, Any]:
    """What branch.json of a branch says, after its manifest.

    Raises:
        UserError: where the folder is damaged, or the file is none that `branch` writes.
    """
    verify(folder, others=True, cure="make the branch anew")
    facts = read_json(folder / _FACTS)
    domains = facts.get("domains")
    named = isinstance(domains, list) and domains and all(isinstance(name, str) for name in domains)
    if not (named and isinstance(facts.get("start"), dict)):
        raise UserError(f"{folder / _FACTS} does not say the domains and the start of a branch; make the branch anew")
    return facts


def _check_origin(folder: Path, facts: Mapping[str, Any], origin: Mapping[str, str], seed: Path) -> None:
    for what, noun in (("tokenizer", "tokens"), ("seed", "weights")):
        if facts.get(what) != origin[what]:
            raise UserError(f"{folder} is a branch of another seed: {seed} has other {noun}")


def train_branch(folder: Path, *, as_json: bool = False) -> dict[str, Any]:
    """Train a branch into its folder, or go on with it; no other branch is looked at.

    The same branch gives the same weights, bit for bit, whatever is trained before it or beside it.

    Returns:
        Its last evaluation, on held-out text of its own domains.

    Raises:
        UserError: where it is no longer as `branch` made it, or the seed is another; and as `run.begin`.
        Interrupted: after Ctrl-C, when the checkpoint is written.
    """
    facts = _facts(folder)
    forest = next((path for path in folder.resolve().parents[:2] if is_forest(path)), None)
    if forest is None:
        raise UserError(f"{folder} is in no forest: there is no {SEED} beside it or beside the folder around it")
    _check_origin(folder, facts, _origin(forest / SEED), forest / SEED)
    start = folder / START if facts["start"] else forest / SEED
    verify(start)
    recipe = _BranchRecipe(start)
    config = load_config(TextConfig, folder / "config.yaml", [])
    decided = {_FACTS: (folder / _FACTS).read_text(encoding="utf-8")}
    with run.begin(recipe, config, folder, {_MODEL: config}, resume=True, as_json=as_json, decided=decided) as begun:
        run.train_one(begun, _MODEL)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        return [line for line in begun.metrics.lines(_MODEL) if line["kind"] == "eval"][-1]


@dataclass(frozen=True)
class Forest:
    """A forest whose branches have been compared with its seed.

    Args:
        folder: of the forest.
        branches: the run folder of each domain.
    """

    folder: Path
    branches: dict[str, Path]

    @property
    def domains(self) -> list[str]:
        """Their names."""
        return list(self.branches)

    def model_folder(self, domain: str) -> Path:
        """The trained model of a domain."""
        return self.branches[domain] / _MODEL

    @property
    def together(self) -> Path | None:
        """The model that was trained on all domains, where there is one."""
        path = self.folder / TOGETHER / _MODEL
        return path if path.is_dir() else None


def read_forest(folder: Path, domains: Sequence[str] | None = None) -> Forest:
    """A forest, or some domains of it.

    Raises:
        UserError: where the folder is none, a domain is unknown, a branch is of another seed or tokenizer, damaged, or
            not trained.
    """
    if not is_forest(folder):
        raise UserError(f"{folder} is no forest; shunter branch makes one")
    origin = _origin(folder / SEED)
    found: dict[str, Path] = {}
    for path in _branch_folders(folder):
        facts = _facts(path)
        name = str(facts["domains"][0])
        if domains is not None and name not in domains:
            continue
        _check_origin(path, facts, origin, folder / SEED)
        if name in found:
            raise UserError(f"{path} and {found[name]} are both of the domain {name!r}; remove one")
        if not (path / _MODEL).is_dir():
            raise UserError(f"{path} is not trained; do so: shunter train text --resume --run {path}")
        verify(path / _MODEL, cure="remove it and train the branch again")
        found[name] = path
    if unknown := [name for name in domains or () if name not in found]:
        known = [str(_facts(path)["domains"][0]) for path in _branch_folders(folder)]
        near = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(known) or 'none'}"
        raise UserError(f"{folder} has no branch of {unknown[0]!r}; {hint}")
    if not found:
        raise UserError(f"{folder} has no branches; add some: shunter branch {folder} --data TEXT")
    return Forest(folder, found)


@torch.no_grad()
def average(folders: Sequence[Path], weights: Sequence[float]) -> PreTrainedModel:
    """The model whose every number is the weighted mean of that in models of one shape; one of weight 1 is that one.

    Args:
        folders: of the models.
        weights: at least 0, with a positive sum, to 1 of which they are brought.

    Raises:
        UserError: where the models have other shapes, or state that is no floating-point number and differs.

    Source: Li et al. 2022, section 3.
    """
    chosen = [(folder, weight / sum(weights)) for folder, weight in zip(folders, weights, strict=True) if weight]
    model, total = load_folder(chosen[0][0]), dict[str, Tensor]()
    for folder, weight in chosen:
        state = load_folder(folder).state_dict()
        for name, own in model.state_dict().items():
            other = state.get(name)
            if other is None or other.shape != own.shape:
                raise UserError(f"{folder}: has other parameters than {chosen[0][0]}, such as {name!r}")
            if not own.is_floating_point():
                if not torch.equal(own, other):
                    raise UserError(f"{folder}: its {name!r} is not that of {chosen[0][0]}, and has no mean")
            elif len(chosen) > 1:
                term = weight * other.to(torch.float64)
                total[name] = total[name] + term if name in total else term
    for name, own in model.state_dict().items():
        if name in total:
            own.copy_(total[name])
    return model


def _held_out(forest: Path, config: TextConfig) -> tuple[Tensor, Tensor]:
    """The held-out windows (W, L) of a branch's domain, and those behind them for cached priors."""
    data = RECIPE.windows(config, load_tokenizer(forest / SEED), more=mixing.CACHED)
    [first], rest = mixing.set_apart(data, config.data.eval_windows)
    return first.input_ids, rest[first.name]


def _likelihood(model: Any, windows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """log p of each token but the first by one model, (W, L - 1, 1), of the windows of each domain."""
    return mixing.likelihoods(lambda domain, input_ids: model(input_ids=input_ids).logits, 1, windows, EVAL_BATCH)


def _by_branch(forest: Forest, windows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same by each branch, (W, L - 1, D); one model after another is in memory."""
    columns = [_likelihood(load_folder(forest.model_folder(name)), windows) for name in forest.domains]
    return {name: torch.cat([column[name] for column in columns], -1) for name in columns[0]}


def posterior_weights(forest: Forest, windows: Tensor) -> dict[str, float]:
    """What is believed of the domains after windows (W, L) of token ids: with what weights branches explain such text.

    Raises:
        UserError: where there is no window.
    """
    if not len(windows):
        raise UserError("too little text is held out to weigh branches by: give more, or a larger data.eval_share")
    prior = mixing.cached_prior(_by_branch(forest, {"": windows})[""])
    return dict(zip(forest.domains, prior.tolist(), strict=True))


def evaluate_forest(folder: Path, domains: Sequence[str] | None = None, top_k: int | None = None) -> dict[str, Any]:
    """The held-out loss in nats per token by domain of the seed, each branch, averages of them and their ensemble.

    Args:
        folder: of the forest.
        domains: the branches that take part; None for all.
        top_k: how many of the ensemble predict a token, as of `DomainMixture`.

    Returns:
        `domains`, the names, and `loss`, by model and domain.

    Raises:
        UserError: as `read_forest`.
    """
    forest = read_forest(folder, domains)
    if top_k is not None and not 1 <= top_k <= len(forest.branches):
        raise UserError(f"--top-k {top_k} must be from 1 to the number of branches, {len(forest.branches)}")
    pairs = {name: _held_out(folder, _config_of(path)) for name, path in forest.branches.items()}
    first, rest = ({name: pair[part] for name, pair in pairs.items()} for part in (0, 1))
    rest = {name: ids for name, ids in rest.items() if len(ids)}
    each, cache = _by_branch(forest, first), _by_branch(forest, rest) if rest else {}

    def alone(likelihood: Mapping[str, Tensor]) -> dict[str, float]:
        return {name: -float(one.mean()) for name, one in likelihood.items()}

    found = {"seed": alone(_likelihood(load_folder(folder / SEED), first))}
    if forest.together is not None:
        verify(forest.together)
        found["trained together"] = alone(_likelihood(load_folder(forest.together), first))
    for place, name in enumerate(forest.domains):
        found[f"branch {name}"] = alone({domain: one[..., place] for domain, one in each.items()})
    folders = [forest.model_folder(name) for name in forest.domains]
    found["average, equal weights"] = alone(_likelihood(average(folders, [1.0] * len(folders)), first))
    if len(cache) == len(first):
        found["average by posterior"] = {
            name: alone(_likelihood(average(folders, mixing.cached_prior(cache[name]).tolist()), {name: ids}))[name]
            for name, ids in first.items()
        }
    own = {name: place for place, name in enumerate(forest.domains)}
    ways = mixing.losses(each, cache, own, top_k)
    found |= {f"ensemble, {way}": losses for way, losses in ways.items() if way != mixing.OWN}
    return {"domains": forest.domains, "loss": found}


def _config_of(path: Path) -> TextConfig:
    return load_config(TextConfig, path / "config.yaml", [])


def merge(
    folder: Path,
    out: Path,
    how: str = "ensemble",
    *,
    domains: Sequence[str] | None = None,
    weights: Mapping[str, float] | None = None,
    like: str | None = None,
    window: int | None = None,
    top_k: int | None = None,
    check: bool = True,
) -> dict[str, Any]:
    """Merge the branches of a forest into a new folder that needs none of it.

    Args:
        folder: of the forest.
        out: the new folder.
        how: "ensemble", all models and how their predictions are mixed; "average", one model.
        domains: the branches that take part; None for all.
        weights: of the branches: of the average's parameters, or the ensemble's prior; None for equal ones.
        like: a domain, of whose held-out text the posterior gives the weights instead.
        window: how many of the last tokens the ensemble goes by, as of `DomainMixture`.
        top_k: how many of the ensemble predict a token.
        check: whether to evaluate the forest too, as `evaluate_forest`.

    Returns:
        The receipt, as merged.json has it; beside it is a picture of the losses, losses.png.

    Raises:
        UserError: as `read_forest`, for impossible values, and where `out` exists.
    """
    if how not in ("ensemble", "average"):
        raise UserError(f"--as {how!r} is unknown; choose ensemble or average")
    if how == "average" and (window is not None or top_k is not None):
        raise UserError("--window and --top-k are of an ensemble; an average is one model")
    if window is not None and window < 0:
        raise UserError(f"--window {window} must be at least 0")
    if weights is not None and like is not None:
        raise UserError("--weights and --like both say the weights of the branches; give one")
    forest = read_forest(folder, domains)
    if top_k is not None and not 1 <= top_k <= len(forest.branches):
        raise UserError(f"--top-k {top_k} must be from 1 to the number of branches, {len(forest.branches)}")
    given = dict.fromkeys(forest.domains, 1.0) if weights is None else dict(weights)
    if unknown := next((name for name in given if name not in forest.branches), None):
        raise UserError(f"--weights: {folder} has no branch of {unknown!r} here; it has {', '.join(forest.domains)}")
    if min(given.values()) < 0 or not 0 < sum(given.values()) < float("inf"):
        raise UserError("--weights must be at least 0, and one of them more")
    check_new_folder(out)
    if like is not None:
        if like not in forest.branches:
            raise UserError(f"--like: {folder} has no branch of {like!r}; it has {', '.join(forest.domains)}")
        given = posterior_weights(forest, _held_out(folder, _config_of(forest.branches[like]))[1])
    share = {name: weight / sum(given.values()) for name, weight in given.items() if weight}
    receipt: dict[str, Any] = {"as": how, "forest": folder.resolve().name, "weights": share}
    receipt |= {"window": window, "top_k": top_k} if how == "ensemble" else {}
    receipt |= evaluate_forest(folder, domains, top_k) if check else {}
    receipt["versions"] = run_versions()
    with new_folder(out, **_origin(folder / SEED)) as part:
        load_tokenizer(folder / SEED).save_pretrained(part)
        if how == "average":
            average([forest.model_folder(name) for name in share], list(share.values())).save_pretrained(part)
        else:
            for place, name in enumerate(share):
                _copy(
                    forest.model_folder(name),
                    part / _EXPERTS / str(place),
                    (MANIFEST, "metrics.jsonl", "training.json"),
                )
        if check:
            with style(PAPER):
                losses_by_domain(receipt["loss"]).savefig(part / "losses.png", metadata={"Software": None})
        (part / _MERGED).write_text(json.dumps(receipt, indent=1) + "\n", encoding="utf-8")
    return receipt


def generate(folder: Path, which: str | None, prompt: str, max_new_tokens: int, temperature: float, seed: int) -> str:
    """Continue a prompt by a forest or by what it was merged to; temperature 0 takes the likeliest token each time.

    Args:
        folder: of the forest, or of `merge`.
        which: of a forest: "ensemble" (None), "average", "seed", "together" or a domain.
        prompt: the text to continue.
        max_new_tokens: how many tokens more.
        temperature: of the sampling.
        seed: of the sampling.

    Raises:
        UserError: as `text.generate`, and for another model.
    """
    check_sampling(prompt, temperature)
    if is_merged(folder):
        if which is not None:
            raise UserError(f"{folder} is one model; leave --model out")
        facts = verify(folder) and read_json(folder / _MERGED)
        if facts.get("as") not in ("ensemble", "average") or not isinstance(facts.get("weights"), dict):
            raise UserError(f"{folder / _MERGED} does not say what was merged, and how; merge the forest again")
        paths, weights = [folder], [1.0]
        if facts["as"] == "ensemble":
            paths = [folder / _EXPERTS / str(place) for place in range(len(facts["weights"]))]
            weights = list(facts["weights"].values())
        options: dict[str, Any] = {name: facts.get(name) for name in ("window", "top_k")}
        models: list[Any] = [load_folder(path) for path in paths]
    else:
        models, weights, options = _chosen(folder, which)
    tokenizer = load_tokenizer(folder / SEED if is_forest(folder) else folder)
    set_seed(seed)
    ids = encode(tokenizer, prompt, models[0], folder)
    if len(models) == 1:
        return continued(models[0], tokenizer, ids, max_new_tokens, temperature)
    mixture = DomainMixture(lambda domain, **inputs: models[domain](**inputs).logits, len(models), "cached", **options)
    mixture.prior = torch.tensor(weights, dtype=torch.float64)
    found = mixing.continue_ids(mixture, ids, max_new_tokens, temperature, mixing.caches(models))
    return str(tokenizer.decode(found[0], skip_special_tokens=True))


def _chosen(folder: Path, which: str | None) -> tuple[list[Any], list[float], dict[str, Any]]:
    """The models of a forest that are meant by a name, their prior, and how they are mixed."""
    if which == "seed":
        verify(folder / SEED)
        return [load_folder(folder / SEED)], [1.0], {}
    if which == "together":
        path = folder / TOGETHER / _MODEL
        if not path.is_dir():
            raise UserError(f"{folder} has no model that was trained together, or it is not trained yet")
        return [load_folder(path)], [1.0], {}
    forest = read_forest(folder, None if which in (None, "ensemble", "average") else [str(which)])
    folders = [forest.model_folder(name) for name in forest.domains]
    if which == "average":
        return [average(folders, [1.0] * len(folders))], [1.0], {}
    return [load_folder(path) for path in folders], [1 / len(folders)] * len(folders), {}
