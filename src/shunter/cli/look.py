"""The verbs that look: settings, routers, roles, inspect."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..durable import make_folder, write
from ..errors import UserError
from ..recipes.registry import names

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..analysis.inspect.inspecting import Inspected
    from ..analysis.inspect.material import Material

__all__ = ["add_verbs"]


def add_verbs(verbs: Any) -> None:
    """Add the verbs to the parser of the command line."""
    known = verbs.add_parser("settings", help="list every setting of a recipe: its default, what it may be, what it is")
    known.add_argument("recipe", nargs="?", choices=names(), help="of train and compare; none: of all")
    known.add_argument("--format", choices=["text", "markdown", "json"], default="text", help="of the table")
    known.set_defaults(verb=_settings)

    table = verbs.add_parser("routers", help="list every router: who decides, what it needs, where it comes from")
    table.add_argument("--format", choices=["text", "markdown", "json"], default="text", help="of the table")
    table.set_defaults(verb=_routers)

    roles = verbs.add_parser("roles", help="list a model's parameters by role: router, expert, attention, …")
    roles.add_argument("model", metavar="MODEL", help="a model's folder, dense or sparse; its weights are not read")
    roles.add_argument("--train", metavar="ROLES", help="count what this would train: moe, non_moe, expert,router, …")
    roles.set_defaults(verb=_roles)

    inspect = verbs.add_parser(
        "inspect",
        help="see inside the experts of any mixture-of-experts model, or compare two checkpoints of one",
        epilog="Leaves inspect.html and inspect.json. Ctrl-C ends the work early and reports what there is.",
    )
    inspect.add_argument("models", nargs="+", metavar="MODEL", help="a model's folder; two: before and after")
    own = "text as in train, or folders of images; none: the built-in text, or what the model's run held out"
    inspect.add_argument("--data", nargs="+", help=own)
    inspect.add_argument("--out", type=Path, help="the report's folder (default: runs/inspect-MODEL)")
    inspect.add_argument("--tokens", type=int, default=16384, help="how many tokens to look at")
    inspect.add_argument("--length", type=int, default=128, help="tokens of a window")
    inspect.add_argument("--ablate", type=int, default=256, help="how many experts to remove in turn; 0: none")
    inspect.add_argument("--json", action="store_true", help="the findings to standard output too")
    inspect.set_defaults(verb=_inspect)


def _settings(args: argparse.Namespace) -> int:
    from ..recipes.registry import find
    from ..recipes.settings import markdown, plain, settings

    recipes = {name: list(settings(find(name).config())) for name in ([args.recipe] if args.recipe else names())}
    if args.format == "json":
        print(json.dumps({name: [row._asdict() for row in rows] for name, rows in recipes.items()}, indent=2))
    elif args.format == "markdown":
        sys.stdout.write(markdown(recipes))
    else:
        sys.stdout.write("\n".join(f"{name}\n\n{plain(rows)}" for name, rows in recipes.items()))
    return 0


def _routers(args: argparse.Namespace) -> int:
    from ..routers.taxonomy import markdown, plain, taxonomy

    rows = taxonomy()
    if args.format == "json":
        print(json.dumps([row._asdict() for row in rows], indent=2))
    else:
        sys.stdout.write(markdown(rows) if args.format == "markdown" else plain(rows) + "\n")
    return 0


def _inspect(args: argparse.Namespace) -> int:
    findings, page = _inspect_models(
        args.models, args.data, args.out, args.tokens, args.length, args.ablate, quiet=args.json
    )
    if args.json:
        print(json.dumps(findings))
    print(f"Report: {page}", file=sys.stderr)
    return 0 if findings["complete"] else 130


def _inspect_models(
    models: Sequence[str],
    data: Sequence[str] | None,
    out: Path | None = None,
    tokens: int = 16384,
    length: int = 128,
    ablations: int = 256,
    quiet: bool = False,
) -> tuple[dict[str, Any], Path]:
    """Inspect a model, or compare two checkpoints of one, and leave inspect.html and inspect.json.

    Args:
        models: one folder, or two: before and after.
        data: as `shunter.data.documents.read_domains` takes it, or image files and folders for a model of images; None
            takes the built-in text.
        out: the folder of the report; by default runs/inspect-<name>, created.
        tokens: how many to look at.
        length: of a window of text.
        ablations: how many experts to remove in turn at most.
        quiet: show no progress.

    Returns:
        The findings, as inspect.json has them, and the path of the page.

    Raises:
        UserError: for models that cannot be inspected, or shown these data, and data that cannot be read.
    """
    from ..analysis.inspect.inspecting import inspect, load, material_for
    from ..analysis.pages.inspect_page import render

    if len(models) > 2:
        raise UserError(f"{len(models)} models are given; give one, or two checkpoints of one to compare")
    for name, value, least in (("--tokens", tokens, 2), ("--length", length, 4), ("--ablate", ablations, 0)):
        if value < least:
            raise UserError(f"{name} {value} must be at least {least}")
    *before, subject = [load(path, by=_reader(path)) for path in models]
    for each in before:
        if subject.model.main_input_name == "input_ids":  # labels of images may be others
            subject.must_share_words(each.model, each.folder)
    held_out = _held_out(subject, tokens) if data is None else None
    material = held_out or material_for(subject, data, tokens, length)
    out = out or Path("runs") / f"inspect-{subject.name}"
    new = not out.exists()
    make_folder(out)
    try:
        findings = inspect(subject, material, earlier=before[0] if before else None, ablations=ablations, quiet=quiet)
    except UserError:
        if new:
            out.rmdir()
        raise
    page = out / "inspect.html"
    write(out / "inspect.json", json.dumps(findings, indent=1) + "\n")
    write(page, render(findings, material.images, material.patch))
    return findings, page


def _roles(args: argparse.Namespace) -> int:
    from ..hf.checkpoints.folders import local_folder
    from ..hf.checkpoints.loading import modules_of
    from ..training.roles import table, train_only

    model = modules_of(local_folder(args.model))
    if args.train:
        train_only(model, args.train)
    print(table(model))
    return 0


def _reader(path: str) -> Callable[..., PreTrainedModel]:
    """What loads a model: the recipe of its run, or `load_folder` for a model of none."""
    from ..hf.checkpoints.folders import local_folder
    from ..hf.checkpoints.loading import load_folder

    run = local_folder(path).parent
    if not (run / "recipe.json").is_file():
        return load_folder
    from ..recipes.run import recipe_of

    return recipe_of(run).load


def _held_out(subject: Inspected, tokens: int) -> Material | None:
    """What the run of a model held out, if no built-in text serves: images, sounds, pairs, or routers by labels."""
    from ..moe import moe_layers

    run = subject.folder.parent
    labels = {"task", "domain", "language", "modality"}
    told = any(labels & set(layer.decider.required) for layer in moe_layers(subject.model).values())
    told = told or subject.model.main_input_name in ("pixel_values", "input_features")
    told = told or bool(getattr(subject.model.config, "is_encoder_decoder", False))
    if not (run / "recipe.json").is_file() or not told:
        return None
    from ..recipes.run import configuration_of

    recipe, config = configuration_of(run)
    return recipe.material(subject.model, recipe.prepare(config), tokens)
