"""A run: a recipe and its configuration in, a folder with both models, every metric, a summary and a report out."""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from transformers import PreTrainedModel, default_data_collator
from transformers.utils import logging as hf_logging

from .. import routers
from ..analysis import runs
from ..analysis.calibration import Calibration, calibrations
from ..analysis.exhibits import save_exhibits
from ..analysis.ledger import TRAINING_FLOPS, Ledger
from ..analysis.pages.run_page import write_picture, write_report
from ..analysis.runs import MODELS, Metrics, ModelSummary
from ..data.files import sentences
from ..durable import MANIFEST, make_folder, naming, only_process, seal, sealed, verify, write
from ..environment import run_versions
from ..errors import Diverged, UserError, escaped, one_line
from ..experts import MixedExperts
from ..hf.checkpoints.reading import read_json
from ..hf.distribute import distribute
from ..hf.offloading import offload
from ..hf.sparsifying import router_name
from ..moe import MoE, RoutedLayer, dropless, moe_layers, tell
from ..parallel.checkpoint import first_does, together
from ..parallel.processes import mesh
from ..parallel.watch import named_errors
from ..ranks import is_first_rank, num_ranks
from ..training.checkpoints import Checkpoints
from ..training.loop import told_and_given, train_model
from .config import dump_config, load_config
from .recipe import Prepared, Recipe
from .registry import find
from .sections import RunConfig

__all__ = [
    "BRANCH",
    "Begun",
    "account",
    "begin",
    "calibrate_run",
    "check_processes",
    "check_router",
    "configuration_of",
    "data_of",
    "evaluate_run",
    "expert_width",
    "load_model",
    "recipe_of",
    "rehearse",
    "summarised",
    "train",
    "train_one",
]


BRANCH = "branch.json"
"""The file of a run folder that holds a branch of a forest, of one model."""


def expert_width(hidden: float, router: routers.Router, sequence_length: int, *, gated: bool = True) -> int:
    """The width f of one expert at which k experts and the router cost what one dense block does, gated or not.

    With three matrices of a gated block, 6 d f k + router FLOPs = 6 d hidden, with two 4 in place of 6; rounded to the
    nearest whole unit. k is the mean number of experts that a token will ask for in evaluation, by the router's own
    word.
    """
    unit, router = (6 if gated else 4) * router.dim, copy.deepcopy(router).eval()
    return max(1, round((unit * hidden - router.flops_per_token) / (unit * router.experts_for(sequence_length))))


def width_at(flops: Callable[[int], float], wanted: float) -> int | None:
    """The width at which a cost that grows linearly with it comes nearest to the wanted one; None where it does not."""
    first, second = flops(64), flops(128)
    return None if first == second else max(1, round(64 + 64 * (wanted - first) / (second - first)))


def train(
    recipe: Recipe[Any, Any], config: RunConfig, run: Path, *, resume: bool = False, as_json: bool = False
) -> dict[str, Any]:
    """Train both models and leave the run folder complete: models, metrics, summary, report.

    Args:
        recipe: what the data, the models and the metric are.
        config: what to train.
        run: the folder; created.
        resume: go on with a run that was stopped; finished models are not trained again.
        as_json: metrics go to standard output, a JSON object a line, in place of the progress line.

    Returns:
        The summary.

    Raises:
        UserError: before anything is trained; see `begin`.
        Interrupted: after Ctrl-C, when the checkpoint is written.
        LostRank: where another process of the training is gone, stopped or elsewhere.
    """
    if (run / "routers.json").exists():
        raise UserError(f"{run} holds a comparison; go on with shunter compare {recipe.name} --resume --run {run}")
    if (run / BRANCH).exists():
        raise UserError(f"{run} holds a branch; train it, or go on: shunter train text --resume --run {run}")
    for one in config.sparse.in_turn():
        check_router(recipe, config, one.router)
    others = recipe.others_of(config)
    names = (*MODELS, *others)
    configs = dict.fromkeys(MODELS, config) | {name: recipe.config_of(config, name) for name in others}
    with named_errors(), begin(recipe, config, run, configs, resume=resume, as_json=as_json, several=True) as begun:
        costs = {which: train_one(begun, which) for which in names}
        return first_does(partial(_finish, begun, costs))


