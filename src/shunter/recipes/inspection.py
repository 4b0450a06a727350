"""What `shunter inspect` does: read the models and the data, measure, write the page and the numbers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..analysis.inspect.inspecting import Inspected, inspect, load
from ..analysis.inspect.material import Document, Material, image_material, text_material
from ..analysis.pages.inspect_page import render
from ..data.documents import built_in_domains, read_domains
from ..errors import UserError
from .sections import DataConfig

__all__ = ["inspect_models"]


MAX_BYTES = DataConfig().max_bytes


def inspect_models(
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
        UserError: for models that cannot be inspected, or shown these data.
        DataError: for data that cannot be read.
    """
    if len(models) > 2:
        raise UserError(f"{len(models)} models are given; give one, or two checkpoints of one to compare")
    for name, value, least in (("--tokens", tokens, 2), ("--length", length, 4), ("--ablate", ablations, 0)):
        if value < least:
            raise UserError(f"{name} {value} must be at least {least}")
    *before, subject = [load(path) for path in models]
    material = _material(subject, data, tokens, length)
    findings = inspect(subject, material, earlier=before[0] if before else None, ablations=ablations, quiet=quiet)
    out = out or Path("runs") / f"inspect-{subject.name}"
    out.mkdir(parents=True, exist_ok=True)
    (out / "inspect.json").write_text(json.dumps(findings, indent=1) + "\n", encoding="utf-8")
    page = out / "inspect.html"
    page.write_text(render(findings, material.images, material.patch), encoding="utf-8")
    return findings, page


def _material(subject: Inspected, data: Sequence[str] | None, tokens: int, length: int) -> Material:
    if subject.model.main_input_name == "pixel_values":
        if data is None:
            raise UserError("this model sees images, and none are built in; give --data with a folder of images")
        return image_material(subject.model, subject.folder, data, tokens=tokens)
    domains = built_in_domains(MAX_BYTES) if data is None else read_domains(data, MAX_BYTES)
    documents = [
        Document(text, domain.name, language)
        for domain in domains
        for text, language in zip(domain.documents, domain.languages or [None] * len(domain.documents), strict=True)
    ]
    return text_material(subject.model, subject.tokenizer(), documents, tokens=tokens, length=length)
