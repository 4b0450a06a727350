"""`shunter bench lora` trains alike with peft's adapters and with Shunter's, and prints what each adds."""

import json

import pytest

pytest.importorskip("peft")

from shunter.benchmarks.lora import SIZES, bench, markdown, right


@pytest.mark.slow
def test_both_train_alike():
    tiny = SIZES | {"hidden_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 1, "num_experts": 8}
    tiny |= {"num_experts_per_tok": 2, "vocab_size": 64, "head_dim": 8}
    found = json.loads(json.dumps(bench(2, rounds=1, steps=3, sizes=tiny, batch=2, length=16, implementation="eager")))
    assert right(found)
    losses = [row["losses"] for row in found["results"].values()]
    assert len(losses) == 3 and losses[0] != losses[1]
    page = markdown(found)
    for name, row in found["results"].items():
        assert f"| {name} | {row['ms']:.0f} |" in page
