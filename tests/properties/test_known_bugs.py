"""Bugs that sparse-expert software is known to have had, each as the property that it broke."""

import copy

import pytest
import tools.families
import torch
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import shunter
from shunter import MoE, Routing, update_routers
from shunter.experts import Weights
from shunter.experts.choice import get
from shunter.hf.checkpoints.extracting import extract
from shunter.hf.observe.listening import listening
from shunter.routers.registry import create, find
from shunter.training.balance import Balance
from tests.hf.families import VOCAB, build
from tests.hf.test_backend import WAYS, _definition, _fill, _under
from tests.properties.test_ranks import STATEFUL
from tests.training.test_pruning import save, wake

KNOWN = {"task": 2, "domain": 2}


@pytest.mark.parametrize("name", STATEFUL)
def test_padding_moves_no_state_of_a_router(name):
    """As selection biases moved by the load of padding."""
    layer = MoE(6, 5, 4, create(name, 6, 4, **STATEFUL[name])).train()
    twin = copy.deepcopy(layer)
    x, real = torch.randn(40, 6), torch.arange(40) < 25
    known = {key: torch.randint(size, (40,)) for key, size in KNOWN.items() if key in find(name).needs}
    with torch.random.fork_rng():
        layer(x, mask=real, **known)
    twin(x[real], **{key: value[real] for key, value in known.items()})
    for one in (layer, twin):
        update_routers(one)
    for (key, value), other in zip(layer.router.named_buffers(), twin.router.buffers(), strict=True):
        assert torch.allclose(value, other), key


@pytest.mark.parametrize("kind", ["mixtral", "sparsified"])
def test_padding_is_not_in_what_is_observed(kind):
    """The counts of a padded batch are those of its real tokens by themselves, counted from their choices."""
    model = build("mixtral") if kind == "mixtral" else shunter.sparsify(build("llama"), 4, "topk", top_k=2)
    ids, mask = torch.randint(3, VOCAB, (3, 7)), torch.ones(3, 7, dtype=torch.int64)
    mask[0, 4:], mask[2, 1:] = 0, 0
    heard = []
    with torch.no_grad(), listening(model.eval(), lambda name, found: heard.append(found)):
        model(input_ids=ids, attention_mask=mask)
    assert len(heard) == 3, "one for each layer"
    for found in heard:
        by_hand = torch.bincount(found.index[mask.flatten() == 1].flatten(), minlength=found.num_experts)
        assert torch.equal(found.routing.counts, by_hand) and int(by_hand.sum()) == 2 * int(mask.sum())


def test_what_is_told_of_two_micro_batches_is_what_is_told_of_one():
    """Means over tokens are those of the halves together, and a micro-batch that comes twice changes nothing."""
    model = build("mixtral").train()
    ids = torch.randint(3, VOCAB, (4, 6))

    def told(*parts):
        balance = Balance(load_balancing_loss=0.5, z_loss=0.1, bias_update_rate=0.0).attach(model)
        for part in parts:
            model(input_ids=part)
            balance.loss()
        balance.step()
        balance.detach()
        return balance.metrics()

    whole, halves, twice = told(ids), told(ids[:2], ids[2:]), told(ids, ids)
    assert whole == pytest.approx(twice, rel=1e-5)
    of_shares = {key for key in whole if "load_balancing_loss" in key}  # products of the halves' own means
    assert len(of_shares) == 2 and "balance/z_loss_max" in whole
    for key in whole.keys() - of_shares:
        assert whole[key] == pytest.approx(halves[key], rel=1e-5), key


def test_a_layer_without_a_selection_bias_does_not_keep_others_from_theirs():
    biased, plain = (MoE(6, 5, 4, "topk", top_k=2, selection_bias=bias).train() for bias in (True, False))
    model = torch.nn.Sequential(plain, biased, copy.deepcopy(plain), copy.deepcopy(biased))
    model(torch.randn(50, 6))
    update_routers(model)
    for layer in (model[1], model[3]):
        counts = layer.routing.demand.float()
        expected = layer.router.bias_update_rate * (counts.mean() - counts).sign()
        assert torch.equal(layer.router.selection_bias, expected)


@pytest.mark.parametrize("experts", [255, 256, 257, 300, 32767, 32768, 40000, 70000])
def test_numbers_of_experts_that_no_small_integer_holds(experts):
    """As indices kept in 8 or 16 bits."""
    tokens, k = 50, 3
    index = torch.stack([torch.randperm(experts)[:k] for _ in range(tokens)])
    index[0, 0] = experts - 1
    index[0, 1:] = torch.tensor([0, 1])
    weight = torch.rand(tokens, k)
    routing = Routing.from_topk(index, weight, experts)
    triples = sorted((int(e), t, float(w)) for t in range(tokens) for e, w in zip(index[t], weight[t], strict=True))
    found = zip(routing.expert.tolist(), routing.token.tolist(), routing.weight.tolist(), strict=True)
    assert list(found) == triples
    assert int(routing.counts.sum()) == tokens * k and routing.counts.numel() == experts


