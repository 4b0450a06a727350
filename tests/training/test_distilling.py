"""Distillation: the loss and the share of the gain as the paper has them, and students of every kind."""

import json

import pytest
import tokenizers
import torch
from transformers import PreTrainedTokenizerFast

from shunter import from_pretrained, moe_layers, sparsify
from shunter.analysis.inspect.inspecting import Inspected
from shunter.analysis.inspect.material import Batch, Material
from shunter.errors import NotWritten, UserError
from shunter.hf.checkpoints.loading import load_folder
from shunter.hf.observe.taps import taps
from shunter.training.distilling import distill, distillation_loss, gain_kept, student_of
from shunter.training.growing import split_expert
from shunter.training.pruning import prune
from shunter.training.roles import roles
from tests.hf.families import build
from tests.training.test_pruning import save, wake

NEXT = (5 * torch.arange(16) + 3) % 16  # the token that follows each of the little language, mostly


def language(batches=40, rows=8, length=12):
    """A little language of 16 tokens, in which each follows from the one before by a table, with noise."""
    found = []
    for _ in range(batches):
        ids = torch.randint(16, (rows, length))
        for i in range(1, length):
            known = torch.rand(rows) < 0.8
            ids[:, i] = torch.where(known, NEXT[ids[:, i - 1]], ids[:, i])
        found.append(Batch({"input_ids": ids}, torch.cat([ids[:, 1:], torch.full((rows, 1), -100)], 1)))
    tokens = batches * rows * length
    return Material(found, {}, torch.zeros(tokens, dtype=torch.int64), [], tokens, length)


@pytest.mark.parametrize(
    "teacher, student, share",
    [(1.505, 1.587, 37), (1.474, 1.585, 32), (1.444, 1.579, 30), (1.432, 1.582, 27), (1.427, 1.578, 28)],
)
def test_shares_of_the_gain_are_those_of_switch_table_7(teacher, student, share):
    assert abs(100 * gain_kept(1.636, teacher, student) - share) < 1  # of losses that are rounded to three digits
    assert gain_kept(teacher, teacher, student) is None


def test_the_shares_of_table_6_and_of_fine_tuning():
    assert round(100 * gain_kept(-74.6, -81.3, -76.6)) == 30


def test_the_loss_is_a_quarter_of_the_teacher_and_three_of_the_labels():
    logits, teacher = torch.randn(3, 5, 7, dtype=torch.float64), torch.randn(3, 5, 7, dtype=torch.float64)
    targets = torch.randint(7, (3, 5))
    targets[0, :2] = -100
    hard, soft = [], []
    for i in range(3):
        for j in range(5):
            if targets[i, j] >= 0:
                logs = logits[i, j] - logits[i, j].logsumexp(0)
                hard.append(-logs[targets[i, j]])
                soft.append(-(teacher[i, j].softmax(0) * logs).sum())
    expected = 0.75 * sum(hard) / len(hard) + 0.25 * sum(soft) / len(soft)
    found = distillation_loss(logits, targets, teacher, 0.25)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    for without in (distillation_loss(logits, targets, None, 0.25), distillation_loss(logits, targets, teacher, 0.0)):
        torch.testing.assert_close(without.double(), sum(hard) / len(hard), rtol=1e-5, atol=1e-6)


def inspected(model):
    return Inspected("teacher", model, None)


@pytest.mark.parametrize("kind", ["ours", "mixtral", "qwen3_moe", "deepseek_v3"])
def test_a_dense_student_begins_with_all_but_the_experts(kind, tmp_path):
    if kind == "ours":
        teacher = wake(sparsify(build("mistral"), 4, "topk", top_k=2))
    else:
        teacher = wake(build(kind, first_k_dense_replace=0) if kind == "deepseek_v3" else build(kind))
    receipt = distill(save(teacher, tmp_path / "old"), tmp_path / "new", material=language(10), steps=2)
    student = load_folder(tmp_path / "new")
    assert not taps(student) and "loss" not in receipt
    of = roles(student)
    assert {name for name, role in of.items() if role != "feed_forward"} <= set(receipt["copied"])
    assert not any(of.get(name) == "feed_forward" for name in receipt["copied"])
    fresh = student_of(inspected(teacher))
    if kind in ("mixtral", "qwen3_moe"):  # as wide as the experts of a token
        width = {"mixtral": 24, "qwen3_moe": 16}[kind] * 2
        assert fresh.get_submodule("model.layers.0.mlp.up_proj").weight.shape[0] == width


def test_a_student_of_fewer_layers_begins_with_the_teachers(tmp_path):
    kinds = {
        "ours": {},
        "qwen3_moe": {"mlp_only_layers": [0]},
        "deepseek_v3": {},
        "ernie4_5_moe": {},
        "llama4_text": {},
    }
    for kind, more in kinds.items():  # the first layer of DeepSeek, Ernie and this Qwen is dense
        ours = sparsify(build("mistral"), 4, "topk", top_k=2, layers=[0, 2]) if kind == "ours" else None
        teacher, folder = wake(ours or build(kind, **more)), tmp_path / kind
        distill(
            save(teacher, folder / "old"), folder / "new", layers=2, material=language(10), steps=1, learning_rate=1e-30
        )
        student = load_folder(folder / "new")
        theirs = teacher.state_dict()
        for name, tensor in student.state_dict().items():
            old = name.replace("layers.1.", "layers.2.").replace("layers.0.", "layers.1.")
            moved = name.endswith("e_score_correction_bias")  # by its own rule, in a step at any rate
            assert moved or torch.equal(tensor, theirs[old]), name
        assert list(moe_layers(student)) == (["model.layers.1.mlp"] if kind == "ours" else [])
    teacher = build("jamba", expert_layer_period=2, expert_layer_offset=1)
    with pytest.raises(UserError, match="layers are of several kinds; try another number"):
        distill(save(teacher, tmp_path / "jamba"), tmp_path / "none", layers=2, material=language(10), steps=1)


