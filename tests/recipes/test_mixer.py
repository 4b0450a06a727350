"""Mixers, dense and sparse: each network written out, costs counted, a small run; residual experts on a core."""

import json
import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("matplotlib")

from shunter.cli import main
from shunter.hf.checkpoints.loading import load_folder
from shunter.moe import moe_layers
from shunter.recipes import run as engine
from shunter.recipes.images import RECIPE
from shunter.recipes.mixer import Mixer, MixerShape, mixer_ledger
from shunter.recipes.run import load_model
from shunter.training.roles import roles
from tests.recipes.test_images import SMALL, made, pictures  # noqa: F401
from tests.recipes.whole import whole

MIXER = ["model.kind=mixer", "model.tokens_hidden=16", "sparse.num_experts=2"]


def _shape(**options):
    return MixerShape(
        image_size=8, patch_size=2, num_channels=3, hidden_size=10, num_hidden_layers=2, tokens_hidden=12,
        intermediate_size=20, num_labels=4, **options,
    )  # fmt: skip


def _network(layer, rows):
    """Rows (T, n) through a dense network, or each through its experts with their weights."""
    if not hasattr(layer, "experts"):
        return F.linear(F.gelu(F.linear(rows, layer[0].weight, layer[0].bias)), layer[2].weight, layer[2].bias)
    out = torch.zeros_like(rows)
    e = layer.experts
    triples = zip(layer.routing.token.tolist(), layer.routing.expert.tolist(), layer.routing.weight, strict=True)
    for token, expert, weight in triples:
        h = F.gelu(F.linear(rows[token], e.up_proj[expert], e.up_proj_bias[expert]))
        out[token] += weight * F.linear(h, e.down_proj[expert], e.down_proj_bias[expert])
    return out


@torch.no_grad()
@pytest.mark.parametrize("sparse", [[], [1]])
def test_the_model_is_its_definition(sparse):
    alike = {"num_experts": 3, "router": "vmoe", "hidden": 7}
    model = Mixer(_shape(sparse=sparse, tokens_experts=alike, channels_experts=alike)).eval()
    for layer in moe_layers(model).values():
        for bias in (layer.experts.up_proj_bias, layer.experts.down_proj_bias):
            bias.copy_(torch.randn_like(bias))
    images = torch.rand(2, 3, 8, 8)
    logits = model(images).logits
    weight = model.stem.weight.reshape(10, -1)
    patches = [images[:, :, r : r + 2, c : c + 2].reshape(2, -1) for r in range(0, 8, 2) for c in range(0, 8, 2)]
    x = torch.stack([F.linear(patch, weight, model.stem.bias) for patch in patches], 1)
    for block in model.blocks:
        seen = F.layer_norm(x, (10,), block.before_tokens.weight, block.before_tokens.bias)
        channels = torch.stack([seen[b, :, c] for b in range(2) for c in range(10)])
        mixed = _network(block.tokens, channels).reshape(2, 10, 16)
        x = x + torch.stack([mixed[:, c] for c in range(10)], -1)
        seen = F.layer_norm(x, (10,), block.before_channels.weight, block.before_channels.bias)
        x = x + _network(block.channels, seen.reshape(32, 10)).reshape(2, 16, 10)
    x = F.layer_norm(x, (10,), model.norm.weight, model.norm.bias)
    torch.testing.assert_close(logits, F.linear(x.mean(1), model.classifier.weight, model.classifier.bias))
    sent = {name: layer.routing.num_tokens for name, layer in moe_layers(model).items()}
    assert sent == ({"blocks.1.tokens": 2 * 10, "blocks.1.channels": 2 * 16} if sparse else {})


def test_costs_are_those_of_the_products():
    model = Mixer(_shape()).eval()
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        model(torch.rand(1, 3, 8, 8))
    found = mixer_ledger(model)
    assert found.flops_per_token * 16 == pytest.approx(counted.get_total_flops())
    assert found.params_total == found.params_active == sum(p.numel() for p in model.parameters())


