"""Avg@k, Maj@k, Pass@k on answers written by hand, and the interval against its textbook approximation."""
import math

import numpy as np
import pytest
import torch

from sd import rollouts
from sd.answers import equal
from sd.config import Config
from sd.llm.checkpoint import load
from sd.metrics import bootstrap, evaluate, majority, scores
from sd.problems import EMBEDDED, Problem
from sd.llm.sampling import Sampled, pad

TEN = Problem("p", "5*2", "10")


def rows(answers, lengths=(7,) * 4, truncated=(False,) * 4):
    """What `evaluate` hands to `scores`: a row per rollout."""
    return [[a, float(equal(a, TEN.answer)), n, cut] for a, n, cut in zip(answers, lengths, truncated)]


@pytest.mark.parametrize("answers, avg, maj, passed", [
    (["10", "10", "9", "8"], 1 / 2, 1, 1),
    (["10", "9", "9", "8"], 1 / 4, 0, 1),
    (["10", "10", "9", "9"], 1 / 2, 1 / 2, 1),          # a tie shares
    (["10", "9", "8", "7"], 1 / 4, 1 / 4, 1),
    (["10", None, None, None], 1 / 4, 1, 1),            # no answer has no vote, but counts as wrong
    ([None] * 4, 0, 0, 0),
    (["9", "8", "8", "7"], 0, 0, 0),
    (["10", "10.0", "9", "9"], 1 / 2, 1 / 2, 1),        # spellings of one number vote together
    (["20/2", "10.0", "10", "9"], 3 / 4, 1, 1),
    (["x = 10", "y = 10", "9", "9"], 1 / 2, 1 / 2, 1),  # both right, though they differ: one vote of two
])
def test_scores_of_one_problem(answers, avg, maj, passed):
    result = scores([TEN], rows(answers))
    assert (result.avg[0], result.maj[0], result.passed[0]) == pytest.approx((avg, maj, passed))
    assert majority(answers, "10") == pytest.approx(maj)


def test_a_truncated_answer_that_is_not_closed_does_not_count(monkeypatch):
    model, tokenizer = load(EMBEDDED)
    texts = ("<answer> 10 </answer>", "<answer> 10", "<answer> 10")
    ids = [tokenizer.encode(text) for text in texts]
    lengths = torch.tensor(list(map(len, ids)))
    fixed = Sampled(pad(ids, "cpu"), lengths, torch.zeros(3, int(lengths.max())),
                     torch.tensor([False, True, False]))
    monkeypatch.setattr(rollouts, "sample", lambda *of: fixed)
    result = evaluate(model, tokenizer, [TEN], 3, Config(max_new_tokens=9))
    assert result.avg[0] == pytest.approx(2 / 3) and result.length == pytest.approx(lengths.float().mean().item())


def test_the_summary_is_in_percent_over_problems():
    got = scores([TEN, TEN], rows(["10", "9", "9", "9"], (3, 5, 7, 9), (False, False, False, True))).summary()
    assert (got["problems"], got["samples"], got["mean_length"], got["truncated"]) == (2, 2, 6, 25)
    assert [got[f"{name}@2"]["mean"] for name in ("avg", "maj", "pass")] == [25, 25, 50]
    assert got["avg@2"]["low"] == 0 and got["avg@2"]["high"] == 50


def test_the_bootstrap_interval_is_close_to_the_normal_approximation():
    values = np.array([1.0] * 120 + [0.0] * 280)    # p = 0.3, n = 400: half-width 1.96 sqrt(p (1 - p) / n)
    half = 1.96 * math.sqrt(0.3 * 0.7 / 400)
    low, high = bootstrap(values)
    assert low == pytest.approx(0.3 - half, abs=0.004) and high == pytest.approx(0.3 + half, abs=0.004)
    assert bootstrap(values) == (low, high)         # the same every time
    assert bootstrap(np.ones(5)) == (1, 1)
