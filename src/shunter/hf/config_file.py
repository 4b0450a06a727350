"""The config.json of a sparse model: named so that nothing loads the folder as the dense model that it was made of.

In transformers a sparse model keeps the class and the configuration of its dense form. On disk its model_type is its
own: what does not know it refuses the folder. The dense classes themselves do not look at that; they are told that the
weights are elsewhere, in words.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

__all__ = ["MODEL_TYPE", "as_dense", "name_as_sparse"]

MODEL_TYPE = "shunter"
_DENSE = "shunter_dense"
_WEIGHTS = "transformers_weights"
_REFUSAL = "none, as the feed-forward blocks are Shunter's sparse experts; import shunter.hf and load by an Auto class"


def name_as_sparse(folder: Path) -> None:
    """Give the config.json in a folder, as transformers wrote it, the model_type of sparse models, and the refusal."""
    file = folder / "config.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    if values["model_type"] != MODEL_TYPE:
        values |= {_DENSE: values["model_type"], "model_type": MODEL_TYPE, _WEIGHTS: _REFUSAL}
        new = file.with_suffix(".json.partial")
        new.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        os.replace(new, file)


def as_dense(values: dict[str, Any]) -> dict[str, Any]:
    """The contents of a config.json with the model_type of the dense form, and without the refusal."""
    kept = {name: value for name, value in values.items() if (name, value) != (_WEIGHTS, _REFUSAL)}
    if kept.get("model_type") == MODEL_TYPE:
        kept["model_type"] = kept.pop(_DENSE, None)
    return kept
