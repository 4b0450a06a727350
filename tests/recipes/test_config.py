"""One typed configuration: whatever is given ends in a configuration or in one line."""

import os
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from shunter import routers
from shunter.errors import UserError
from shunter.recipes.config import dump_config, load_config
from shunter.recipes.text import TextConfig
from shunter.routers.registry import option_types

KEYS = [
    "training.steps",
    "model.dim",
    "sparse.router",
    "sparse.options",
    "data.source",
    "name",
    "seed",
    "model",
    "x.y",
    "",
]


def test_files_and_overrides_combine(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("training:\n  steps: 7\n  learning_rate: 1e-4\nseed: 3\n")
    config = load_config(TextConfig, file, ["training.steps=9", "--sparse.router=switch", "sparse.options.jitter=0"])
    assert (config.training.steps, config.seed, config.training.learning_rate) == (9, 3, 1e-4)
    assert config.sparse.router == "switch" and config.sparse.options == {"jitter": 0}
    toml = tmp_path / "c.toml"
    toml.write_text(
        "seed = 3\n[training]\nsteps = 9\nlearning_rate = 1e-4\n[sparse]\nrouter='switch'\noptions={jitter=0}"
    )
    assert load_config(TextConfig, toml, []) == config


def test_options_that_are_lists(tmp_path):
    config = load_config(TextConfig, None, ["sparse={num_experts: 24, router: hme, options: {branching: [4, 6]}}"])
    assert config.sparse.build_router(8).widths == [4, 24]
    (tmp_path / "c.yaml").write_text(dump_config(config), encoding="utf-8")
    assert load_config(TextConfig, tmp_path / "c.yaml", []) == config


def test_saved_configurations_load_equal(tmp_path):
    config = load_config(TextConfig, None, ["name=a", "data.source=[x, 'ü y']", "sparse.options={jitter: 0.1}"])
    (tmp_path / "c.yaml").write_text(dump_config(config), encoding="utf-8")
    assert load_config(TextConfig, tmp_path / "c.yaml", []) == config


def test_numbers_without_a_dot_are_numbers_and_texts_like_them_stay_texts(tmp_path):
    config = load_config(
        TextConfig, None, ["sparse.options={z_loss: 1e-3}", "training.learning_rate=3e-4", "name='1e3'"]
    )
    assert config.sparse.options == {"z_loss": 1e-3} and config.training.learning_rate == 3e-4
    assert config.name == "1e3"
    (tmp_path / "c.yaml").write_text(dump_config(config), encoding="utf-8")
    assert load_config(TextConfig, tmp_path / "c.yaml", []) == config


@pytest.mark.parametrize("name", routers.names())
def test_every_option_of_every_router_has_a_type(name):
    for option, kind in option_types(name).items():
        assert kind is not Any, option


@pytest.mark.parametrize(
    "override, parts",
    [
        ("training.step=5", ["training.step is unknown", "did you mean training.steps?"]),
        ("trainin.steps=5", ["trainin is unknown", "did you mean training?"]),
        ("training.steps=0", ["training.steps=0", "greater than or equal to 1"]),
        ("training.steps=true", ["training.steps=True", "must not be true or false"]),
        ("sparse.top_k=true", ["sparse.top_k=True", "must not be true or false"]),
        ("sparse.options={group_size: true}", ["group_size=True", "valid integer"]),
        ("sparse={router: hash, options: {vocab_size: 5}}", ["vocab_size is that of the data"]),
        ("training.steps=many", ["training.steps='many'", "valid integer"]),
        ("training.learning_rate=.nan", ["training.learning_rate=nan", "finite"]),
        ("model.family=lama", ["model.family='lama'", "did you mean llama?"]),
        ("sparse.router=swich", ["sparse.router='swich'", "did you mean switch?"]),
        ("sparse.backend=fast", ["sparse.backend='fast'", "known: auto"]),
        ("sparse.options={jiter: 1}", ["no option 'jiter'", "did you mean jitter?"]),
        ("sparse={router: topk, top_k: 100}", ["top_k 100 must be between 1 and num_experts, 64"]),
        ("sparse={router: topk, options: {capacity_factor: .inf}}", ["capacity_factor", "=inf"]),
        ("sparse.options={capacity_factor: 1}", ["later tokens", "sparse.allow_leak=true"]),
        ("sparse={router: topk, options: {capacity_factor: many}}", ["router 'topk'", "an option cannot be used"]),
        ("sparse.options={jitter: true}", ["jitter=True", "should be a valid number"]),
        ("sparse.options={z_loss: '1e-3'}", ["z_loss='1e-3'", "should be a valid number"]),
        ("sparse.options={selection_bias: 1}", ["selection_bias=1", "should be a valid boolean"]),
        ("sparse.options={jitter: null}", ["jitter=None", "should be a valid number"]),
        ("sparse.options={jitter: .nan}", ["sparse.options.jitter", "=nan"]),
        ("sparse={router: topk, options: {jitter: nan}}", ["router 'topk'", "an option cannot be used"]),
        ("sparse.router=expert_choice", ["later tokens", "sparse.allow_leak=true"]),
        ("model.dim=30", ["model.dim 30 must be a multiple"]),
        ("training.batch_tokens=100", ["training.batch_tokens 100", "data.sequence_length 128"]),
        ("sparse.num_experts=4000", ["the router alone costs more"]),
        ("name=../up", ["name='../up'"]),
        ("steps", ["key=value"]),
        (".steps=5", ["'.steps=5' must be key=value"]),
        ("training.=5", ["'training.=5' must be key=value"]),
        ("data.source=[]", ["data.source=[]", "at least 1"]),
        ("data.source=['']", ["data.source.0=''", "at least 1"]),
        ("training=5", ["training=5"]),
        ("training.steps.x=5", ["training.steps"]),
        ("data.source=", ["data.source= has no value; write data.source=null"]),
        ("training.steps=9223372036854775807", ["training: steps 9223372036854775807", "would never end"]),
        ("parallel.timeout=1e308", ["parallel.timeout=1e+308"]),
    ],
)
def test_mistakes_are_one_line_with_key_value_and_cure(override, parts):
    with pytest.raises(UserError) as error:
        load_config(TextConfig, None, [override])
    text = str(error.value)
    assert "\n" not in text
    for part in parts:
        assert part in text, text


@pytest.mark.parametrize(
    "name, content",
    [("a.yaml", b"a: [1"), ("a.toml", b"a ="), ("a.yaml", b"\xff\xfe\x00"), ("a.yaml", b"- 1"), ("a.yaml", b"5: 1")],
)
def test_unreadable_files_name_the_file(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        load_config(TextConfig, tmp_path / name, [])
    with pytest.raises(UserError, match="No such file"):
        load_config(TextConfig, tmp_path / "missing.yaml", [])


BOMB = "a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("a.yaml", BOMB.encode(), "the alias"),
        ("a.yaml", b"[" * 100_000, "not readable as YAML"),
        ("a.yaml", b"seed: 1\nname: a\nseed: 2", "the key 'seed' comes twice"),
        ("a.yaml", b"training: {steps: 1, 'steps': 2}", "the key 'steps' comes twice"),
        ("a.yaml", b"a: 1\n" * 10**5, "larger than"),
        ("a.toml", b"a = " + b"[" * 100_000, "not readable as TOML"),
        ("a.yaml", None, "is a FIFO"),
    ],
)
def test_hostile_files_are_one_line(name, content, says, tmp_path):
    if content is None:
        os.mkfifo(tmp_path / name)
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=says) as caught:
        load_config(TextConfig, tmp_path / name, [])
    assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "value",
    [
        *("!!int ''", "!!float ''", "!!int x", "!!bool x", "!!timestamp x", "!!binary é", "!!null {}", "!!int {}"),
        *("{!!int '': 1}", "[!!float '']", "!!set 1", "!!python/name:os.system", "2024-13-45", "1:30"),
    ],
)
def test_tags_that_lie_are_one_line(value, tmp_path):
    (tmp_path / "a.yaml").write_text(f"training: {{steps: {value}}}", encoding="utf-8")
    for file, overrides in ((tmp_path / "a.yaml", []), (None, [f"training.steps={value}"])):
        with pytest.raises(UserError, match="YAML|training.steps=") as caught:
            load_config(TextConfig, file, overrides)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["seed: 0x{}", "training: {{steps: 0x{}}}", "data: {{source: [0x{}]}}"])
def test_numbers_that_python_does_not_write_out_are_one_line(content, tmp_path):
    (tmp_path / "a.yaml").write_text(content.format("f" * 5000))
    with pytest.raises(UserError, match=r"is a number of 20,000 bits; whole numbers end at 2\*\*63"):
        load_config(TextConfig, tmp_path / "a.yaml", [])


_value = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300)
@given(key=st.sampled_from(KEYS) | st.text(max_size=15), value=_value | st.text(max_size=30), dump=st.booleans())
def test_anything_gives_a_configuration_or_one_line(key, value, dump):
    text = yaml.safe_dump(value, default_flow_style=True).strip() if dump else str(value)
    try:
        load_config(TextConfig, None, [f"{key}={text}"])
    except UserError as error:
        assert str(error).isprintable() and 0 < len(str(error)) <= 400
