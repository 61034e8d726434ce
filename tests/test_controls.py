"""Control contexts and losses on a part of the tokens, by hand; a context's predictors, written out."""
import re
from dataclasses import replace
from os.path import commonprefix
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from sd.study import gap
from sd.conditions import Teacher, accumulate, feedback
from sd.config import Config
from sd.controls import PARTS, control_text, replaced, restrict
from sd.study.gap import before, gap_table, rank_correlation
from sd.study.horizon import decline
from sd.llm.checkpoint import load
from sd.llm.tokenizer import Tokenizer
from sd.metrics import auroc
from sd.problems import EMBEDDED, Problem, embedded
from sd.rollouts import Critique, Rollout
from sd.steps import parse
from sd.task.symbolic import SymbolicCritic

TOKENIZER = Tokenizer(EMBEDDED / "tokenizer.json")
PROBLEM = Problem("p", "7*8 + 6*9", "110", "first 6 multiplied by 9 makes 54")
WRONG = ("<step_1> 7*8=56 </step_1>\n<step_2> 6*9=52 </step_2>\n<step_3> 56+52=108 </step_3>\n"
         "<answer> 108 </answer>")
RIGHT = ("<step_1> 7*8=56 </step_1>\n<step_2> 6*9=54 </step_2>\n<step_3> 56+54=110 </step_3>\n"
         "<answer> 110 </answer>")


def rollout(text, problem=PROBLEM):
    trace, ids = parse(text), TOKENIZER.encode(text) + [TOKENIZER.eos[0]]
    prompt = [TOKENIZER.control("<problem>"), *TOKENIZER.encode(problem.problem), TOKENIZER.control("<solution>")]
    answer = trace.answer.text
    r = Rollout(problem, prompt, ids, torch.zeros(len(ids)), False, trace, answer, float(answer == problem.answer))
    r.critique = SymbolicCritic()(r)
    return r


def test_what_each_control_shows():
    r = rollout(WRONG)
    assert control_text("answer", r) == "110" and control_text("echo", r) == WRONG
    assert control_text("plan", r) == "<step_1> 7*8= </step_1>\n<step_2> 6*9= </step_2>\n<answer>  </answer>"
    assert control_text("needless", r) == WRONG.replace("7*8=56 <", "7*8=56, so 7*8=56 is correct <")
    assert control_text("empty", r) == ""
    first_wrong = rollout(WRONG.replace("7*8=56", "7*8=57"))
    assert control_text("needless", first_wrong) == first_wrong.trace.text         # no right step to correct


def test_anothers_context_is_never_of_the_same_problem():
    """Of four rollouts of a problem side by side, three were shown a critique of that very problem."""
    a, b, c = (rollout(WRONG, replace(PROBLEM, id=name)) for name in "abc")
    assert replaced("other", ["a", None, "c"], [a, b, c]) == [None, "c", "a"]
    assert replaced("other", ["a1", "a2", "b1", "b2"], [a, a, b, b]) == ["b1", "b1", "a1", "a1"]
    assert replaced("other", ["a1", "a2"], [a, a]) == [None, None]


def test_a_control_takes_the_place_of_the_context():
    shown = {}
    for control in ("off", "none", "empty", "answer", "other"):
        pair = [rollout(WRONG), rollout(WRONG, replace(PROBLEM, solution="then 7 multiplied by 8 makes 56"))]
        feedback(Config("ref", control=control), pair, None, TOKENIZER, 400)
        shown[control] = [TOKENIZER.fast.decode(r.teacher_prompt, skip_special_tokens=False) for r in pair]
    first = "<problem>7*8 + 6*9<reference>"
    assert shown["off"][0] == first + PROBLEM.solution + "<solution>"
    assert shown["other"] == [shown["off"][1], shown["off"][0]]
    assert shown["empty"][0] == first + "<solution>" and shown["answer"][0] == first + "110<solution>"
    assert shown["none"][0] == "<problem>7*8 + 6*9<solution>"


def test_without_a_context_nothing_is_learned_at_the_first_step():
    model, _ = load(EMBEDDED)
    r = rollout(WRONG)
    feedback(Config("ref", control="none"), [r], None, TOKENIZER, 400)
    loss = accumulate(model, Teacher("base", model, 0.0), [r], Config("ref"), len(r.completion))
    assert abs(loss) < 1e-6 and all(p.grad.abs().max() < 1e-6 for p in model.parameters())


