"""Pruned models: what stays is bit for bit what it was, unused experts leave no trace, and the choice is right."""

import json
import os
from types import SimpleNamespace

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from shunter import from_pretrained, moe_layers, sparsify
from shunter.analysis.inspect.material import Batch, Material
from shunter.errors import NotWritten, UserError
from shunter.hf.checkpoints.folders import local_folder
from shunter.hf.observe.taps import taps
from shunter.training import pruning
from shunter.training.pruning import Doing, choose, look, merge, prune
from tests.hf.families import build

VOCAB = 64


def material(batches=4, rows=3, length=9):
    found = []
    for _ in range(batches):
        ids = torch.randint(VOCAB, (rows, length))
        targets = torch.cat([ids[:, 1:], torch.full((rows, 1), -100)], 1)
        found.append(Batch({"input_ids": ids}, targets))
    tokens = batches * rows * length
    return Material(found, {}, torch.zeros(tokens, dtype=torch.int64), [], tokens, length)


def wake(model):
    """Parameters at the scale of a trained model's, so that experts differ and tokens choose."""
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(std=p.shape[-1] ** -0.5)
    return model


def save(model, folder):
    model.save_pretrained(folder)
    return folder


def load(folder, ours=False):
    return from_pretrained(str(folder)) if ours else AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize(
    "family", ["qwen3_moe", "mixtral", "gpt_oss", "granitemoe", "qwen2_moe", "gemma4_text", "jetmoe", "dbrx"]
)
@pytest.mark.parametrize("method", ["random", "use"])
def test_what_stays_is_what_was(family, method, tmp_path):
    old = wake(build(family))
    receipt = prune(save(old, tmp_path / "old"), tmp_path / "new", 5, method, material=material())
    new = load(tmp_path / "new")
    assert type(new) is type(old)
    assert {name: tap.num_weights for name, tap in taps(new).items()} == dict.fromkeys(taps(old), 5)
    state = old.state_dict()
    for name, tensor in new.state_dict().items():
        before = state[name]
        if before.shape != tensor.shape:
            layer = max((n for n in receipt["layers"] if name.startswith(f"{n}.")), key=len)
            kept = torch.tensor([of[0] for of in receipt["layers"][layer]["of"]])
            axis = next(i for i, n in enumerate(before.shape) if n != tensor.shape[i])
            rows = before.shape[axis] // 8  # DBRX has the rows of its experts below each other
            kept = torch.cat([torch.arange(rows) + rows * e for e in kept])
            before = before.index_select(axis, kept)
        assert torch.equal(before, tensor), name
    assert receipt["check"]["loss_after"] != receipt["check"]["loss_before"] > 0
    assert json.loads((tmp_path / "new" / "receipt.json").read_text())["layers"] == receipt["layers"]


CONVENTIONS = {"after": {"score_after": True, "renormalize": "no"}, "before": {}, "raw": {"renormalize": "no"}}


@pytest.mark.parametrize(
    "kind, convention", [("theirs", "before"), ("theirs", "raw"), *(("ours", c) for c in CONVENTIONS)]
)
def test_an_expert_without_use_leaves_a_trace_in_shares_of_a_softmax_alone(kind, convention, tmp_path):
    # The reference, 3.10: under weights of the chosen alone nothing changes; shares of all grow by what it had.
    if kind == "theirs":
        model = build("qwen3_moe", num_hidden_layers=1, norm_topk_prob=convention == "before")
    else:
        dense = build("mistral", num_hidden_layers=1)
        model = sparsify(dense, 8, "topk", top_k=2, backend="reference", **CONVENTIONS[convention]).eval()
    wake(model).set_experts_implementation("eager") if kind == "theirs" else wake(model)
    batch = material(batches=2, rows=1)
    (name, tap), *_ = taps(model).items()
    rows = []
    handle = tap.layer.register_forward_pre_hook(lambda module, args: rows.append(args[0].detach().reshape(-1, 32)))
    with torch.no_grad():
        for each in batch.batches:
            model(**each.inputs)
        handle.remove()
        x = torch.cat(rows)  # fewer rows than numbers in one: the last expert's logits can be any
        logits = x @ tap.router.weight.T
        wanted = logits[:, :-1].topk(2).values[:, 1] - 0.5
        tap.router.weight[-1] = torch.linalg.lstsq(x.double(), wanted.double()[:, None]).solution[:, 0]
        logits[:, -1] = wanted
        share = logits.softmax(-1)[:, -1:]
        before = tap.layer(x[None])
    receipt = prune(save(model, tmp_path / "old"), tmp_path / "new", 7, "use", material=batch)
    assert receipt["layers"][name]["left_out"] == [7] and share.min() > 0
    new = load(tmp_path / "new", kind == "ours")
    new.set_experts_implementation("eager") if kind == "theirs" else None
    layer = new.get_submodule(name)
    with torch.no_grad():
        after = layer(x[None])
    if convention == "after":  # bit for bit, from the same scores
        old, pruned = tap.router.assign(logits), layer.router.assign(logits[:, :-1])
        assert torch.equal(old.weight, pruned.weight) and torch.equal(old.expert, pruned.expert)
    factor = 1 / (1 - share) if convention == "raw" else 1
    torch.testing.assert_close(after, before * factor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["qwen3_moe", "dbrx", "ours"])