@pytest.mark.parametrize(
    "name, dimension", [("up", 0), ("up", 1), ("up", 2), ("down", 0), ("down", 1), ("down", 2), ("x", 0), ("x", 1)]
)
def test_offsets_beyond_two_to_the_31_in_the_triton_kernels(name, dimension):
    """One tile of a tensor spread so wide that offsets of 32 bits would wrap; few of its pages are ever touched."""
    triton = get("triton")
    near = {"x": torch.randn(9, 9), "up": torch.randn(9, 18, 9), "down": torch.randn(9, 9, 9)}
    near = {key: value.half() for key, value in near.items()}
    routing = Routing.from_topk(torch.full((9, 1), 8), torch.ones(9, 1), 9)
    if refusal := triton.refuses(near["x"], Weights(near["up"], near["down"])):
        pytest.skip(refusal)
    tensor, apart = near[name], 2**28  # which 32 bits hold, but not eight times
    strides = [apart if i == dimension else stride for i, stride in enumerate(tensor.stride())]
    room = (tensor.shape[dimension] - 1) * apart + tensor.numel()
    far = near | {name: torch.empty(room, dtype=torch.float16).as_strided(tensor.shape, strides).copy_(tensor)}
    with torch.no_grad():
        found = [triton.run(given["x"], Weights(given["up"], given["down"]), routing) for given in (near, far)]
    assert torch.equal(*found)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_random_order_of_capacity_is_the_same_again_under_checkpointing(reentrant):
    layer = MoE(6, 5, 4, "topk", top_k=2, capacity_factor=0.5, capacity_order="random").double().train()
    x = torch.randn(40, 6, dtype=torch.float64)
    gradients = []
    for run in (layer, lambda y: checkpoint(layer, y, use_reentrant=reentrant)):
        given = x.clone().requires_grad_()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            out = run(given)
            kept = layer.routing.dense()
            torch.rand(7)  # somebody else draws before the backward
            out.square().sum().backward()
        gradients.append(given.grad)
        assert torch.equal(layer.routing.dense(), kept)
    assert torch.equal(*gradients)


def _square(kind):
    """A dense model whose feed-forward blocks have square matrices."""
    torch.manual_seed(11)
    if kind == "gpt2":
        none = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_inner=16, n_layer=2, n_head=2, **none))
    else:
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=2, **sizes))
    return wake(model).eval()


@torch.no_grad()
def _logits(model, ids, **told):
    with shunter.tell(model, **told):
        return model.eval()(input_ids=ids).logits


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_square_blocks_become_the_same_experts_and_blocks_again(kind, tmp_path):
    """As shapes that decide whether a matrix is transposed."""
    dense, ids = _square(kind), torch.randint(64, (2, 9))
    expected = _logits(dense, ids)
    close = {"rtol": 1e-4, "atol": 1e-4}
    sparse = shunter.sparsify(copy.deepcopy(dense), 4, "topk", top_k=2, init="copy")
    torch.testing.assert_close(_logits(sparse, ids), expected, **close)
    folder = save(dense, tmp_path / "dense")
    for way in ({"method": "split"}, {"method": "copy", "to": "shunter"}):
        out = tmp_path / "-".join(way.values())
        shunter.upcycle(folder, out, 4, 2, check=False, **way)
        load = shunter.from_pretrained if (kind == "gpt2" or "to" in way) else AutoModelForCausalLM.from_pretrained
        torch.testing.assert_close(_logits(load(str(out)), ids), expected, **close)
    tasks = wake(shunter.sparsify(dense, 3, "task", num_tasks=2))
    save(tasks, tmp_path / "tasks")
    extract(tmp_path / "tasks", tmp_path / "one", "task", 1)
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    torch.testing.assert_close(_logits(alone, ids), _logits(tasks, ids, task=torch.tensor(1)), **close)


@pytest.mark.parametrize("width", [64, 32])
@pytest.mark.parametrize("name", WAYS)
def test_square_experts_of_transformers_compute_their_definition(name, width, monkeypatch):
    """f = d makes down_proj square, 2f = d gate_up_proj."""
    monkeypatch.setattr(
        tools.families,
        "TINY",
        tools.families.TINY | dict.fromkeys(("intermediate_size", "moe_intermediate_size"), width),
    )
    kinds = [kind for kinds in tools.families.experts_classes().values() for kind in kinds]
    module = _fill(tools.families.build(next(kind for kind in kinds if kind.__name__ == name))).double()
    assert 64 in (module.down_proj.shape[1], module.down_proj.shape[2])
    x = torch.randn(40, 64, dtype=torch.float64)
    index, weight = torch.rand(40, module.num_experts).topk(2).indices, torch.rand(40, 2, dtype=torch.float64)
    with torch.no_grad():
        found, expected = (run(module, x, index, weight) for run in (_under("shunter"), _definition))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
