"""Offloaded models against the same ones whole in memory: bits, memory, and what is refused."""

import copy
import os
import pickle
import random
import re
import threading

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import shunter
from shunter import MoE
from shunter.errors import UserError
from shunter.experts import residency
from shunter.hf.checkpoints.loading import load_folder
from shunter.hf.offloading import offload, parse_size

from .families import VOCAB, build


def save(model, folder):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.05)
    model.save_pretrained(folder)
    return folder


def expert_bytes(model):
    """The bytes of one expert, of all experts of a layer, and of all."""
    stacks = [p for p in model.parameters() if p.dim() == 3]
    layers = sum("down_proj" in name for name, p in model.named_parameters() if p.dim() == 3)
    return sum(p[0].nbytes for p in stacks) // layers, sum(p.nbytes for p in stacks) // layers, layers


def asked(model, run):
    """How many different experts the layers of a model compute with in a run, each layer's counted once a forward."""
    total = [0]

    def count(module, args):
        total[0] += int((args[1].unique() < module.num_experts).sum())

    hooks = [m.register_forward_pre_hook(count) for m in model.modules() if "_apply_gate" in dir(m)]
    run(model)
    for hook in hooks:
        hook.remove()
    return total[0]


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "llama4_text"])
@pytest.mark.parametrize("implementation", ["shunter", "eager"])
def test_families_give_the_same_bits(tmp_path, family, implementation):
    folder = save(build(family), tmp_path)
    whole = load_folder(folder)
    one, layer, layers = expert_bytes(whole)

    def implement(model):
        if family != "llama4_text":
            model.set_experts_implementation(implementation)
        elif implementation == "shunter":
            shunter.hf.use_experts(model)
        return model

    implement(whole)
    inputs = [torch.randint(3, VOCAB, (2, 9)), torch.randint(3, VOCAB, (1, 1)), torch.randint(3, VOCAB, (1, 3))]
    with torch.no_grad():
        expected = [whole(ids).logits for ids in inputs]
    some = random.randint(layer, layers * layer)
    for model in (offload(folder, 2 * one), offload(load_folder(folder), some), offload(folder, some)):
        implement(model)
        for ids, logits in zip(inputs, expected, strict=True):
            assert torch.equal(model(ids).logits, logits), some
            assert model.expert_memory.used <= model.expert_memory.memory


def test_every_expert_asked_for_is_a_hit_or_a_miss(tmp_path):
    folder = save(build("qwen3_moe"), tmp_path)
    ids = torch.randint(3, VOCAB, (1, 4))
    model = offload(folder, 3 * 2**20, prefetch=False)

    def twice(model):
        model(ids), model(ids)

    count = asked(model, twice)
    memory = model.expert_memory
    assert memory.hits == memory.misses == count // 2  # all are read once, and found the second time
    one, _, _ = expert_bytes(build("qwen3_moe"))
    assert memory.read_bytes == memory.misses * one


@pytest.mark.parametrize("router", ["topk", "switch", "expert_choice", "soft", "base", "hash"])
def test_sparsified_models_give_the_same_bits(tmp_path, router):
    shape = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 40, "vocab_size": VOCAB}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    dense = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **shape, **heads))
    options = {"allow_leak": True} if router in ("expert_choice", "base") else {}
    model = shunter.sparsify(dense, 6, router, num_shared_experts=1, **options).eval()
    ids = torch.randint(3, VOCAB, (2, 11))
    with torch.no_grad():
        expected = model(ids).logits
    model.save_pretrained(tmp_path)
    one = 3 * 32 * 40 * 4
    memory = 6 * one if router == "soft" else random.randint(2 * one, 14 * one)
    assert torch.equal(offload(tmp_path, memory)(ids).logits, expected)
    assert torch.equal(offload(shunter.from_pretrained(tmp_path), memory)(ids).logits, expected)
    assert torch.equal(offload(model, memory)(ids).logits, expected)  # no folder: spilled


def test_a_layer_alone_and_generation(tmp_path):
    moe = MoE(dim=24, hidden=16, num_experts=8, router="topk", top_k=2, dtype=torch.bfloat16).eval()
    x = torch.randn(5, 24).to(torch.bfloat16)
    with torch.no_grad():
        expected = moe(x)
    assert torch.equal(offload(moe, "6KiB")(x), expected)

    folder = save(build("qwen3_moe"), tmp_path)
    ids = torch.randint(3, VOCAB, (2, 5))
    expected = load_folder(folder).generate(ids, max_new_tokens=8, do_sample=False)
    for prefetch in (True, False):
        model = offload(folder, 50_000, prefetch=prefetch)
        assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), expected)


def test_what_changed_in_memory_since_it_was_loaded_is_what_computes(tmp_path):
    folder = save(build("qwen3_moe"), tmp_path)
    model = load_folder(folder)
    ids = torch.randint(3, VOCAB, (2, 9))
    with torch.no_grad():
        stack = model.model.layers[1].mlp.experts.down_proj
        stack[random.randrange(8), random.randrange(32), random.randrange(16)] += 0.5
        stack.mul_(-1)
        expected = model(ids).logits
    assert torch.equal(offload(model, 10**6)(ids).logits, expected)


def test_inference_mode_and_autocast_in_any_order(tmp_path):
    folder = save(build("qwen3_moe"), tmp_path)
    whole, ids = load_folder(folder), torch.randint(3, VOCAB, (2, 9))
    modes = [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16), torch.enable_grad]
    for memory in (15_000, 60_000):
        model = offload(folder, memory)
        for mode in random.choices(modes, k=6):
            with torch.no_grad(), mode():
                expected = whole(ids).logits
            with mode():
                assert torch.equal(model(ids).logits, expected)


