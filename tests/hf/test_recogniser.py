"""The recogniser: padding that nobody sees, CTC and transducer by definition, heads that look at no later label."""

import itertools
import math
import random

import pytest
import torch

import shunter
from shunter.hf.checkpoints.loading import load_folder
from shunter.hf.recogniser import BLANK, Recogniser, RecogniserConfig, best_path, ctc_nats, transducer_nats
from shunter.moe import moe_layers, tell
from tests.conftest import SEED


def sizes(**options):
    rates = ("hidden", "attention", "activation", "feat_proj", "final", "conformer_conv")
    return RecogniserConfig(
        vocab_size=7, pad_token_id=BLANK, feature_projection_input_dim=6, hidden_size=16, output_hidden_size=16,
        num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, conv_depthwise_kernel_size=5,
        position_embeddings_type="rotary", mask_time_prob=0.0, layerdrop=0.0,
        **{f"{name}_dropout": 0.0 for name in rates}, **options,
    )  # fmt: skip


def sparse(**options):
    model = Recogniser(sizes(embedding_dim=5, **options))
    heads, model.heads = model.heads, torch.nn.ModuleDict()
    shunter.sparsify(model, 4, "speech", hidden=8, embedding_dim=5, num_domains=3)
    model.heads = heads
    return model.eval()


@torch.no_grad()
def test_what_stands_at_padding_reaches_no_frame_and_no_expert():
    model = sparse()
    length, longest = random.randint(4, 9), random.randint(12, 20)
    clip = torch.randn(1, length, 6)
    with tell(model, domain=torch.tensor([1])):
        alone = model(clip).logits[0]
    seen = []
    for filling in (0.0, 7.0, float("inf")):
        batch = torch.full((2, longest, 6), filling)
        batch[0, :length], batch[1] = clip[0], torch.randn(longest, 6)
        if filling == float("inf"):  # where sums with zero weights would be NaN
            batch[0, length:] = 1e30
        mask = torch.ones(2, longest, dtype=torch.bool)
        mask[0, length:] = False
        with tell(model, domain=torch.tensor([1, 2])):
            seen.append(model(batch, attention_mask=mask).logits[0, :length])
        for layer in moe_layers(model).values():
            assert layer.routing.num_tokens == 2 * longest
            assert set(layer.routing.token.tolist()) == set(mask.flatten().nonzero().flatten().tolist())
    for logits in seen:
        torch.testing.assert_close(logits, alone, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_router_hears_the_embedding_network_and_the_domain():
    model = sparse()
    clip = torch.randn(1, 10, 6)

    layer = next(iter(moe_layers(model).values()))
    told = []
    layer.router.register_forward_hook(lambda module, args, kwargs, output: told.append(output[0]), with_kwargs=True)
    for domain in (0, 1):
        with tell(model, domain=torch.tensor([domain])):
            model(clip)
    layer.router.domain_logits.copy_(torch.randn_like(layer.router.domain_logits))
    for domain in (0, 1):
        with tell(model, domain=torch.tensor([domain])):
            model(clip)
    torch.testing.assert_close(told[0], told[1])
    moved = layer.router.domain_logits[1] - layer.router.domain_logits[0]
    torch.testing.assert_close(told[3] - told[2], moved.expand_as(told[2]), atol=1e-5, rtol=1e-4)
    known, _ = model.embedding(clip, torch.ones(1, 10, dtype=torch.bool))
    with tell(model, domain=torch.tensor([0])):
        model.embedding.norm.bias.add_(1.0)
        model(clip)
    rise = layer.router.embedding_weight.sum(-1)
    torch.testing.assert_close(told[4] - told[2], rise.expand_as(told[2]), atol=1e-5, rtol=1e-4)
    assert known.shape == (1, 10, 5)


def test_ctc_is_the_sum_over_all_alignments():
    draw = random.Random(SEED)
    labels, frames, size = [draw.randint(1, 2) for _ in range(draw.randint(1, 3))], 5, 3
    logits = torch.randn(1, frames + 2, size)
    probabilities = logits[0, :frames].softmax(-1)
    total = 0.0
    for path in itertools.product(range(size), repeat=frames):
        if [label for label, _ in itertools.groupby(path) if label != BLANK] == labels:
            total += math.prod(float(probabilities[t, label]) for t, label in enumerate(path))
    real = torch.arange(frames + 2)[None] < frames
    found = ctc_nats(logits, real, torch.tensor([labels + [-100]]))
    assert float(found[0]) == pytest.approx(-math.log(total), rel=1e-4)
    heard = best_path(logits, real)
    likeliest = logits[0, :frames].argmax(-1).tolist()
    assert heard == [[label for label, _ in itertools.groupby(likeliest) if label != BLANK]]


@torch.no_grad()
def test_the_attending_head_sees_no_later_label_and_no_padding():
    model = Recogniser(sizes(decoder_layers=1)).eval()
    head, frames, real = model.heads["attending"], torch.randn(2, 9, 16), torch.ones(2, 9, dtype=torch.bool)
    real[0, 5:] = False
    said = torch.randint(1, 7, (2, 6))
    other, moved = said.clone(), frames.clone()
    other[:, 4:], moved[0, 5:] = torch.randint(1, 7, (2, 2)), 3.0
    torch.testing.assert_close(head(said, frames, real)[:, :4], head(other, moved, real)[:, :4])
    texts = head.greedy(frames, real)
    for row, text in enumerate(texts):
        again = torch.tensor([[BLANK, *text]])
        follows = head(again, frames[row : row + 1], real[row : row + 1]).argmax(-1)[0].tolist()
        assert follows[: len(text)] == text
        assert len(text) == model.config.most_labels or follows[-1] == BLANK
    labels = torch.tensor([[3, 2, -100], [1, 4, 5]])
    expected = []
    for row in range(2):
        text = [label for label in labels[row].tolist() if label >= 0]
        logits = head(torch.tensor([[BLANK, *text]]), frames[row : row + 1], real[row : row + 1])[0].log_softmax(-1)
        expected += [-float(logits[place, label]) for place, label in enumerate([*text, BLANK])]
    assert float(head.loss(labels, frames, real)) == pytest.approx(sum(expected) / len(expected), rel=1e-4)


def _alignments(log_probs, text):
    """The probability of each alignment of a text with the frames of log_probs (S, L + 1, V), a path at a time."""
    frames = len(log_probs)
    for places in itertools.combinations(range(frames - 1 + len(text)), len(text)):
        t, u, total = 0, 0, 0.0
        for step in range(frames + len(text)):  # the last step is the blank that ends
            if step in places:
                total, u = total + float(log_probs[t, u, text[u]]), u + 1
            else:
                total, t = total + float(log_probs[t, u, BLANK]), t + 1
        assert (t, u) == (frames, len(text))
        yield math.exp(total)


def test_the_transducer_is_the_sum_over_all_alignments():
    draw = random.Random(SEED)
    frames, longest = 6, 4
    texts = [[draw.randint(1, 3) for _ in range(draw.randint(0, longest))] for _ in range(5)]
    counts = [draw.randint(1, frames) for _ in texts]
    labels = torch.tensor([[*text, *[-100] * (longest - len(text))] for text in texts])
    real = torch.arange(frames) < torch.tensor(counts)[:, None]
    logits = 3 * torch.randn(len(texts), frames, longest + 1, 4, dtype=torch.float64)
    found = transducer_nats(logits, real, labels)
    for row, (text, count) in enumerate(zip(texts, counts, strict=True)):
        paths = list(_alignments(logits[row, :count].log_softmax(-1), text))
        assert len(paths) == math.comb(count - 1 + len(text), len(text))
        assert float(found[row]) == pytest.approx(-math.log(sum(paths)), rel=1e-9)
    torch.testing.assert_close(transducer_nats(logits.float(), real, labels), found.float(), rtol=1e-4, atol=1e-4)
    some = logits[:2, :4, :3].clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda logits: transducer_nats(logits, torch.ones(2, 4) > 0, torch.tensor([[1, 3], [2, -100]])), some
    )


