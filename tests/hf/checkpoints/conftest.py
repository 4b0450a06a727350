"""Folders of models: dense ones to be upcycled, and sound ones to be damaged."""

import pytest
import torch

import shunter
from tests.hf.checkpoints.models import BUILD, lively, save_tokenizer
from tests.hf.families import build


@pytest.fixture
def dense(tmp_path):
    """(name, …) -> the folder of a lively dense model, and the model."""

    def make(name="llama", folder="dense", dtype=torch.float32, **options):
        model = lively(name, **options.pop("config", {})).to(dtype)
        model.save_pretrained(tmp_path / folder, **options)
        return tmp_path / folder, model

    return make


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """kind -> a sound folder: dense, sparse (Shunter's format), native."""
    root = tmp_path_factory.mktemp("whole")
    models = {
        "dense": BUILD["llama"](),
        "sparse": shunter.sparsify(BUILD["llama"](), 4, "topk"),
        "native": build("mixtral"),
    }
    for kind, model in models.items():
        model.save_pretrained(root / kind)
        save_tokenizer(root / kind)
    return {kind: root / kind for kind in models}
