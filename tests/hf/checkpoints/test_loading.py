"""from_pretrained: damaged folders give one line, and no code is run; what no file holds is as in a new model."""

import shutil

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import shunter
from shunter import durable
from shunter.hf.checkpoints.loading import load_folder
from tests.hf.checkpoints.damage import DAMAGE, OTHER, SPARSE


@pytest.mark.parametrize("damage", [name for name in DAMAGE | SPARSE | OTHER if name != "NaN"])
def test_from_pretrained_says_it_too(damage, whole, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asked whether to run code"))
    folder = tmp_path / "sparse"
    shutil.copytree(whole["sparse"], folder)
    (DAMAGE | SPARSE | OTHER)[damage](folder, tmp_path / "marker")
    with pytest.raises(ValueError) as caught:
        shunter.from_pretrained(str(folder))
    assert str(folder) in str(caught.value) and len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("load", [load_folder, lambda folder: shunter.from_pretrained(str(folder))])
def test_each_file_of_a_sealed_folder_is_compared_once(load, whole, tmp_path, monkeypatch):
    shutil.copytree(whole["sparse"], tmp_path / "sealed")
    durable.seal(tmp_path / "sealed")
    read, inner = [], durable._entry

    def entry(file, *, sync):
        read.append(file.name)
        return inner(file, sync=sync)

    monkeypatch.setattr(durable, "_entry", entry)
    load(tmp_path / "sealed")
    assert sorted(read) == sorted({*read}) and "model.safetensors" in read


def test_buffers_that_no_file_holds_come_back_as_in_a_new_router(tmp_path, monkeypatch):
    """transformers gives them memory as it happens to be: here it is full of ones."""
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    batch = torch.randint(50, (2, 6))
    seen = []
    for name in shunter.routers.names():
        options = shunter.routers.find(name).example_options
        new = shunter.routers.create(name, 16, 8, **options)
        if not any(new._buffers[buffer] is not None for buffer in new._non_persistent_buffers_set):
            continue
        seen.append(name)
        model = shunter.sparsify(LlamaForCausalLM(config), 8, name, allow_leak=True, **options).eval()
        model.save_pretrained(tmp_path / name)
        state = torch.get_rng_state()
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty_like", torch.ones_like)
            loaded = shunter.from_pretrained(str(tmp_path / name))
        assert torch.equal(torch.get_rng_state(), state), "loading draws nothing"
        router = loaded.model.layers[0].mlp.router
        for key, value in new.named_buffers():
            assert torch.equal(router.get_buffer(key), value), f"{name}: {key}"
        if not new.needs:
            assert torch.equal(loaded(batch).logits, model(batch).logits), name
    assert {"dselect_k", "dense_to_sparse", "null_experts", "deepseek", "soft"} <= set(seen)
