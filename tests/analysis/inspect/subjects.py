"""Models, documents and images to inspect: small, random, with routers that follow a planted rule."""

from html.parser import HTMLParser

import torch
from PIL import Image
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

import shunter
from shunter import Routing, cli, routers
from shunter.analysis.inspect.inspecting import Inspected
from shunter.analysis.inspect.material import text_material
from shunter.analysis.inspect.tokens import KINDS, kind
from shunter.data.documents import Domain
from shunter.data.windows import train_tokenizer

EXPERTS = 4


LM = {
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
LETTERS = "abcdefgh ,.1ABC"


class Planted(routers.Router):
    """Sends each token to the expert that `rule` of (token ids, sequence, position) says."""

    chooses = "tokens"
    source = "this test"
    needs = ("token_ids", "sequence", "position")
    rule = None

    def __init__(self, dim, num_experts, *, device=None, dtype=None):
        super().__init__(dim, num_experts)

    def score(self, x, context=None):
        ids, sequence, position = context.token_ids, context.sequence, context.position
        expert = type(self).rule(ids, sequence, position) % self.num_experts
        return torch.nn.functional.one_hot(expert, self.num_experts).float() * 5

    def choose(self, logits, context):
        index = logits.argmax(-1, keepdim=True)
        return Routing.from_topk(index, torch.ones(index.shape), self.num_experts)


def _marked(ids, sequence, mark):
    """Whether a token's sequence holds the mark."""
    has = torch.zeros(int(sequence.max()) + 1, dtype=torch.int64).index_add(0, sequence, (ids == mark).long())
    return has[sequence].clamp_max(1)


BYTES = train_tokenizer([], None)
MARK = BYTES.backend_tokenizer.encode("Q").ids[0]
RANK = BYTES.backend_tokenizer.encode("Z").ids[0]


RULES = {
    "token": lambda ids, sequence, position: ids * 7 // 3,
    "previous": lambda ids, sequence, position: torch.where(position > 0, ids.roll(1) * 7 // 3, 0),
    "position": lambda ids, sequence, position: position,
    "domain": lambda ids, sequence, position: _marked(ids, sequence, MARK),
    "language": lambda ids, sequence, position: _marked(ids, sequence, MARK) + 2 * _marked(ids, sequence, RANK),
    "kind": lambda ids, sequence, position: torch.tensor(
        [KINDS.index("special" if i == BYTES.eos_token_id else kind(BYTES.decode([i]))) for i in ids.tolist()]
    ),
    None: lambda ids, sequence, position: torch.randint(EXPERTS, ids.shape),
}


def letters(count):
    return "".join(LETTERS[i] for i in torch.randint(len(LETTERS), (count,)).tolist())


def random_documents(length=32):
    """Random letters in two domains, one of them in two languages; a mark in every window tells which."""

    def texts(marks):
        return ["".join(letters(6) + (marks[i % len(marks)] if marks else "") for i in range(12)) for _ in range(40)]

    return [Domain("a", texts("")), Domain("b", texts("Q") + texts("QZ"), languages=["x"] * 40 + ["y"] * 40)]


def sparse(router="topk", **options):
    model = LlamaForCausalLM(LlamaConfig(**LM, max_position_embeddings=64))
    shunter.sparsify(model, EXPERTS, router, **options)
    return Inspected("sparse", model.eval(), None)


def mixtral(**changes):
    shape = LM | {"num_local_experts": EXPERTS, "num_experts_per_tok": 2} | changes
    return MixtralForCausalLM(MixtralConfig(**shape, max_position_embeddings=64)).eval()


def material_of(subject, tokens=6000, length=32):
    return text_material(subject.model, BYTES, random_documents(), tokens=tokens, length=length)


def saved(path, model, tokenizer=BYTES):
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def vit(tmp_path):
    shape = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    labels = {"id2label": {0: "dark", 1: "light"}, "label2id": {"dark": 0, "light": 1}}
    model = ViTForImageClassification(ViTConfig(**shape, image_size=16, patch_size=4, num_channels=1, **labels))
    folder = tmp_path / "images"
    for name, low, high in (("dark", 0, 100), ("light", 150, 250)):
        (folder / name).mkdir(parents=True)
        for number in range(6):
            pixels = torch.randint(low, high, (16, 16), dtype=torch.uint8).numpy()
            Image.fromarray(pixels, "L").save(folder / name / f"{number}.png")
    return model, folder


def run_inspect(capsys, *arguments):
    code = cli.main(["inspect", *map(str, arguments)])
    return code, capsys.readouterr()


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in {"meta", "br", "link", "img", "input", "hr"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
