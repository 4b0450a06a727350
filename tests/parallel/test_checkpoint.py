"""What some processes save, others load: any number of them, whole models, and plain folders of Hugging Face."""

import hashlib
import json
import os
import shutil
import warnings

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import shunter
from shunter import parallel
from shunter.errors import UserError
from tests.conftest import SEED
from tests.helpers import on_ranks
from tests.parallel.models import DIM, Model, loss_of, whole

NAMES = ("topk", "deepseek", "dense_to_sparse")


def _model(experts, mesh):
    torch.manual_seed(SEED)
    model = Model(NAMES, torch.float32, experts=experts).train()
    if mesh is not None:
        parallel.shard_model(model, mesh)
    return model, torch.optim.AdamW(parallel.parameter_groups(model), lr=1e-2)


def _hashes(model, optimizer):
    """Of every expert's matrices and moments, of every other tensor and number, by name."""
    found = {}

    def note(name, value):
        rows = value if name.count("experts.") and value.dim() else value[None]
        for i, row in enumerate(rows):
            found[f"{name}[{i}]"] = hashlib.sha256(row.contiguous().numpy().tobytes()).hexdigest()

    for name, value in model.state_dict().items():
        note(name, whole(value.detach()))
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            note(f"{key} of {name}", whole(value))
    return found


def _trained(experts, mesh, rank):
    model, optimizer = _model(experts, mesh)
    for step in range(2):
        torch.manual_seed(SEED + 10 * rank + step)
        loss_of(model, torch.randn(2, 6, DIM)).backward()
        optimizer.step()
        optimizer.zero_grad()
        shunter.update_routers(model)
    return model, optimizer


def _save(rank, seed, expert_parallel, folder, experts):
    warnings.simplefilter("ignore")
    mesh = parallel.mesh(expert_parallel=expert_parallel)
    model, optimizer = _trained(experts, mesh, rank)
    parallel.save(model, optimizer, folder)
    return _hashes(model, optimizer)


def _load(rank, seed, expert_parallel, folder, experts):
    warnings.simplefilter("ignore")
    mesh = parallel.mesh(expert_parallel=expert_parallel)
    model, optimizer = _model(experts, mesh)
    parallel.load(model, optimizer, folder)
    return _hashes(model, optimizer)


def _llama():
    torch.manual_seed(SEED)
    shape = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24, "vocab_size": 50}
    dense = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", num_attention_heads=2, **shape))
    return shunter.sparsify(dense, 4, "topk", top_k=2).eval()


def folders(rank, seed, path):
    """Saved and loaded at 2 ranks and at 1 of 2; a sparse Llama to a plain folder; what goes wrong."""
    warnings.simplefilter("ignore")
    hashes = {"saved": _save(rank, seed, 2, path / "two", 6)}
    hashes["other layout"] = _load(rank, seed, 1, path / "two", 6)
    mesh = parallel.mesh(expert_parallel=2)
    llama = parallel.shard_model(_llama(), mesh)
    parallel.save_pretrained(llama, path / "llama")
    again = parallel.shard_model(shunter.from_pretrained(path / "llama").eval(), mesh)
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        logits = llama(input_ids=ids).logits
        equal = torch.equal(again(input_ids=ids).logits, logits)
    said = {}
    for case, call in {
        "exists": lambda: parallel.save(llama, None, path / "two"),
        "another model": lambda: parallel.load(_model(4, mesh)[0], None, path / "two"),
        "not there": lambda: parallel.load(llama, None, path / "nothing"),
    }.items():
        try:
            call()
        except UserError as error:
            said[case] = str(error)
    return hashes, equal, logits.tolist(), said


def any_number_of_processes_loads_the_same_bits(path, results):
    expected = results[0][0]["saved"]
    assert len(expected) > 200
    for hashes, *_ in results:
        assert all(found == expected for found in hashes.values())
    model, optimizer = _model(6, None)
    parallel.load(model, optimizer, path / "two")
    assert _hashes(model, optimizer) == expected


def plain_folders_are_hugging_faces(path, results):
    model = shunter.from_pretrained(path / "llama").eval()
    logits = model(input_ids=torch.arange(12).reshape(2, 6)).logits
    for _, equal, found, _ in results:
        assert equal
        assert torch.allclose(torch.tensor(found), logits, atol=1e-5)


def mistakes_are_named_on_every_rank(path, results):
    for *_, said in results:
        assert "exists already" in said["exists"]
        assert "has shape (6, 8), and this model's (4, 8)" in said["another model"]
        assert "has no shunter-manifest.json" in said["not there"]


def damage_is_named(path, results):
    folder = path / "copy"
    shutil.copytree(path / "two", folder)
    missing = sorted((folder / "model").glob("*.safetensors"))[0]
    missing.unlink()
    model, optimizer = _model(6, None)
    with pytest.raises(UserError, match=missing.name):
        parallel.load(model, optimizer, folder)
    shutil.copytree(path / "two", folder, dirs_exist_ok=True)
    (folder / "optimizer" / "scalars.json").write_text(json.dumps({}))
    with pytest.raises(UserError, match="scalars.json"):
        parallel.load(model, optimizer, folder)


CHECKS = (
    any_number_of_processes_loads_the_same_bits, plain_folders_are_hugging_faces, mistakes_are_named_on_every_rank,
    damage_is_named,
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("saved", [(4, 2), (2, 2)])
@pytest.mark.parametrize("experts", [8, 6])
def test_every_layout_loads_every_other(tmp_path, saved, experts):
    os.environ["SHUNTER_SEED"] = str(SEED)
    size, expert_parallel = saved
    expected = on_ranks(_save, size, SEED, expert_parallel, tmp_path / "saved", experts, start="spawn")[0]
    for size, expert_parallel in [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), *([(4, 4)] if experts % 4 == 0 else [])]:
        for found in on_ranks(_load, size, SEED, expert_parallel, tmp_path / "saved", experts, start="spawn"):
            assert found == expected, (size, expert_parallel)
