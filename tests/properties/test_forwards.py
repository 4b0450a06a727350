"""What one forward knows and decides is its own: other forwards, threads, towers and steps see nothing of it."""

import contextlib
import copy
import gc
import itertools
import re
import threading
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor

import accelerate
import pytest
import torch
from torch.distributed._composable import checkpoint as composable
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM

import shunter
from shunter import MoE, aux_loss, moe_layers
from shunter.training.balance import Balance
from tests.helpers import TIME_LIMIT


def _llama():
    shape = {"num_hidden_layers": 3, "hidden_size": 16, "intermediate_size": 24, "vocab_size": 50}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", num_attention_heads=2, **shape))


def _batches(count, rows=2, length=6):
    for _ in range(count):
        ids, mask = torch.randint(1, 50, (rows, length)), torch.ones(rows, length, dtype=torch.int64)
        mask[0, int(torch.randint(2, length - 1, ())) :] = 0
        yield {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100), "use_cache": False}


class _Checkpointed(torch.nn.Module):
    """A module that runs another under a checkpoint over what make(module) gives."""

    def __init__(self, inner, make, reentrant):
        super().__init__()
        self.inner, self.make, self.reentrant = inner, make, reentrant

    def forward(self, *args, **kwargs):
        function = self.make(self.inner)
        return checkpoint(lambda *given: function(*given, **kwargs), *args, use_reentrant=self.reentrant)


WRAPPED = {
    "torch's wrapper": lambda reentrant: (
        lambda module: checkpoint_wrapper(
            module, CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT
        )
    ),
    "a function": lambda reentrant: lambda module: _Checkpointed(module, lambda m: m, reentrant),
    "the forward": lambda reentrant: lambda module: _Checkpointed(module, lambda m: m.forward, reentrant),
    "two, nested": lambda reentrant: (
        lambda module: _Checkpointed(_Checkpointed(module, lambda m: m, reentrant), lambda m: m, not reentrant)
    ),
    "torch's hooks": lambda reentrant: None if reentrant else composable,
}


def _checkpointed(model, by, of, reentrant):
    if by == "transformers":
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        return
    wrap = WRAPPED[by](reentrant)
    if wrap is None:
        pytest.skip("knows no reentrant checkpoint")
    for number, block in enumerate(model.model.layers):
        if of == "block":
            model.model.layers[number] = wrap(block)
        else:
            block.mlp = wrap(block.mlp)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(("by", "of"), [("transformers", "block"), *itertools.product(WRAPPED, ["block", "layer"])])
@pytest.mark.parametrize("router", ["hash", "topk", "soft_moe", "random order"])
def test_two_forwards_before_one_backward_under_checkpointing(router, by, of, reentrant):
    """One and the same tensor goes into both; what differs is padding, or with the hash router the ids.

    Reentrant checkpoints add up a dense model's gradients in another order, too.
    """
    options = {"load_balancing_loss": 0, "top_k": 2}
    options = {"topk": options, "random order": {**options, "capacity_factor": 0.7, "capacity_order": "random"}}
    name = "topk" if router == "random order" else router
    model = shunter.sparsify(_llama().double(), 4, name, allow_leak=True, **options.get(router, {})).train()
    model.enable_input_require_grads()
    batches = list(_batches(2))
    words = torch.randn(2, 6, 16, dtype=torch.float64).requires_grad_()
    if router == "hash":
        batches = [{**batch, "attention_mask": torch.ones_like(batch["input_ids"])} for batch in batches]
    else:
        batches = [{**batch, "input_ids": None, "inputs_embeds": words} for batch in batches]

    def gradients(model):
        torch.manual_seed(0)
        sum(model(**batch).loss for batch in batches).backward()
        names = {"_checkpoint_wrapped_module.": "", "inner.": ""}
        return {re.sub("|".join(names), lambda m: names[m[0]], name): p.grad for name, p in model.named_parameters()}

    checkpointed = copy.deepcopy(model)
    expected = gradients(model)
    _checkpointed(checkpointed, by, of, reentrant)
    for name, grad in gradients(checkpointed).items():
        if grad is None or not (reentrant or by == "two, nested"):
            assert grad is expected[name] or torch.equal(grad, expected[name]), name
        else:
            torch.testing.assert_close(grad, expected[name], rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_was_told_in_a_forward_counts_when_it_is_run_again(reentrant):
    """The backward is behind the block, and told otherwise; the region tells a part of its layers more."""
    layer = MoE(8, 16, 4, "task", top_k=2, num_tasks=3, load_balancing_loss=0).double()
    x, gradients = torch.randn(2, 6, 8, dtype=torch.float64), []

    def region(given):
        before = layer(given)
        with shunter.tell(layer, task=torch.tensor([1, 1])):
            return before + layer(given)

    for checkpointed in (False, True):
        given, total = x.clone().requires_grad_(), 0
        for task in ([2, 0], [0, 1]):
            with shunter.tell(layer, task=torch.tensor(task)):
                out = checkpoint(region, given, use_reentrant=reentrant) if checkpointed else region(given)
                total = total + out.square().sum()
        with shunter.tell(layer, task=torch.tensor([1, 2])):
            total.backward()
        gradients.append(given.grad)
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)