@torch.no_grad()
def test_the_transducer_says_the_likeliest_a_clip_at_a_time():
    """In float64, so that no order of sums decides between two labels."""
    head = Recogniser(sizes(transducer_dim=6, most_labels=4)).heads["transducer"].double()
    frames, real = 3 * torch.randn(3, 9, 16, dtype=torch.float64), torch.ones(3, 9, dtype=torch.bool)
    real[0, 5:], real[1, 1:] = False, False
    head.head.bias[BLANK] += head(torch.tensor([[BLANK]]), frames[:1]).amax(-1).median()  # some blanks, some labels
    labels, nats = torch.tensor([[3, 2, -100], [1, -100, -100], [5, 4, 6]]), 0.0
    for row, text in enumerate(head.greedy(frames, real)):
        said, t, mine = [], 0, frames[row : row + 1, : int(real[row].sum())]
        while t < mine.shape[1]:
            best = int(head(torch.tensor([[BLANK, *said]]), mine)[0, t, -1].argmax())
            if best == BLANK or len(said) == 4:
                t += 1
            else:
                said.append(best)
        assert text == said
        one = labels[row : row + 1, : int((labels[row] >= 0).sum())]
        nats += float(head.loss(one, mine, real[row : row + 1, : mine.shape[1]])) * one.shape[1]
    assert float(head.loss(labels, frames.where(real[..., None], 9.0), real)) == pytest.approx(nats / 6, rel=1e-4)


@torch.no_grad()
def test_a_saved_recogniser_is_loaded_to_the_same_bits(tmp_path):
    clip = torch.randn(1, 10, 6)
    for model in (sparse(decoder_layers=1, transducer_dim=4), Recogniser(sizes(transducer_dim=4)).eval()):
        model.save_pretrained(tmp_path / "model")
        again = load_folder(tmp_path / "model")
        assert type(again) is Recogniser and len(moe_layers(again)) == len(moe_layers(model))
        with tell(model, domain=torch.tensor([1])), tell(again, domain=torch.tensor([1])):
            assert torch.equal(again(clip).logits, model(clip).logits)
            whole, labels = torch.ones(1, 10, dtype=torch.long), torch.tensor([[3, 1]])
            losses = [one(clip, attention_mask=whole, labels=labels).loss for one in (model, again)]
            assert torch.equal(*losses), "of all heads"
