"""The dense model of a task, domain or language is the sparse one's function for it, loaded by plain transformers."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from shunter import from_pretrained, sparsify, tell
from shunter.errors import UserError
from shunter.hf.checkpoints import extracting
from shunter.hf.checkpoints.extracting import extract
from tests.hf.families import build
from tests.training.test_pruning import save, wake

WAYS = [
    ("mistral", "task", {"num_tasks": 3, "top_k": 2}),
    ("mistral", "task", {"num_tasks": 3, "top_k": 2, "renormalize": "no"}),
    ("gpt2", "task", {"num_tasks": 3, "top_k": 3}),
    ("mistral", "domain", {}),
    ("llama", "language", {"experts": [0, 1, 1]}),
]


@pytest.mark.parametrize("family, kind, options", WAYS)
@pytest.mark.parametrize("shape", [{}, {"hidden": 7, "num_shared_experts": 1}, {"layers": [1]}])
def test_the_dense_model_of_one_is_the_sparse_one_for_it(family, kind, options, shape, tmp_path):
    dense = build(family, n_layer=2, n_embd=32, n_head=4) if family == "gpt2" else build(family)
    sparse = wake(sparsify(dense, 4, kind, **shape, **options)).eval()
    ids = torch.randint(64, (2, 9))
    folder = save(sparse, tmp_path / "sparse")
    for number in (0, 2):
        receipt = extract(folder, tmp_path / str(number), kind, number)
        alone = AutoModelForCausalLM.from_pretrained(tmp_path / str(number)).eval()
        assert type(alone) is type(dense) and not hasattr(alone.config, "shunter")
        with torch.no_grad(), tell(sparse, **{kind: torch.tensor(number)}):
            expected = sparse(input_ids=ids).logits
            torch.testing.assert_close(alone(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
        assert receipt["parameters"]["after"] < receipt["parameters"]["before"] or shape


def test_other_models_are_one_line(tmp_path, monkeypatch):
    folder = save(sparsify(build("mistral"), 4, "task", num_tasks=2), tmp_path / "task")
    with pytest.raises(UserError, match="no task 2"):
        extract(folder, tmp_path / "new", "task", 2)
    with pytest.raises(UserError, match="routes by Task, not by domain"):
        extract(folder, tmp_path / "new", "domain", 0)
    with pytest.raises(UserError, match="not a model that shunter.sparsify made"):
        extract(save(build("mixtral"), tmp_path / "mixtral"), tmp_path / "new", "task", 0)
    assert not (tmp_path / "new").exists() and from_pretrained(str(folder))
    with monkeypatch.context() as patch, pytest.raises(UserError, match="task exists already"):
        patch.setattr(extracting, "load_folder", lambda *given: pytest.fail("the work has begun"))
        extract(folder, folder, "task", 0)