class _Foreign(torch.autograd.Function):
    """Checkpointing of somebody else's."""

    @staticmethod
    def forward(ctx, run, x):
        ctx.run = run
        ctx.save_for_backward(x)
        return run(x)

    @staticmethod
    def backward(ctx, grad):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            torch.autograd.backward(ctx.run(x), grad)
        return None, x.grad


@pytest.mark.parametrize("around", ["a layer", "the base", "the whole"])
def test_what_a_batch_says_counts_when_anything_is_run_again(around):
    model = shunter.sparsify(_llama().double(), 4, "task", num_tasks=3, top_k=2, batch={"task": "task_ids"}).train()
    ids = torch.randint(1, 50, (2, 6))
    batches = [{"input_ids": ids, "labels": ids, "task_ids": torch.tensor(tasks)} for tasks in ([2, 0], [0, 1])]

    def gradients(run):
        model.zero_grad()
        sum(run(**batch) for batch in batches).backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    expected = gradients(lambda **batch: model(**batch).loss)
    if around == "the whole":
        found = gradients(lambda **batch: checkpoint(lambda: model(**batch).loss, use_reentrant=False))
    else:
        if around == "the base":
            model.model = _Checkpointed(model.model, lambda m: m, False)
            model.model.config = model.config
        else:
            for layer in moe_layers(model).values():
                layer.router.coefficients = {}
            expected = gradients(lambda **batch: model(**batch).loss)
            for layer in moe_layers(model).values():
                layer.forward = lambda x, run=layer.forward: _Foreign.apply(run, x)
        found = gradients(lambda **batch: model(**batch).loss)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-14)