def test_the_parts_of_a_rollout():
    def chosen(text, part):
        r = rollout(text)
        restrict(r, part, TOKENIZER)
        return "".join(p for p, w in zip(TOKENIZER.pieces(r.completion), r.weights, strict=True) if w)

    # a tag that closes one step and opens the next is a single token, of the step that it closes
    wrong = "6*9=52 </step_2>\n<step_3> "
    assert chosen(WRONG, "wrong") == wrong and chosen(WRONG, "others") == WRONG.replace(wrong, "")
    assert chosen(WRONG, "correct") == "<step_1> 7*8=56 </step_1>\n<step_2> "
    assert chosen(RIGHT, "correct") == chosen(RIGHT, "others") == RIGHT and chosen(RIGHT, "wrong") == ""
    # `correct` in two: what is right in a wrong rollout, and a right rollout
    assert chosen(WRONG, "before") == chosen(WRONG, "correct") and chosen(RIGHT, "before") == ""
    assert chosen(RIGHT, "right") == RIGHT and chosen(WRONG, "right") == ""
    slip = RIGHT.replace("> 110 <", "> 111 <")
    assert chosen(slip, "wrong") == "111 </answer>"


@pytest.mark.parametrize("part", PARTS)
def test_a_wrong_answer_without_tags_is_in_no_part(part):
    r = rollout(WRONG)
    r.trace = replace(r.trace, answer=None)                 # as if it stood in a box
    r.critique = Critique("D", "", len(r.trace.steps))
    restrict(r, part, TOKENIZER)
    assert r.weights == [0.0] * len(r.completion)


def test_the_loss_on_a_part_is_the_sum_of_its_tokens_and_the_parts_make_the_whole():
    model, _ = load(EMBEDDED)
    losses, gradients = {}, {}
    for part in ("all", *PARTS):
        batch = [rollout(WRONG), rollout(RIGHT)]
        feedback(Config("critique", loss_on=part), batch, SymbolicCritic(), TOKENIZER, 400)
        model.zero_grad()
        losses[part] = accumulate(model, Teacher("base", model, 0.0), batch, Config("critique"), 100)
        gradients[part] = model.lm_head.weight.grad.clone()
    assert losses["wrong"] + losses["others"] == pytest.approx(losses["all"], rel=1e-4)
    torch.testing.assert_close(gradients["wrong"] + gradients["others"], gradients["all"])
    assert losses["before"] + losses["right"] == pytest.approx(losses["correct"], rel=1e-4)
    assert 0 < losses["correct"] < losses["others"] and min(losses["wrong"], losses["right"]) > 0.02


def test_the_share_of_tokens_that_a_signal_ranks_lower():
    assert auroc(np.array([0.0, 3.0, 1.0, 2.0]), 1) == 1 and auroc(np.array([5.0, 3.0, 1.0, 2.0]), 1) == 2 / 3
    assert auroc(np.array([7.0, 7.0, 7.0]), 0) == 0.5 and auroc(np.array([1.0, 0.0, 1.0]), 1) == 0


def test_rank_correlation_by_hand():
    x = np.array([1.0, 2.0, 3.0, 4.0])
    assert rank_correlation(x, np.array([1.0, 8.0, 27.0, 640.0])) == pytest.approx(1)
    assert rank_correlation(x, -x) == pytest.approx(-1)
    # ranks 1 2 3 4 and 1.5 1.5 3 4: covariance 4.5, variances 5 and 4.5
    assert rank_correlation(x, np.array([0.0, 0.0, 5.0, 9.0])) == pytest.approx(4.5 / (5 * 4.5) ** 0.5)
    known = {f"ref {i}": {"lead": float(i), "correct": 0.1 ** i, "wrong": 1.0, "auroc": 0.2 * i, "low": 0.0,
                         "high": 1.0} for i in range(5)}
    arms = {f"ref {i}": [{"curve": [{"avg": 5.0, "tokens": 700, "rollouts": 32},
                                    {"avg": 5.0 + gain, "tokens": 700 + 32 * (99 + gain), "rollouts": 64}]}
                         for gain in (2.0 * i, 4.0 * i)] for i in range(5)}
    text = gap_table(known, arms)
    assert "percent: +1.00 (+1.00 to +1.00); a straight line explains 100% of the variance" in text
    assert "KL on correct steps: -1.00" in text and "first wrong token: +1.00" in text
    assert "| ref 2 | +2.0 | 0.0100 | 1.000 | 0.40 [0.00, 1.00] | +6.0 | 105 |" in text
    svg = gap.figure(known, arms)
    ElementTree.fromstring(svg)
    at = [tuple(map(float, xy)) for xy in re.findall(r'cx="(\S+)" cy="(\S+)"', svg)]
    for one, two, three in (at[:3], at[5:8], at[10:13]):      # linear in the lead; in log KL, to the left
        assert two[0] - one[0] == pytest.approx(three[0] - two[0], abs=0.11)
        assert two[1] - one[1] == pytest.approx(three[1] - two[1], abs=0.11) and two[1] < one[1]


