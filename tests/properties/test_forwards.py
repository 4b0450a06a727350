"""What one forward knows and decides is its own: other forwards, threads, towers and steps see nothing of it."""

import copy
import gc
import threading
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor

import accelerate
import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM

import shunter
from shunter import MoE, aux_loss, moe_layers
from shunter.training.balance import Balance


def _llama():
    shape = {"num_hidden_layers": 3, "hidden_size": 16, "intermediate_size": 24, "vocab_size": 50}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", num_attention_heads=2, **shape))


def _batches(count, rows=2, length=6):
    for _ in range(count):
        ids, mask = torch.randint(1, 50, (rows, length)), torch.ones(rows, length, dtype=torch.int64)
        mask[0, int(torch.randint(2, length - 1, ())) :] = 0
        yield {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100), "use_cache": False}


@pytest.mark.parametrize("by", ["transformers", "a wrapped block", "a wrapped layer"])
@pytest.mark.parametrize("router", ["hash", "topk", "soft_moe"])
def test_two_forwards_before_one_backward_under_checkpointing(router, by):
    options = {"topk": {"top_k": 2}}.get(router, {})
    model = shunter.sparsify(_llama(), 4, router, allow_leak=True, **options).train()
    batches = list(_batches(2))
    if router == "hash":
        batches = [{**batch, "attention_mask": torch.ones_like(batch["input_ids"])} for batch in batches]

    def gradients(model):
        torch.manual_seed(0)
        sum(model(**batch).loss for batch in batches).backward()
        return {name.replace("_checkpoint_wrapped_module.", ""): p.grad for name, p in model.named_parameters()}

    checkpointed = copy.deepcopy(model)
    expected = gradients(model)
    if by == "transformers":
        checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

        for number, block in enumerate(checkpointed.model.layers):
            if by == "a wrapped block":
                checkpointed.model.layers[number] = checkpoint_wrapper(block)
            else:
                block.mlp = checkpoint_wrapper(block.mlp)
    for name, grad in gradients(checkpointed).items():
        assert torch.equal(grad, expected[name]), name


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
            thread.join(timeout=120)
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


def test_scopes_that_were_left_end_with_the_next_forward():
    """Ctrl-C in a forward leaves its scopes: torch calls no hook for it."""
    model = shunter.sparsify(_llama(), 4, "topk", top_k=2).eval()
    batch = next(_batches(1))

    def interrupt(module, args):
        raise KeyboardInterrupt

    hook = moe_layers(model)["model.layers.1.mlp"].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(**batch)
    hook.remove()
    model(**batch)
    assert not shunter.context.present()