def test_threads_see_their_own_padding():
    model = shunter.sparsify(_llama(), 4, "topk", top_k=2).eval()
    batches = list(_batches(12))
    expected = [model(**batch).logits.detach() for batch in batches]
    wrong = []

    def run(numbers):
        for _ in range(5):
            for i in numbers:
                if not torch.equal(model(**batches[i]).logits, expected[i]):
                    wrong.append(i)

    with torch.no_grad():
        threads = [threading.Thread(target=run, args=(range(part, 12, 3),)) for part in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(TIME_LIMIT)
    assert not wrong


def test_a_layer_called_by_itself_knows_nothing_of_the_last_batch():
    model = shunter.sparsify(_llama(), 4, "topk", top_k=2)
    batch = next(_batches(1))
    model(**batch)
    layer = next(iter(moe_layers(model).values()))
    layer(torch.randn(2, 6, 16))
    assert layer.routing.token.numel() == 2 * 12


def _aux(layers, xs):
    """The balance losses of these layers on these inputs, each by itself."""
    return sum(sum(layer.losses.values()) for layer, x in zip(layers, xs, strict=True) if layer(x) is not None)


def test_what_was_thrown_away_before_does_not_count():
    layer, x = MoE(6, 8, 4, "topk", top_k=2).train(), torch.randn(5, 6)
    layer(torch.randn(5, 6))
    out = layer(x)
    assert torch.allclose(aux_loss(layer), _aux([copy.deepcopy(layer)], [x])) and out.shape == x.shape


def test_a_layer_that_runs_several_times_counts_each_time():
    layer = MoE(6, 8, 4, "topk", top_k=2).train()
    xs = [torch.randn(5, 6) for _ in range(3)]
    expected = sum(_aux([copy.deepcopy(layer)], [x]) for x in xs)
    out = sum(layer(x).sum() for x in xs)
    assert torch.allclose(aux_loss(layer), expected)
    (out + aux_loss(layer)).backward()
    assert torch.allclose(aux_loss(layer), sum(layer.losses.values())) and not aux_loss(layer).requires_grad


def test_a_layer_that_ran_in_an_earlier_step_only_does_not_count():
    one, two = MoE(6, 8, 4, "topk", top_k=2).train(), MoE(6, 8, 4, "topk", top_k=2).train()
    model = torch.nn.ModuleList([one, two])
    x = torch.randn(7, 6)
    (two(one(x)).sum() + aux_loss(model)).backward()
    out = one(x)
    assert torch.allclose(aux_loss(model), sum(one.losses.values()))
    (out.sum() + aux_loss(model)).backward()


@pytest.mark.parametrize("before", ["thrown away", "without autograd"])
def test_a_layer_that_is_skipped_now_does_not_count(before):
    """As under LayerDrop, behind a step that was given up, or a forward in training that was to train nothing."""
    one, two = MoE(6, 8, 4, "topk", top_k=2).train(), MoE(6, 8, 4, "topk", top_k=2).train()
    model = torch.nn.ModuleList([one, two])
    with torch.set_grad_enabled(before == "thrown away"):
        two(one(torch.randn(7, 6)))
    out = one(torch.randn(5, 6))
    assert torch.equal(aux_loss(model), sum(one.losses.values()))
    (out.sum() + aux_loss(model)).backward()
    assert two.router.weight.grad is None and one.router.weight.grad is not None
    with torch.no_grad():
        one(torch.randn(5, 6))
    with pytest.raises(RuntimeError, match="its forward ran without autograd"):
        aux_loss(one)


def test_a_forward_that_raised_is_neither_counted_nor_kept():
    model = shunter.sparsify(_llama(), 4, "topk", top_k=2).train()
    first, *_, last = moe_layers(model).values()
    seen = []
    first.register_forward_hook(
        lambda layer, args, output: seen.append(weakref.ref(layer.losses["load_balancing_loss"]))
    )

    def fail(layer, args):
        raise ZeroDivisionError

    hook = last.register_forward_pre_hook(fail)
    batch = next(_batches(1))
    with pytest.raises(ZeroDivisionError):
        model(**batch)
    hook.remove()
    gc.collect()
    assert seen[0]() is None and float(aux_loss(model)) == 0 and not shunter.context.present()
    del batch["labels"]
    logits = model(**batch).logits
    assert torch.allclose(aux_loss(model), sum(sum(x.losses.values()) for x in moe_layers(model).values()))
    assert logits.isfinite().all()


@pytest.mark.parametrize("router", ["topk", "switch", "deepseek", "task"])
def test_an_offloaded_model_computes_the_same(router):
    options = {"topk": {"top_k": 2}, "deepseek": {"top_k": 2}, "task": {"top_k": 2, "num_tasks": 3}}.get(router, {})
    model = shunter.sparsify(_llama(), 4, router, **options).eval()
    ids = torch.randint(1, 50, (2, 6))
    with torch.no_grad(), shunter.tell(model, task=torch.tensor([2, 0])):
        expected = model(ids).logits
        offloaded = accelerate.cpu_offload(copy.deepcopy(model), torch.device("cpu"))
        assert {p.device.type for p in offloaded.parameters()} == {"meta"}
    with torch.no_grad(), shunter.tell(offloaded, task=torch.tensor([2, 0])):
        assert torch.equal(offloaded(ids).logits, expected)


@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_a_forward_of_a_hook_inside_a_backward_is_a_forward(checkpointing):
    """As losses with cached gradients run it; what checkpointing runs again inside of it is none."""
    model = shunter.sparsify(_llama(), 4, "topk", top_k=2, load_balancing_loss=0.5).train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    ids = torch.randint(1, 50, (2, 6))
    with torch.no_grad():
        cached = model.model(ids, use_cache=False).last_hidden_state
    cached.requires_grad_()

    def run_again(gradient):
        with torch.enable_grad():
            inputs = model.get_input_embeddings()(ids)
            out = model.model(inputs_embeds=inputs, use_cache=False).last_hidden_state
            torch.autograd.backward(out, gradient)

    cached.register_hook(run_again)
    balance = Balance(load_balancing_loss=0.0).attach(model)
    with shunter.record(model) as seen:
        cached.square().mean().backward()
    balance.step()
    balance.detach()
    assert seen.lengths == [6, 6] and seen.forwards == [2]
    assert all(layer.routing.num_tokens == 12 for layer in moe_layers(model).values())
    assert all(p.grad is not None for layer in moe_layers(model).values() for p in layer.experts.parameters())


@pytest.mark.parametrize("kind", ["sparsified", "family"])
@pytest.mark.parametrize("way", ["the model", "each block"])
def test_a_model_that_was_compiled_before_is_heard(way, kind):
    torch._dynamo.reset()
    if kind == "sparsified":
        model = shunter.sparsify(_llama(), 4, "topk", top_k=2)
    else:
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = AutoConfig.for_model("mixtral", vocab_size=50, num_key_value_heads=2, num_local_experts=4, **sizes)
        model = AutoModelForCausalLM.from_config(config)
    run = torch.compile(model, backend="eager") if way == "the model" else model
    if way == "each block":
        for block in model.model.layers:
            block.compile(backend="eager")
    ids = torch.randint(1, 50, (2, 6))
    with torch.no_grad():
        run(ids, use_cache=False)
        with warnings.catch_warnings(record=True) as said, shunter.record(model) as seen:
            run(ids, use_cache=False)
        assert seen.lengths == [6, 6]
        assert any("compiled before" in str(warning.message) for warning in said) == (way == "each block")
        with shunter.record(model) as again:
            model(ids, use_cache=False)
    assert torch.equal(seen.experts, again.experts)


def test_threads_that_train_have_their_own_losses():
    model = shunter.sparsify(_llama(), 4, "topk", top_k=2, load_balancing_loss=1.0).train()
    batches = list(_batches(4))
    expected = [float(model(**batch).loss) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(6):
            found = list(pool.map(lambda batch: float(model(**batch).loss), batches))
            assert torch.allclose(torch.tensor(found), torch.tensor(expected), atol=1e-5)


def test_a_penalty_on_the_gradient_leaves_the_balance_loss():
    layer = MoE(8, 16, 4, "topk", top_k=2, load_balancing_loss=1.0).double().train()
    x = torch.randn(30, 8, dtype=torch.float64)

    def gradient(early):
        given = x.clone().requires_grad_()
        y = layer(given)
        loss = aux_loss(layer) if early else 0
        (slope,) = torch.autograd.grad(y.sum(), given, create_graph=True)
        loss = y.mean() + slope.square().mean() + (loss if early else aux_loss(layer))
        return torch.autograd.grad(loss, layer.router.weight)[0]

    assert torch.allclose(gradient(True), gradient(False))


def test_a_backward_of_another_thread_recomputes_by_what_was_told():
    """As autograd's own threads do on a GPU."""
    layer = MoE(8, 16, 4, "task", top_k=2, num_tasks=3).double()
    x, task = torch.randn(2, 6, 8, dtype=torch.float64), torch.tensor([2, 0])
    gradients = []
    for checkpointed in (False, True):
        given = x.clone().requires_grad_()
        with shunter.tell(layer, task=task):
            out = checkpoint(layer, given, use_reentrant=False) if checkpointed else layer(given)
            other = threading.Thread(target=lambda out=out: out.square().sum().backward())
            other.start()
            other.join(60)
        gradients.append(given.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("caught", ["outside", "inside"])
def test_what_ctrl_c_left_is_not_known_to_a_layer_alone(caught):
    """torch calls no hook for it."""
    model = shunter.sparsify(_llama(), 4, "topk", top_k=2).eval()
    batch = next(_batches(1))
    layers = list(moe_layers(model).values())

    def interrupt(module, args):
        raise KeyboardInterrupt

    hook = layers[1].register_forward_pre_hook(interrupt)
    if caught == "outside":
        with pytest.raises(KeyboardInterrupt) as kept:
            model(**batch)
        hook.remove()
        assert kept.traceback
        layers[0](torch.randn(2, 6, 16))
        assert layers[0].routing.token.numel() == 2 * 12
    else:

        def run_around(module, args, output):
            with contextlib.suppress(KeyboardInterrupt):
                model(**{**batch, "attention_mask": torch.zeros(2, 6)})
            return output

        outer = shunter.sparsify(_llama(), 4, "topk", top_k=2).eval()
        first, second, *_ = moe_layers(outer).values()
        first.register_forward_hook(run_around)
        outer(**batch)
        assert second.routing.token.numel() == 2 * int(batch["attention_mask"].sum())
        hook.remove()
    assert not shunter.context.present()