def test_a_run_from_end_to_end(pictures, tmp_path, capsys):  # noqa: F811
    run = whole("images", [*SMALL, *MIXER, f"data.source=['{pictures}']"], tmp_path, capsys)
    summary = json.loads((run / "summary.json").read_text())
    dense, sparse = (summary[which]["flops_per_token"] for which in ("dense", "sparse"))
    assert math.isclose(dense, sparse, rel_tol=0.06)
    assert set(moe_layers(load_model(run, "sparse"))) == {"blocks.1.tokens", "blocks.1.channels"}
    assert set(json.loads((run / "specialisation.json").read_text())["layers"]) == {"blocks.1.channels"}
    shown = {one["title"]: one for one in json.loads((run / "exhibits.json").read_text())}
    assert set(shown["The patches of each expert"]["groups"]) == {"blocks.1.channels"}
    assert "the class has a token" not in json.dumps(json.loads((run / "data.json").read_text()))
    assert main(["inspect", str(run), "--out", str(tmp_path / "seen"), "--ablate", "1"]) == 0
    seen = json.loads((tmp_path / "seen/inspect.json").read_text())
    assert set(seen["models"][0]["layers"]) == {"blocks.1.tokens", "blocks.1.channels"}
    capsys.readouterr()
    for settings, message in (
        ([*MIXER, "sparse.router=hash"], "needs token_ids of each patch"),
        ([*MIXER, "sparse.init=copy"], "model.kind=mixer begins from scratch"),
        ([f"model.start='{run}/dense'"], "dense/config.json: "),
        ([f"model.start='{tmp_path}/none'"], "is no folder"),
        (["sparse.init=copy", "sparse.hidden=4"], "leave sparse.hidden out"),
    ):
        arguments = [*SMALL, f"data.source=['{pictures}']", *settings]
        assert main(["train", "images", "--run", str(tmp_path / "bad"), *arguments]) == 2
        said = capsys.readouterr().err.strip()
        assert message in said and "\n" not in said


def test_residuals_are_trained_on_a_core_that_stays(pictures, tmp_path, monkeypatch):  # noqa: F811
    """The core is the dense model of another run; what is not router or residual is that model to the bit."""
    monkeypatch.setattr(engine, "write_report", lambda folder: None)
    monkeypatch.setattr(engine, "write_picture", lambda *places: None)
    monkeypatch.setattr(RECIPE, "exhibits", lambda *given: [])
    core = made(pictures)
    data = RECIPE.prepare(core)
    RECIPE.build(core, data, False).save_pretrained(tmp_path / "dense")
    settings = [
        f"model.start='{tmp_path / 'dense'}'", "sparse.experts=residual", "sparse.init=copy",
        "sparse.train='router,expert'", "sparse.router=topk",
    ]  # fmt: skip
    arguments = [*SMALL, f"data.source=['{pictures}']", *settings, "--json"]
    assert main(["train", "images", "--run", str(tmp_path / "run"), *arguments]) == 0
    before, sparse = load_folder(tmp_path / "dense"), load_model(tmp_path / "run", "sparse")
    start = RECIPE.build(made(pictures, *settings), data, True).eval()
    pixels = torch.stack([data.normalise(data.pixels(i)) for i in range(4)])
    with torch.no_grad():
        torch.testing.assert_close(start(pixels).logits, before(pixels).logits, rtol=1e-4, atol=1e-5)
    trained, of = sparse.state_dict(), roles(sparse)
    for name, value in start.state_dict().items():
        if of.get(name) in ("router", "expert"):
            assert not torch.equal(trained[name], value), name
        else:
            assert torch.equal(trained[name], value), name
    [layer] = moe_layers(sparse).values()
    assert any(torch.equal(layer.experts.up_core, value) for value in before.parameters())
    assert layer.experts.hidden == 24
