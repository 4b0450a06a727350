"""One tower for patches and words: what it computes, what its layers are told, and that it is loaded bit for bit."""

import math

import pytest
import torch
from torch.nn import functional as F

from shunter import sparsify
from shunter.hf.checkpoints.loading import load_folder
from shunter.hf.contrastive import IMAGE, TEXT, ContrastiveConfig, ContrastiveModel
from shunter.hf.offloading import offload
from shunter.moe import moe_layers, tell

SHAPE = {"hidden_size": 16, "intermediate_size": 24, "image_size": 8, "patch_size": 4, "num_channels": 1}


def model_of(**settings):
    return ContrastiveModel(ContrastiveConfig(**SHAPE, caption_tokens=6, initializer_range=0.25, **settings)).eval()


def pairs(count=5, length=6):
    ids = torch.randint(0, 257, (count, length))
    mask = (torch.arange(length) < torch.randint(1, length + 1, (count, 1))).long()
    return {"pixel_values": torch.randn(count, 1, 8, 8), "input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("towers", [1, 2])
def test_the_loss_is_that_of_both_directions_written_out(towers):
    model, batch = model_of(towers=towers), pairs()
    batch["input_ids"][3], batch["attention_mask"][3] = batch["input_ids"][1], batch["attention_mask"][1]
    out = model(**batch)
    image, text = out.image_embeds.double(), out.text_embeds.double()
    torch.testing.assert_close(image.norm(dim=-1), torch.ones(5, dtype=torch.float64))
    scale = min(100.0, math.exp(float(model.log_scale)))
    terms = []
    for one, other in ((image, text), (text, image)):
        for i in range(5):
            rivals = [j for j in range(5) if j == i or {i, j} != {1, 3}]  # the two have one caption
            scores = torch.stack([scale * (one[i] * other[j]).sum() for j in rivals])
            terms.append(scores.logsumexp(0) - scale * (one[i] * other[i]).sum())
    torch.testing.assert_close(out.loss.double(), torch.stack(terms).mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("towers", [1, 2])
def test_neither_modality_nor_padding_changes_the_other(towers):
    model, batch = model_of(towers=towers), pairs()
    both = model(**batch)
    images = model(pixel_values=batch["pixel_values"])
    texts = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    assert images.loss is None and texts.logits is None
    torch.testing.assert_close(images.image_embeds, both.image_embeds)
    torch.testing.assert_close(texts.text_embeds, both.text_embeds)
    batch["input_ids"] = batch["input_ids"].where(batch["attention_mask"].bool(), 7)
    torch.testing.assert_close(model(**batch).text_embeds, both.text_embeds)
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        alone = model(input_ids=batch["input_ids"][row : row + 1, :length])
        torch.testing.assert_close(alone.text_embeds[0], both.text_embeds[row])
    with pytest.raises(ValueError, match="or both"):
        model()


def test_the_vector_of_an_image_is_the_map_of_the_mean_of_its_patches():
    model, batch = model_of(), pairs()
    seen = []
    model.norms[0].register_forward_hook(lambda module, given, out: seen.append(out))
    out = model(**batch)
    mean = seen[0][:, :4].mean(1)
    torch.testing.assert_close(out.image_embeds, F.normalize(mean @ model.image_head.weight.T, dim=-1))


def test_the_layers_are_told_modality_padding_sequence_and_place():
    model, batch = sparsify(model_of(), 4, "limoe", layers=[1], hidden=8), pairs()
    [layer] = moe_layers(model).values()
    told = []
    inner = layer.decider.choose
    layer.decider.choose = lambda logits, context: (told.append(context), inner(logits, context))[1]
    ids = torch.randint(0, 99, (5, 10))
    with tell(model, token_ids=ids):
        model(**batch)
    [context] = told
    assert (
        context.modality.reshape(5, 10)[:, :4].eq(IMAGE).all() and context.modality.reshape(5, 10)[:, 4:].eq(TEXT).all()
    )
    assert torch.equal(context.mask.reshape(5, 10)[:, 4:].long(), batch["attention_mask"])
    assert context.mask.reshape(5, 10)[:, :4].all() and torch.equal(context.token_ids, ids.flatten())
    assert layer.tokens_routed == 20 + int(batch["attention_mask"].sum())
    sequence = context.sequence if context.sequence is not None else torch.zeros(50)
    assert len(sequence.unique()) == 10, "an image is a sequence, its caption another"
    assert torch.equal(context.position.reshape(5, 10)[2], torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4, 5]))


def test_a_sparse_one_trains_with_its_losses_and_is_loaded_bit_for_bit(tmp_path):
    model, batch = sparsify(model_of(), 4, "limoe", layers=[1], hidden=8), pairs()
    expected = model(**batch).logits
    model.save_pretrained(tmp_path)
    assert torch.equal(load_folder(tmp_path)(**batch).logits, expected)
    torch.testing.assert_close(offload(tmp_path, "1MB")(**batch).logits, expected)
    model.train()
    out = model(**batch)
    [layer] = moe_layers(model).values()
    extra = sum(float(v) for v in layer.losses.values())
    assert {"local_entropy_loss", "global_entropy_loss", "importance_loss", "z_loss"} <= set(layer.losses)
    out.loss.backward()
    plain = (F.cross_entropy(out.logits, torch.arange(5)) + F.cross_entropy(out.logits.mT, torch.arange(5))) / 2
    assert float(out.loss) == pytest.approx(float(plain) + extra, rel=1e-4)
    assert float(layer.router.weight.grad.abs().sum()) > 0 and float(model.log_scale.grad.abs()) > 0
    dense = model_of(towers=2)
    dense.save_pretrained(tmp_path / "dense")
    assert torch.equal(load_folder(tmp_path / "dense")(**batch).logits, dense(**batch).logits)