def _finish(begun: Begun, costs: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Leave the summary and the report of a run whose models are trained."""
    recipe, config, run = begun.recipe, begun.configs["sparse"], begun.folder
    accounts = {which: account(begun, which, costs[which]) for which in MODELS}
    t = config.training
    models = {which: load_model(run, which) for which in begun.configs}
    deciders = {name: layer.decider for name, layer in moe_layers(models["sparse"]).items()}
    who = {name: {"router": router_name(one.innermost.kind), "chooses": one.chooses} for name, one in deciders.items()}
    summary = runs.summarise(accounts, begun.metrics, t.steps, config.seed, begun.data.domains, who, run_versions())
    write(run / "summary.json", json.dumps(summary, indent=2))
    found = recipe.specialisation(models["sparse"], begun.data)
    if found is not None:
        write(run / "specialisation.json", json.dumps(found))
    save_exhibits(run, recipe.exhibits(models, config, begun.data))
    write_report(run)
    write_picture(run, run / "picture.png")
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    return summary


def check_router(recipe: Recipe[Any, Any], config: RunConfig, router: str) -> None:
    """See that the batches of the recipe's data tell what the router needs.

    Raises:
        UserError: naming what they lack.
    """
    if lacking := [need for need in routers.find(router).needs if not recipe.tells(need, config)]:
        raise UserError(
            f"router {router!r} needs {', '.join(lacking)} of each {recipe.words.token}, which plain {recipe.name} "
            "has not"
        )


def check_processes(recipe: Recipe[Any, Any], config: RunConfig, processes: int) -> None:
    """See that the processes can share the items of a step.

    Raises:
        UserError: where their number does not divide that of the items.
    """
    if processes > 1 and (items := recipe.items_per_step(config)) % processes:
        raise UserError(
            f"a step has {items} items, which {processes} processes cannot share equally; change parallel.processes or "
            "training.batch_tokens"
        )


def rehearse(recipe: Recipe[Any, Any], name: str, config: RunConfig, data: Any) -> None:
    """Build a model, train and evaluate it on a batch of one item, and drop it: what cannot run fails here.

    The batch is as large as in training, so that loops are compiled now, and in no model's seconds and memory.

    Raises:
        UserError: naming the model, where it cannot be built or trained.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model: Any = recipe.model(config, data, name)
        items = max(2, recipe.items_per_step(config) // num_ranks())
        batch = {key: value.to(device) for key, value in default_data_collator([data.train[0]] * items).items()}
        told, given = told_and_given(batch)
        with tell(model, **told):
            model.to(device).train()(**given).loss.backward()
            model.eval()(**given)
        recipe.ledger(model, config)
    except UserError:
        raise
    except torch.OutOfMemoryError:
        raise UserError(f"the {name} model does not fit in memory; make it smaller") from None
    except Exception as error:  # as many ways to fail as there are settings
        raise UserError(f"the {name} model cannot be trained with these settings: {one_line(error)}") from error


@dataclass(frozen=True)
class Begun:
    """A run that this process has for itself.

    Args:
        recipe: what its data, models and metric are.
        folder: the run's.
        configs: of each model, by the name of its folder.
        data: that are read.
        metrics: of all models.
        identity: what the manifests of its checkpoints and models say of it.
    """

    recipe: Recipe[Any, Any]
    folder: Path
    configs: dict[str, Any]
    data: Any
    metrics: Metrics
    identity: dict[str, Any]


@contextmanager
def begin(
    recipe: Recipe[Any, Any],
    config: RunConfig,
    run: Path,
    configs: dict[str, Any],
    *,
    resume: bool,
    as_json: bool,
    decided: Mapping[str, str] = MappingProxyType({}),
    several: bool = False,
) -> Iterator[Begun]:
    """Make the run folder, or find it again, and keep other processes out of it.

    What is decided is sealed before anything is trained: the configuration at once, so that a run can go on from then
    on; the data's fingerprint when they are read and every model has been seen to train on an item of them.

    Args:
        recipe: what the data, the models and the metric are.
        config: what the run's config.yaml says.
        run: the folder.
        configs: of each model, by the name of its folder.
        resume: go on with the run in the folder.
        as_json: metrics go to standard output too.
        decided: further files of the folder that say what was decided, and their text.
        several: whether the caller trains on all processes; the first alone then writes.

    Raises:
        UserError: where there is a run already, or none to resume, or one that another process trains; where the
            configuration or the data are others than it began with; where a model cannot be trained.
    """
    hf_logging.disable_progress_bar()
    _join(recipe, config, several)
    if resume and not sealed(run):
        raise UserError(f"{run} holds no run to go on with: it has no {MANIFEST}. Start it without --resume")
    if config.training.threads:
        torch.set_num_threads(config.training.threads)
    texts = {"config.yaml": dump_config(config), **decided}
    new = not run.exists()
    prepared: list[Prepared] = []

    def settle() -> tuple[str, str]:
        """Decide, read and try everything; the data's fingerprint, and the configuration's checksum."""
        if not resume:
            _decide(recipe, config, run, texts)
        facts = _decided(config, run, texts)
        with sentences() as left_out:
            data: Prepared = recipe.prepare(config)
        fingerprint = str(facts.get("data", data.fingerprint))
        _check_data(recipe, data, fingerprint)
        for name, own in configs.items():
            rehearse(recipe, name, own, recipe.data_of(data, name))
        if "data" not in facts:
            record = data.describe()
            write(run / "data.json", json.dumps(record | {"notes": [*record.get("notes", []), *left_out]}, indent=2))
            with naming(run / recipe.reader):
                data.save_pretrained(run / recipe.reader)
            reader = [path.relative_to(run).as_posix() for path in (run / recipe.reader).glob("*")]
            seal(run, [*facts["files"], "data.json", *reader], **_facts(data=fingerprint))
        if not as_json:
            for d in data.domains:
                key = next(key for key in d if key.startswith("train_"))
                size = f"{d[key]:,} {key.removeprefix('train_')} to train on"
                print(escaped(f"{d['name']}: {size}, {d['source']}; {d['license']}"), file=sys.stderr)
        prepared.append(data)
        return fingerprint, facts["files"]["config.yaml"]["sha256"]

    with ExitStack() as stack:

        def claim() -> tuple[str, str]:
            make_folder(run)
            stack.enter_context(only_process(run))
            try:
                return settle()
            except Exception:
                if new and not resume:
                    shutil.rmtree(run, ignore_errors=True)
                raise

        fingerprint, checksum = first_does(claim)
        data = prepared[0] if prepared else recipe.prepare(config)
        if not prepared:
            _check_data(recipe, data, fingerprint)
        metrics = Metrics(run / "metrics.jsonl", sys.stdout if as_json else None) if is_first_rank() else _Unheard(run)
        metrics.keep(configs)
        yield Begun(recipe, run, configs, data, metrics, {"config": checksum, "data": fingerprint})


class _Unheard(Metrics):
    """The metrics of a process that is not the first: nobody hears them."""

    def write(self, **line: Any) -> None:
        """Nothing."""

    def lines(self, model: str | None = None) -> list[dict[str, Any]]:
        """None."""
        return []

    def keep(self, models: Collection[str]) -> None:
        """Nothing."""

    def replace(self, model: str, lines: list[dict[str, Any]]) -> None:
        """Nothing."""


def _join(recipe: Recipe[Any, Any], config: RunConfig, several: bool) -> None:
    """Make one group of the processes that torchrun started, as the configuration has them.

    Raises:
        UserError: where it does not.
    """
    ranks, asked = int(os.environ.get("WORLD_SIZE") or 1), config.parallel
    wanted = asked.processes is not None or asked.expert_parallel > 1
    if ranks > 1 and not (wanted and several):
        cure = "set parallel.expert_parallel (or parallel.processes)" if several else "start it without torchrun"
        raise UserError(f"a run is trained by one process, and torchrun has started {ranks}; {cure}")
    if asked.processes is not None and asked.processes != ranks:
        raise UserError(f"parallel.processes is {asked.processes}, and {ranks} run; start as many by torchrun")
    if ranks % asked.expert_parallel:
        raise UserError(
            f"parallel.expert_parallel={asked.expert_parallel} must divide the number of processes, {ranks}; start "
            "them by torchrun --nproc-per-node, or with parallel.processes"
        )
    check_processes(recipe, config, ranks)
    if ranks > 1:
        # It says at each norm over two meshes that one exchange would do for two.
        logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
        mesh(asked.expert_parallel, timeout=asked.timeout)


def _facts(**facts: Any) -> dict[str, Any]:
    return {**facts, "versions": run_versions()}


def _decide(recipe: Recipe[Any, Any], config: RunConfig, run: Path, texts: dict[str, str]) -> None:
    """Seal what a new run is to be.

    Raises:
        UserError: where the folder holds a run.
    """
    if (
        (run / BRANCH).exists()
        or (run / "metrics.jsonl").exists()
        or (sealed(run) and "data" in verify(run, others=True))
    ):
        raise UserError(f"{run} holds a run already; go on with --resume --run {run}, or choose another folder")
    (run / MANIFEST).unlink(missing_ok=True)
    for name, text in texts.items():
        write(run / name, text)
    recipe.words_of(config).save(run)
    seal(run, [*texts, "recipe.json"], **_facts())


def _decided(config: RunConfig, run: Path, texts: dict[str, str]) -> dict[str, Any]:
    """What the manifest of a run says; says too which versions are others than those it began with.

    Raises:
        UserError: where what was decided has been changed, or these are other settings.
    """
    facts = verify(run, others=True, cure=_CURE)
    if not isinstance(facts.get("versions"), dict) or not texts.keys() <= facts["files"].keys():
        raise UserError(f"{run / MANIFEST}: is not that of a run, which names its versions and {', '.join(texts)}")
    for name, text in texts.items():
        if (run / name).read_text(encoding="utf-8") == text:
            continue
        if name != "config.yaml" or load_config(type(config), run / name, []) != config:
            raise UserError(f"{run / name} says other settings than these; a run goes on with those it began with")
        print(
            escaped(f"{run / name} was written before some settings existed; they have their defaults"), file=sys.stderr
        )
    for name, now in run_versions().items():
        if (then := facts["versions"].get(name)) != now:
            said = f"{name} was {then} when this run began, and is {now}: the result may be another"
            print(escaped(said), file=sys.stderr)
    return facts


def train_one(begun: Begun, name: str) -> dict[str, float]:
    """Train one model of a run into its folder `run / name`, which appears when it is whole; unless it is there.

    Args:
        begun: the run.
        name: "dense", or whatever the sparse model is called.

    Returns:
        What `train_model` measured.

    Raises:
        Diverged: where training met numbers that are not finite, and did so again from its newest checkpoint.
    """
    folder, identity = begun.folder / name, begun.identity | {"model": name}
    if first_does(folder.exists):
        return first_does(partial(_trained, folder, name, identity, begun.metrics))
    checkpoints = Checkpoints(begun.folder / "checkpoints" / name, identity)
    while True:
        try:
            model, costs = _train(begun, name, checkpoints)
            break
        except Diverged as error:
            if not first_does(partial(checkpoints.go_back, error)):
                raise
            print(f"{name} model, {error}. Once, it goes back to a checkpoint from before", file=sys.stderr)
    with together(folder, **identity) as part:
        model.save_pretrained(part, is_main_process=is_first_rank())
        if is_first_rank():
            begun.data.save_pretrained(part)
            write(part / "training.json", json.dumps(costs))
            Metrics(part / "metrics.jsonl").replace(name, begun.metrics.lines(name))
    return costs


def _train(begun: Begun, name: str, checkpoints: Checkpoints) -> tuple[PreTrainedModel, dict[str, float]]:
    recipe, config = begun.recipe, begun.configs[name]
    data = recipe.data_of(begun.data, name)
    t = config.training
    model = recipe.model(config, data, name)
    if (ranks := num_ranks()) > 1:
        from transformers.distributed import DistributedConfig

        share = config.parallel.expert_parallel if moe_layers(model) else 1
        how = config.parallel
        distributed = DistributedConfig(fsdp_size=ranks, ep_size=share)
        distribute(model, distributed, timeout=how.timeout, overlap_degree=how.overlap_degree)
    costs = train_model(
        name,
        model,
        data.train,
        lambda m: recipe.evaluate(m, data),
        begun.metrics,
        checkpoints,
        tokens_per_step=recipe.tokens_per_step(config),
        eval_every=t.eval_every,
        log_every=t.log_every,
        max_steps=t.steps,
        per_device_train_batch_size=recipe.items_per_step(config) // ranks,
        learning_rate=t.learning_rate,
        warmup_steps=t.warmup,
        lr_scheduler_type=t.schedule,
        weight_decay=t.weight_decay,
        max_grad_norm=t.max_grad_norm,
        adam_beta2=t.beta2,
        save_strategy="steps",
        save_steps=t.save_every,
        seed=config.seed,
        use_cpu=not torch.cuda.is_available(),
    )
    return model, costs


def _trained(folder: Path, name: str, identity: dict[str, Any], metrics: Metrics) -> dict[str, float]:
    """What a finished model cost; its lines of the metrics are put back.

    Raises:
        UserError: where its folder is damaged, or of another run.
    """
    facts = verify(folder, cure="remove the folder to train that model again")
    if any(facts.get(key) != value for key, value in identity.items()):
        raise UserError(f"{folder} is of another run; remove it to train that model again")
    metrics.replace(name, Metrics(folder / "metrics.jsonl").lines(name))
    return read_json(folder / "training.json")


def account(begun: Begun, name: str, costs: dict[str, float]) -> ModelSummary:
    """What one trained model of a run reached and cost, by the experts that its tokens took indeed.

    In evaluation, too, experts that differ count by the shares of tokens that each took at the end of training.
    """
    recipe, config = begun.recipe, begun.configs[name]
    model, lines = load_model(begun.folder, name), begun.metrics.lines(name)
    layers = moe_layers(model)
    loads: dict[int, dict[str, list[float]]] = {
        line["step"]: line["layers"] for line in lines if line["kind"] == "load"
    }

    def cost(taken: float | None, step: int) -> Ledger:
        for path, layer in layers.items():
            if layer.decider.chooses != "slots":  # whose experts compute slots, however many tokens hear of them
                layer.experts_taken = taken and taken * _dearness(layer, loads[step][path])
        return recipe.ledger(model, config)

    spent, before, step = 0.0, 0, 0
    for line in lines:
        if line["kind"] == "train":
            step = line["step"]
            spent += (line["tokens"] - before) * cost(line.get("experts_per_token"), step).flops_per_token
            before = line["tokens"]
    passes = max((layer.decider.passes for layer in layers.values()), default=1)
    last = [line for line in lines if line["kind"] == "eval"][-1]
    found = cost(last.get("experts_per_token"), step)
    return ModelSummary(
        eval_loss=last["loss"],
        shown={key: last[key] for key in recipe.words_of(config).shown},
        flops_per_token=found.flops_per_token,
        params_total=found.params_total,
        params_active=found.params_active,
        seconds=costs["seconds"],
        tokens=config.training.steps * recipe.tokens_per_step(config),
        peak_rss_bytes=costs["peak_rss_bytes"],
        domains=last["domains"],
        training_flops=TRAINING_FLOPS * passes * spent,
    )


def _dearness(layer: RoutedLayer, shares: list[float]) -> float:
    """What an expert cost in the mean over these shares of tokens (E,), by what one costs in the mean over all."""
    experts = layer.own_experts if isinstance(layer, MoE) else None
    if not isinstance(experts, MixedExperts):
        return 1.0
    return float((torch.tensor(shares, dtype=torch.float64) * experts.costs).sum() / experts.costs.mean())


_CURE = "put back what it was; a run goes on as it began"


def recipe_of(run: Path) -> Recipe[Any, Any]:
    """The recipe that made a run folder."""
    return find(runs.read_words(run).recipe)


def configuration_of(run: Path) -> tuple[Recipe[Any, Any], Any]:
    """The recipe and the configuration of a run folder.

    Raises:
        UserError: where there is none, or what was decided has been damaged or changed.
    """
    if sealed(run):
        verify(run, others=True, cure=_CURE)
    recipe = recipe_of(run)
    return recipe, load_config(recipe.config, run / "config.yaml", [])


def load_model(run: Path, which: str, memory: str | None = None) -> PreTrainedModel:
    """A trained model of a run folder, in evaluation mode.

    Args:
        run: the folder.
        which: "dense" or "sparse".
        memory: what the experts of the sparse one may take of it, as `shunter.offload` has it; None for all.

    Raises:
        UserError: where the run has no such model (yet).
        ValueError: where its folder is damaged.
    """
    hf_logging.disable_progress_bar()
    folder = run / which
    if not folder.is_dir():
        raise UserError(f"{folder} holds no trained model; `shunter train` leaves one in its run folder")
    if memory is not None and which == "sparse":
        model: PreTrainedModel = offload(folder, memory)
        return model
    return recipe_of(run).load(folder)


def evaluate_run(run: Path, *, without_drops: bool = False, memory: str | None = None) -> dict[str, Any]:
    """Evaluate both models of a run folder again, or all of a comparison, on the run's own held-out data.

    Args:
        run: the folder.
        memory: what the sparse model's experts may take of it, as in `load_model`.
        without_drops: evaluate a sparse model by `shunter.dropless`, whatever capacity it was trained with.

    Raises:
        UserError: where the folder holds no finished run, or its data have changed.
        ValueError: where its router decides by its capacity, and without_drops is asked for.
    """
    recipe, models, data = _trained_run(run, without_drops, memory)
    return {which: recipe.evaluate(model, data) for which, model in models.items()}


def calibrate_run(run: Path, *, without_drops: bool = False) -> dict[str, dict[str, Calibration]]:
    """How far the confidence of the models of a run folder is their accuracy, by model and by domain.

    Args and errors are those of `evaluate_run`.

    Raises:
        UserError: where the run's recipe has no classes, too.
    """
    recipe, models, data = _trained_run(run, without_drops)
    return {which: calibrations(recipe.predictions(model, data)) for which, model in models.items()}


def _trained_run(
    run: Path, without_drops: bool, memory: str | None = None
) -> tuple[Recipe[Any, Any], dict[str, PreTrainedModel], Any]:
    """The recipe, the models and the data of a finished run, or of what is finished of a comparison."""
    recipe, _ = configuration_of(run)
    models = {which: load_model(run, which, memory) for which in _models_of(run)}
    for model in models.values():
        if without_drops and moe_layers(model):
            dropless(model)
    return recipe, models, data_of(run)


def _models_of(run: Path) -> tuple[str, ...]:
    """The names of both models; of a comparison those of all that are trained, the dense one first.

    Raises:
        UserError: for a comparison over several seeds, which has no models of its own.
    """
    if (run / "seeds.json").exists():
        raise UserError(f"{run} is a comparison over several seeds; give the folder of one, as {run / 'seed-0'}")
    if not (run / "routers.json").exists():
        return MODELS
    found = {folder.parent.name for folder in run.glob("*/training.json")}
    return ("dense", *sorted(found - {"dense"}))


def data_of(run: Path) -> Any:
    """The data of a run folder, read again.

    Raises:
        UserError: where they have changed.
    """
    recipe, config = configuration_of(run)
    data: Prepared = recipe.prepare(config)
    _check_data(recipe, data, str(read_json(run / "data.json").get("fingerprint")))
    return data


def summarised(run: Path) -> dict[str, float]:
    """The held-out losses of both models that a run's summary.json says; none where it is not finished.

    Raises:
        UserError: where they are not in it.
    """
    path = run / "summary.json"
    if not path.exists():
        return {}
    said = read_json(path)
    try:
        return {which: float(said[which]["eval_loss"]) for which in MODELS}
    except (LookupError, TypeError, ValueError):
        raise UserError(f"{path}: has no eval_loss of both models") from None


def _check_data(recipe: Recipe[Any, Any], data: Prepared, recorded: str) -> None:
    if data.fingerprint != recorded:
        have = "have" if recipe.words.data.endswith("s") else "has"
        raise UserError(
            f"the {recipe.words.data} {have} changed since this run: the fingerprint is {data.fingerprint[:12]}, the "
            f"run's {recorded[:12]}. Bring back the data, and the versions that the run's {MANIFEST} names"
        )