def test_a_student_of_fewer_layers_has_the_teachers_sparse_attention_and_splits(tmp_path):
    teacher = sparsify(build("mistral"), 3, "topk", top_k=2, where="feed_forward, attention", residual=True)
    last = len(teacher.model.layers) - 1
    split_expert(teacher.model.layers[last].mlp, 1)
    distill(save(wake(teacher), tmp_path / "old"), tmp_path / "new", layers=1, material=language(10), steps=1)
    student = load_folder(tmp_path / "new")
    kept = {name.replace(f"layers.{last}.", "layers.0.") for name in moe_layers(teacher) if f"layers.{last}." in name}
    assert set(moe_layers(student)) == kept and len(kept) == 3
    assert student.model.layers[0].mlp.num_experts == 4
    with pytest.raises(UserError, match="are of different kinds"):
        distill(tmp_path / "old", tmp_path / "dense", material=language(10), steps=1)


def test_a_taught_student_keeps_a_part_of_the_gain_and_a_pruned_one_recovers(tmp_path):
    """The teacher knows the language by its embedding and its head, so loudly that no block is heard beside them."""
    material = language()
    teacher = sparsify(build("mistral", num_hidden_layers=1), 4, "topk", top_k=2, load_balancing_loss=0.01)
    head = teacher.get_output_embeddings().weight
    with torch.no_grad():
        teacher.get_input_embeddings().weight.copy_(100 * torch.eye(64, 32))
        head.zero_()[NEXT, torch.arange(16)] = 0.75  # of a normalised state: a logit of 0.75 sqrt(32)
    folder = save(teacher, tmp_path / "teacher")
    receipt = distill(folder, tmp_path / "dense", material=material, steps=12)
    losses = receipt["losses"]
    assert max(losses["teacher"], losses["student"]) < losses["baseline"] and receipt["gain_kept"] > 0.3
    assert json.loads((tmp_path / "dense" / "receipt.json").read_text()) == json.loads(json.dumps(receipt))
    with torch.no_grad():
        head.zero_()  # from there each step lowers the loss: of 64 tokens the language has 16
    prune(save(teacher, tmp_path / "forgetful"), tmp_path / "pruned", 2, "random", material=material)
    again = distill(folder, tmp_path / "recovered", student=tmp_path / "pruned", material=material, steps=8)
    assert again["losses"]["student"] < again["losses"]["student_before"]
    assert list(moe_layers(from_pretrained(str(tmp_path / "recovered")))) == list(moe_layers(teacher))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"soft": 1.5}, "soft=1.5 must be from 0 to 1"),
        ({"steps": 0}, "must be above 0"),
        ({"learning_rate": float("nan")}, "must be above 0"),
        ({"layers": 3}, "from 1 to 2"),
        ({"layers": 2, "student": "x"}, "give one"),
    ],
)
def test_impossible_options_are_one_line(options, message, tmp_path):
    folder = save(build("mixtral"), tmp_path / "old")
    with pytest.raises(UserError, match=message):
        distill(folder, tmp_path / "new", material=language(10), **options)
    assert not (tmp_path / "new").exists()


def test_teachers_and_students_that_do_not_fit_are_one_line(tmp_path):
    folder = save(build("mixtral"), tmp_path / "old")
    other = save(build("mistral", vocab_size=65), tmp_path / "other")
    with pytest.raises(UserError, match="other has a vocabulary of 65, old one of 64"):
        distill(folder, tmp_path / "new", student=other, material=language(10), steps=1)
    same = save(build("mistral"), tmp_path / "same")
    for place, words in ((folder, "a b c"), (same, "a c b")):
        numbers = {word: number for number, word in enumerate(words.split())}
        backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(numbers, unk_token="a"))
        PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(place)
    for options in {"student": same}, {"baseline": same}:
        with pytest.raises(UserError, match="token 1 is 'c' and 'b'; they must be the same"):
            distill(folder, tmp_path / "new", **options, material=language(10), steps=1)
    with pytest.raises(UserError, match="no dense model .* gpt_oss"):
        distill(save(build("gpt_oss"), tmp_path / "oss"), tmp_path / "new", material=language(10), steps=1)
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="exists already"):
        distill(folder, tmp_path / "there", material=language(10), steps=1)


def test_a_student_in_half_precision_learns_by_steps_that_it_would_round_away(tmp_path):
    teacher, student = save(wake(build("mixtral")), tmp_path / "old"), wake(build("mistral")).bfloat16()
    save(student, tmp_path / "student")
    distill(
        teacher, tmp_path / "new", student=tmp_path / "student", material=language(10), steps=25, learning_rate=4e-5
    )
    moved = 0
    for name, tensor in load_folder(tmp_path / "new").state_dict().items():
        before = student.state_dict()[name]
        assert tensor.dtype == before.dtype == torch.bfloat16
        large = before.abs() > 2**-4  # next to which numbers are 2**-11 apart, and half of that rounds away
        moved += int((tensor != before)[large].sum())
    assert moved > 100


def test_a_place_that_cannot_be_is_told_before_the_training(tmp_path):
    folder, said = save(build("mixtral"), tmp_path / "old"), []
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotWritten, match="file"):
        distill(folder, tmp_path / "file" / "new", material=language(10), steps=1, say=said.append)
    assert not said and (tmp_path / "file").read_text() == "mine"