def rss_anon():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def test_memory_stays_within_its_limit(tmp_path):
    config = AutoConfig.for_model(
        "qwen3_moe", vocab_size=VOCAB, hidden_size=256, num_hidden_layers=4, moe_intermediate_size=300,
        num_experts=32, num_experts_per_tok=2, num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)  # 128 experts of 0.9 MiB
    model = offload(tmp_path, "16MiB")
    model(torch.randint(3, VOCAB, (1, 1)))
    before, peak = rss_anon() - model.expert_memory.used, 0
    for _ in range(24):
        model(torch.randint(3, VOCAB, (1, random.randint(1, 9))))
        peak = max(peak, rss_anon() - before)
        assert model.expert_memory.used <= 2**24
    assert model.expert_memory.read_bytes > 2**26  # all experts went through, several times the memory
    assert peak < 2**24 + 2**23  # and what a forward takes besides


def test_two_threads_do_not_take_each_others_experts(tmp_path):
    folder = save(build("qwen3_moe"), tmp_path)
    whole, model = load_folder(folder), offload(folder, 60_000)
    inputs = [torch.randint(3, VOCAB, (1, 3)) for _ in range(2)]
    with torch.no_grad():
        expected = [whole(ids).logits for ids in inputs]
    wrong = []

    def work(ids, logits):
        with torch.no_grad():
            wrong.extend(not torch.equal(model(ids).logits, logits) for _ in range(10))

    threads = [threading.Thread(target=work, args=pair) for pair in zip(inputs, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(wrong) == 20 and not any(wrong)


def test_a_file_that_changes_is_noticed_and_one_that_is_replaced_is_not_read(tmp_path):
    folder = save(build("qwen3_moe"), tmp_path)
    file, ids = folder / "model.safetensors", torch.randint(3, VOCAB, (2, 9))
    with torch.no_grad():
        expected = load_folder(folder)(ids).logits
    model, other = offload(folder, 50_000), offload(folder, 50_000)
    os.rename(file, folder / "old")  # what a new version does
    file.write_bytes(b"nothing")
    assert torch.equal(model(ids).logits, expected)
    file.unlink()
    assert torch.equal(model(ids).logits, expected)

    old = folder / "old"
    size = old.stat().st_size
    with old.open("rb+") as stream:  # in its place
        stream.seek(size - 8)
        stream.write(b"\xff" * 8)
        os.utime(stream.fileno(), ns=(0, 0))
    with pytest.raises(UserError, match="has changed since the model was loaded.*load it again"):
        model(ids)
    os.truncate(old, size // 2)
    with pytest.raises(UserError, match="has changed"):
        other(ids)
    with pytest.raises(UserError, match=re.escape(str(folder))):
        offload(folder, 50_000)


def test_what_cannot_be_is_refused_in_a_line(tmp_path):
    folder = save(build("qwen3_moe"), tmp_path)
    one = 3 * 32 * 16 * 4
    said = (
        f"holds 1 experts of model.layers.0.mlp.experts, {one:,} bytes each; a token takes 2: give at least {2 * one:,}"
    )
    for model in (folder, load_folder(folder)):
        with pytest.raises(UserError, match=re.escape(said)):
            offload(model, 2 * one - 1)
    with pytest.raises(UserError, match="no such folder"):
        offload(tmp_path / "missing", "1GB")
    with pytest.raises(UserError, match="no experts in stacks"):
        offload(torch.nn.Linear(2, 2), "1GB")
    with pytest.raises(UserError, match="stores .* in torch.float32, and the model is loaded in torch.bfloat16"):
        offload(folder, "1GB", dtype=torch.bfloat16)

    model, ids = offload(folder, "1GB"), torch.randint(3, VOCAB, (1, 4))
    with pytest.raises(UserError, match="offloaded already"):
        offload(model, "1GB")
    with pytest.raises(UserError, match="for inference.*train without offload"):
        model.train()(ids)
    model.eval()
    model.get_input_embeddings().weight.requires_grad_()
    with pytest.raises(UserError, match="for inference"):
        model(ids)
    for lose in (lambda: model.state_dict(), lambda: copy.deepcopy(model), lambda: pickle.dumps(model)):
        with pytest.raises(UserError, match="offload"):
            lose()
    with pytest.raises(UserError, match="in a file"):
        model.save_pretrained(tmp_path / "copy")
    with pytest.raises(UserError, match="load the model before it is offloaded"):
        model.load_state_dict(load_folder(folder).state_dict())
    with pytest.raises(UserError, match="stay in torch.float32 on the CPU"):
        model.to(torch.bfloat16)
    assert model.to("cpu", torch.float32) is model


@pytest.mark.parametrize(
    "text, size",
    [("8GiB", 8 * 2**30), ("1.5 GB", 15 * 10**8), ("800mib", 800 * 2**20), ("12", 12), (7, 7), ("2kB", 2000)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "8 gigs", "-1", "GiB", 0, -5, True, 1.5, None, "0.1", "nan"])
def test_what_is_no_size(text):
    with pytest.raises(UserError, match="memory"):
        parse_size(text)


def test_without_room_for_temporary_files_it_says_so(tmp_path, monkeypatch):
    model = MoE(dim=8, hidden=8, num_experts=4, router="topk", top_k=2).eval()
    monkeypatch.setattr(residency.tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(OSError, match="missing"):
        offload(model, "1MB")
