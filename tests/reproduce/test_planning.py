"""The simulator's claims and section 6: verdicts that follow what the simulator says."""

import pytest

pytest.importorskip("scipy")

from shunter.reproduce import planning
from shunter.reproduce.results import DIRECTION, NOT, REPRODUCED
from shunter.simulate.advise import UnifiedLaw
from shunter.simulate.published import check


def test_published_figures_have_a_row_with_its_error():
    rows = {row.what: row for row in planning.simulator().rows}
    predictions = [row for row in check() if not row.fitted]
    for one in predictions:
        row = rows[f"{one.source}: {one.what}"]
        assert row.verdict == (REPRODUCED if one.within else NOT) and f"{one.error:+.1%}" in row.ours
    assert len(rows) == len(predictions) + 4


def test_wrong_volumes_are_told(monkeypatch):
    monkeypatch.setattr(planning, "elements", lambda *shape: 1.01 * 2 * shape[-1] * shape[0] * shape[1])
    monkeypatch.setattr(planning, "exchanges", lambda shuffle=False: (2, 2))
    assert [row.verdict for row in planning.simulator().rows[:4]] == [NOT] * 4


def test_few_tokens_pay_for_all_experts_and_many_do_not(monkeypatch):
    assert planning._throughput().verdict == REPRODUCED
    predict = planning.predict

    def free(model, cluster, layout, job):  # reading weights takes no time, nor does routing as such
        cluster = planning.replace(cluster, memory_bandwidth=1e30, layer_seconds=(0.0,) * 3, expert_seconds=(0.0,) * 3)
        return predict(model, cluster, layout, job)

    monkeypatch.setattr(planning, "predict", free)
    assert planning._throughput().verdict in (NOT, DIRECTION)


def test_one_expert_is_as_the_law_says(monkeypatch):
    assert planning._one_expert().verdict != NOT
    other = UnifiedLaw(a=-0.08, b=-0.12, c=0.01, d=1.1, e_start=2.0, e_max=200.0)
    monkeypatch.setattr(planning, "LAW", other)
    assert "1.00, 1.00, 1.00 times the dense" in planning._one_expert().ours


@pytest.mark.slow
def test_section_6_comes_out():
    rows = planning.section_6().rows
    assert len(rows) == 7 and all(row.verdict != NOT for row in rows), rows