def test_a_contexts_predictors_written_out(monkeypatch):
    """Both prompts of each rollout scored whole, its tokens then chosen by the text before the wrong step."""
    model, tokenizer = load(EMBEDDED)
    problems, seen = embedded("val")[:12], []
    sample = gap.sample_rollouts
    monkeypatch.setattr(gap, "SAMPLES", 2)
    monkeypatch.setattr(gap, "sample_rollouts", lambda *args: seen.extend(sample(*args)) or seen)
    found = before(Config("ref"), problems)
    assert [r.problem for r in seen] == [p for p in problems for _ in range(2)]
    sums, counts = dict.fromkeys(("correct", "wrong"), 0.0), dict.fromkeys(("correct", "wrong"), 0)
    shares = []
    for r in seen:
        wrong, pieces, logp = SymbolicCritic()(r).wrong, tokenizer.pieces(r.completion), []
        for prompt in (r.prompt, [*r.prompt[:-1], tokenizer.control("<reference>"),
                                  *tokenizer.encode(r.problem.solution), r.prompt[-1]]):
            with torch.no_grad():
                logits = model(torch.tensor([prompt + r.completion]))[0, len(prompt) - 1:-1]
            logp.append(torch.log_softmax(logits.double() / 1.1, -1))
        each = (logp[1].exp() * (logp[1] - logp[0])).sum(-1)
        steps = [*r.trace.steps, r.trace.answer]
        starts = np.cumsum([0, *map(len, pieces)])[:-1]
        start, end = (steps[wrong].start, steps[wrong].end) if wrong is not None else (10 ** 6, 10 ** 6)
        for name, chosen in (("correct", starts < start), ("wrong", (starts >= start) & (starts < end))):
            sums[name] += each[torch.from_numpy(chosen)].sum().item()
            counts[name] += chosen.sum()
        if wrong is not None and not r.reward:      # the first token that departs from the critique, which copies
            first = np.flatnonzero(starts <= len(commonprefix([r.trace.text, SymbolicCritic()(r).text])))[-1]
            lead = (logp[0] - logp[1])[range(len(pieces)), r.completion].numpy()
            shares.append(np.mean([value < lead[first] for i, value in enumerate(lead) if i != first]))
    assert found["low"] < found["auroc"] == pytest.approx(np.mean(shares), abs=1e-3) and 0.9 < found["high"] <= 1
    for name in sums:
        assert found[name] == pytest.approx(sums[name] / counts[name], rel=1e-3)
    assert 60 < found["lead"] <= 100                # the teacher is right nine times in ten, the solver seldom
    assert abs(before(Config("ref", control="none"), problems)["correct"]) < 1e-6


def test_when_a_long_run_declined():
    def line(*avgs):
        return {"curve": [{"step": 0, "avg": avgs[0]}] + [
            {"step": 10 * i, "avg": avg, "length": 100.0 + i, "entropy": 0.1 * i}
            for i, avg in enumerate(avgs) if i]}

    text = decline({"ref": [line(5.0, 40.0, 50.0, 46.0, 44.9, 50.0), line(5.0, 40.0, 41.0)]})
    assert text.splitlines()[-1] == ("| ref | 50.0, 20; 41.0, 20 | 40; never | 50.0; 41.0 | 102, 105; 102, 102 | "
                                     "0.200, 0.500; 0.200, 0.200 |")
    # a run that is never better than before has declined as well
    assert decline({"live": [line(5.0, 0.0, 1.0)]}).splitlines()[-1] == (
        "| live | 5.0, 0 | 10 | 1.0 | 101, 102 | 0.100, 0.200 |")