def test_use_and_what_experts_add_are_counted_right(kind):
    model = wake(sparsify(build("mistral"), 8, "topk", top_k=2) if kind == "ours" else build(kind))
    model.eval()
    batches = material().batches
    counts, sums = {}, {}
    for name, tap in taps(model).items():
        experts = tap.experts if tap.own is None else tap.own.experts
        if kind == "dbrx":
            stacks = [getattr(experts.mlp, part).detach().double() for part in ("w1", "v1", "w2")]
            w1, v1, w2 = (stack.unflatten(0, (8, -1)) for stack in stacks)
            w_up, w_down = torch.cat([w1, v1], 1), w2.mT
        else:
            w_up, w_down = experts.gate_up_proj.detach().double(), experts.down_proj.detach().double()
        counts[name], sums[name] = torch.zeros(8), torch.zeros(8).double()

        def note(module, args, name=name, w_up=w_up, w_down=w_down, own=tap.own):
            if own is None:
                x, index, weight = args
                x = x.reshape(-1, x.shape[-1])
                pairs = [(t, int(e), float(weight[t, k])) for t, row in enumerate(index) for k, e in enumerate(row)]
            else:
                x, routing = args
                pairs = list(zip(routing.token.tolist(), routing.expert.tolist(), routing.weight.tolist(), strict=True))
            for t, e, w in pairs:
                gate, up = (w_up[e] @ x[t].detach().double()).chunk(2)
                out = w_down[e] @ (gate * gate.sigmoid() * up)
                counts[name][e] += 1
                sums[name][e] += w * out.norm()

        experts.register_forward_pre_hook(note)
    found = look(model, batches, "reap")
    for name, doing in found.items():
        assert doing.count.tolist() == counts[name].tolist()
        torch.testing.assert_close(doing.added, sums[name], rtol=1e-4, atol=1e-6)


def test_similar_experts_are_merged_into_their_mean(tmp_path):
    model = wake(sparsify(build("mistral"), 4, "topk", top_k=2))
    with torch.no_grad():
        for layer in moe_layers(model).values():
            for parameter in (layer.experts.gate_up_proj, layer.experts.down_proj):
                parameter[3] = parameter[1] * (1 + 1e-3 * torch.randn_like(parameter[1]))
    batch = material()
    receipt = prune(save(model, tmp_path / "old"), tmp_path / "new", 3, "merge", material=batch)
    assert all(layer["of"] == [[0], [1, 3], [2]] for layer in receipt["layers"].values())
    counts = look(model.eval(), batch.batches[::2], "use")
    new = load(tmp_path / "new", ours=True)
    for (name, old), layer in zip(moe_layers(model).items(), moe_layers(new).values(), strict=True):
        share = counts[name].count[[1, 3]] / counts[name].count[[1, 3]].sum()
        for ours, theirs in (
            (layer.experts.down_proj, old.experts.down_proj),
            (layer.router.weight, old.router.weight),
        ):
            mean = share[0] * theirs[1].double() + share[1] * theirs[3].double()
            torch.testing.assert_close(ours[1].double(), mean, rtol=1e-5, atol=1e-7)
            assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[2], theirs[2])


def test_clusters_are_those_of_scipy():
    from scipy.cluster.hierarchy import fcluster, linkage

    points = torch.randn(9, 4, dtype=torch.float64)
    for keep in (2, 4, 8):
        expected = fcluster(linkage(points.numpy(), "average"), keep, "maxclust")
        mix = merge(points, torch.ones(9), keep)
        ours = mix.argmax(0)
        assert all((ours[i] == ours[j]) == (expected[i] == expected[j]) for i in range(9) for j in range(9))
        torch.testing.assert_close(mix.sum(1), torch.ones(keep, dtype=torch.float64))


