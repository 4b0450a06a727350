"""Calibration against planted truth."""

import json
import math

import pytest
import torch

from shunter.analysis.calibration import Calibration, calibrations

from ..helpers import deviation


def test_a_constant_confidence_is_off_by_its_distance_from_the_accuracy():
    for _ in range(20):
        confidence, right, draws = torch.rand(()).double(), int(torch.randint(1, 400, ())), 400
        correct = (torch.arange(draws) < right)[torch.randperm(draws)]
        found = Calibration.of(confidence.expand(draws), correct)
        assert found.error == pytest.approx(abs(right / draws - float(confidence)), abs=1e-12)
        assert found.as_json()["accuracy"] == pytest.approx(right / draws)


def test_calibrated_predictions_are_off_by_their_noise_alone():
    draws, bins = 200_000, 10
    confidence = torch.rand(draws, dtype=torch.float64)
    found = Calibration.of(confidence, torch.rand(draws, dtype=torch.float64) < confidence, bins)
    assert found.count.min() > draws // (2 * bins)
    assert found.error <= deviation(draws // (2 * bins), bins)
    assert found.noise < 0.01
    # The average over repetitions, by simulation, against the closed form.
    few = torch.rand(500, dtype=torch.float64)
    errors = [Calibration.of(few, torch.rand(500, dtype=torch.float64) < few, bins).error for _ in range(400)]
    mean = sum(errors) / len(errors)
    assert mean == pytest.approx(Calibration.of(few, few > 2, bins).noise, rel=0.25)


def test_planted_overconfidence_is_measured_bin_by_bin():
    """Of each bin's predictions as many are right as planted, whatever their order and their parts."""
    bins = 15
    confidence, correct, error, planted = [], [], 0.0, []
    for b in range(bins):
        n = int(torch.randint(1, 200, ()))
        right = int(torch.randint(0, n + 1, ()))
        p = (b + torch.rand(n, dtype=torch.float64) * 0.98 + 0.01) / bins
        confidence.append(p)
        correct.append(torch.arange(n) < right)
        error += abs(right - float(p.sum()))
        planted.append((n, right / n))
    p, right = torch.cat(confidence), torch.cat(correct)
    shuffled = torch.randperm(len(p))
    whole = Calibration.of(p[shuffled], right[shuffled], bins)
    assert whole.error == pytest.approx(error / len(p))
    cut = int(torch.randint(1, len(p), ()))
    parts = Calibration.of(p[:cut], right[:cut], bins) + Calibration.of(p[cut:], right[cut:], bins)
    assert parts.error == pytest.approx(whole.error)
    found = [(row["predictions"], row["accuracy"]) for row in whole.as_json()["bins"]]
    assert [n for n, _ in found] == [n for n, _ in planted]
    assert [a for _, a in found] == pytest.approx([a for _, a in planted])


def test_the_edges_and_what_is_no_probability():
    found = Calibration.of(torch.tensor([0.0, 0.5, 1.0]), torch.tensor([False, True, True]), 2)
    assert found.count.tolist() == [2, 1]
    assert json.loads(json.dumps(Calibration.of(torch.tensor([1.0]), torch.tensor([True]), 3).as_json()))["bins"][
        0
    ] == {
        "predictions": 0,
        "confidence": None,
        "accuracy": None,
    }
    assert math.isnan(Calibration.of(torch.zeros(0), torch.zeros(0)).error)
    for bad in (torch.tensor([1.5]), torch.tensor([math.nan])):
        with pytest.raises(ValueError, match="between 0 and 1"):
            Calibration.of(bad, torch.tensor([True]))
    with pytest.raises(ValueError, match="alike"):
        Calibration.of(torch.rand(3), torch.ones(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_classifier_whose_temperature_is_planted(dtype):
    """Labels drawn from the model's own probabilities are calibrated; with the logits doubled it is overconfident."""
    draws, classes = 20_000, 7
    logits = (2 * torch.randn(draws, classes)).to(dtype)
    labels = torch.distributions.Categorical(logits=logits.float()).sample()
    labels[::10] = -100
    parts = [("a", logits[: draws // 2], labels[: draws // 2]), ("b", logits[draws // 2 :], labels[draws // 2 :])]
    right = calibrations(parts)
    assert sum(int(one.count.sum()) for one in right.values()) == int((labels >= 0).sum())
    sharp = calibrations((name, 2 * some, label) for name, some, label in parts)
    for name in ("a", "b"):
        assert right[name].error < 6 * right[name].noise
        assert sharp[name].error > 5 * right[name].error
        found = sharp[name].as_json()
        assert found["confidence"] > found["accuracy"]