def test_equal_experts_are_merged_in_order_however_many_there_are():
    size = 40  # so many that distances would be taken from products
    outputs = 100 * torch.randn(size, 6, dtype=torch.float64)
    outputs[[20, 30, 39]] = outputs[[3, 3, 7]]
    groups = [row.nonzero().flatten().tolist() for row in merge(outputs, torch.ones(size), size - 3)]
    assert [group for group in groups if len(group) > 1] == [[3, 20, 30], [7, 39]]
    pairs = outputs[torch.arange(size) // 2]
    assert merge(pairs, torch.ones(size), size - 1)[0].nonzero().flatten().tolist() == [0, 1]


def test_ties_stay_by_the_lower_number_and_groups_keep_as_many_each():
    tap = next(iter(taps(build("deepseek_v3")).values()))
    count = torch.tensor([0, 5, 5, 5, 9, 9, 9, 1]).double()
    kept = choose(Doing(count, count), tap, 4, 1, "use", 0).argmax(1).tolist()
    assert kept == [1, 4, 5, 6]
    kept = choose(Doing(count, count), tap, 4, 2, "use", 0).argmax(1).tolist()
    assert kept == [1, 2, 4, 5]


@pytest.mark.parametrize(
    "family, keep, message",
    [
        ("qwen3_moe", 1, "a token takes 2 experts"),
        ("qwen3_moe", 8, "it must be from 1 to 7"),
        ("qwen3_moe", 0, "it must be from 1 to 7"),
        ("jamba", 1, "a token takes 2 experts"),  # which its block knows, and not its router
        ("dbrx", 1, "a token takes 2 experts"),
        ("deepseek_v3", 5, "in 2 equal groups; keep a multiple of 2"),
        ("deepseek_v3", 2, "keep at least 4"),
        ("deepseek_v3 topk_group=2", 2, "ranks its groups of experts by the best two of each; keep at least 4"),
        ("glm4_moe n_group=1 num_experts_per_tok=1", 1, "ranks its group of experts .*; keep at least 2"),
    ],
)
def test_what_cannot_be_pruned_so_is_one_line(family, keep, message, tmp_path):
    family, *changes = family.split()
    options = {name: int(value) for name, value in (change.split("=") for change in changes)}
    folder = save(build(family, **options), tmp_path / "old")
    with pytest.raises(UserError, match=message) as raised:
        prune(folder, tmp_path / "new", keep, "use", material=material())
    assert "\n" not in str(raised.value) and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "router, why",
    [
        ("prototypes", "has a router"),
        ("hash", "its rule is fixed for as many as there are"),
        ("hme", "leaves of a tree"),
        ("dselect_k", "its experts go from 8 to 4"),
    ],
)
def test_routers_that_cannot_lose_experts_say_why(router, why, tmp_path):
    model = sparsify(build("mistral"), 8, router, allow_leak=True)
    with pytest.raises(UserError, match=why):
        prune(save(model, tmp_path / "old"), tmp_path / "new", 4, "use", material=material())


def test_weights_on_disk_give_the_same_model(tmp_path):
    batch = material()
    save(wake(build("qwen2_moe")), tmp_path / "old")
    new = tmp_path / "new"  # which is not there yet
    for name, offload in (("b", True), ("a", False)):
        prune(tmp_path / "old", new / name, 4, "reap", material=batch, offload=offload, check=False)
    whole, parts = (json.loads((new / name / "receipt.json").read_text()) for name in "ab")
    assert whole["layers"] == parts["layers"]
    assert (new / "a" / "model.safetensors").read_bytes() == (new / "b" / "model.safetensors").read_bytes()
    assert sorted(path.name for path in new.iterdir()) == ["a", "b"]


@pytest.mark.parametrize("offload", [False, True])
def test_a_place_that_cannot_be_is_told_before_the_work(offload, tmp_path, monkeypatch):
    save(build("mixtral"), tmp_path / "old")
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(pruning, "look", lambda *given: pytest.fail("the work has begun"))
    with pytest.raises(NotWritten, match="file"):
        prune(tmp_path / "old", tmp_path / "file" / "new", 4, material=material(), offload=offload)
    assert (tmp_path / "file").read_text() == "mine" and sorted(os.listdir(tmp_path)) == ["file", "old"]


def test_a_run_is_pruned_by_its_sparse_model_and_larger_than_memory_from_disk(tmp_path, monkeypatch):
    save(wake(build("qwen2_moe")), tmp_path / "run" / "sparse")
    (tmp_path / "run" / "other.json").write_text("{}")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000, total=1000))
    receipt = prune(tmp_path / "run", tmp_path / "new", 4, "use", material=material(), check=False)
    assert receipt["options"]["offload"] and local_folder(tmp_path / "run") == tmp_path / "run" / "sparse"
    assert next(iter(taps(AutoModelForCausalLM.from_pretrained(tmp_path / "new")).values())).num_weights == 4
