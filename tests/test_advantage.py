"""The per-token advantage: against a slow computation, on traces written by hand, the page in a browser."""
import json
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from html import unescape
from http.server import ThreadingHTTPServer
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from sd import advantage
from sd.advantage import (FOUND, KINDS, Row, analyse_rollouts, correction, figure, locate, page,
                          sample_rollouts, summarise)
from sd.answers import equal, final_answer
from sd.conditions import feedback
from sd.config import Config
from sd.critic import Critique
from sd.llm.checkpoint import load
from sd.llm.sampling import Sampled
from sd.metrics import bootstrap, ratio
from sd.problems import EMBEDDED, Problem, embedded, write_problems
from sd.prompts import student_prompt, teacher_prompt
from sd.rollouts import Rollout
from sd.steps import parse, render
from sd.task.symbolic import SymbolicCritic
from tests.conftest import easy_problems
from tests.test_faults import Scribe

PROBLEM = Problem("p", "7*8 + 6*9 + 3*4", "122",
                  "first 7 multiplied by 8 makes 56, then 6 multiplied by 9 makes 54, "
                  "then 3 multiplied by 4 makes 12, so 122 is correct")
WRONG = [   # steps, answer: a wrong first product, a wrong sum, a wrong answer after right steps
    (["7*8=54", "6*9=54", "3*4=12", "54+54=108", "108+12=120"], "120"),
    (["7 times 8 is 56", "6 times 9 is 54", "56 plus 54 gives 112", "3 times 4 is 12",
      "112 plus 12 gives 124"], "124"),
    (["7*8=56", "6*9=54", "3*4=12", "56+54=110", "110+12=122"], "126"),
]
QUOTING = ("partial", "full", "omit")
CONFIG, SHOWN = Config("grpo"), Config("critique")
CONTEXTS = {quoting: (SHOWN, SymbolicCritic(quoting)) for quoting in QUOTING} | {"ref": (Config("ref"), None)}
EVIL = "<script>alert(1)</script></style>\u2028<!-- & "
ABOUT = "student solver, teacher solver: 3 wrong rollouts of 1 val problems, 8 rollouts each"


@pytest.fixture(scope="module")
def solver():
    return load(EMBEDDED)


def rollout(tokenizer, steps, answer, problem=PROBLEM, advantage=0.0, text=None):
    ids = tokenizer.encode(text or render(steps, answer))
    ids += [] if text else [tokenizer.fast.token_to_id("<eos>")]
    trace = parse(tokenizer.decode(ids))
    final = final_answer(trace, False)
    return Rollout(problem, student_prompt(tokenizer, problem.problem), ids, torch.zeros(len(ids)), False,
                   trace, final, float(equal(final, problem.answer)), advantage)


@pytest.fixture(scope="module")
def rows(solver):
    model, tokenizer = solver
    rollouts = [rollout(tokenizer, *trace, advantage=a) for trace, a in zip(WRONG, (-0.4, 0.0, -1.0))]
    return analyse_rollouts(model, model, tokenizer, rollouts, CONTEXTS, CONFIG)


def row(problem="p", kinds="bbueaa", grpo=-0.5, end=5, **advantages):
    """A row with a token per letter (before, up to, error, after) and the given A_t."""
    of = Rollout(Problem(problem, "x", "1", "s"), [], list(range(len(kinds))), -torch.ones(len(kinds)), False,
                 parse(kinds), None, 0.0, grpo)
    views = {c: replace(of, critique=Critique("D", "context", 0), logprobs=torch.tensor(a, dtype=float) - 1)
             for c, a in advantages.items()}
    return Row(of, views, list(kinds), [0.0] * len(kinds), kinds.index("u"), kinds.index("e"), end)


def test_advantages_are_those_of_a_slow_computation_token_by_token(solver, rows):
    model, tokenizer = solver

    def slow(prompt, ids):
        out = []
        for t, token in enumerate(ids):
            with torch.no_grad():
                logits = model(torch.tensor([prompt + ids[:t]]))[0, -1]
            p = torch.softmax(logits.double() / 1.1, -1)
            out.append(p[token].log().item())
        return np.array(out)

    assert len(rows) == 3
    for r, (steps, answer) in zip(rows, WRONG):
        ids = r.rollout.completion
        student = slow(student_prompt(tokenizer, PROBLEM.problem), ids)
        assert list(r.views) == ["partial", "full", "omit", "ref"]
        for name in QUOTING:
            critique = CONTEXTS[name][1](rollout(tokenizer, steps, answer)).text
            teacher = slow(teacher_prompt(tokenizer, PROBLEM.problem, "critique", critique), ids)
            assert r.views[name].critique.text == critique
            np.testing.assert_allclose(r.advantage(name), teacher - student, atol=2e-4)
        teacher = slow(teacher_prompt(tokenizer, PROBLEM.problem, "ref", PROBLEM.solution), ids)
        np.testing.assert_allclose(r.advantage("ref"), teacher - student, atol=2e-4)
        assert r.advantage("grpo").tolist() == [r.rollout.advantage] * len(ids)
    assert rows[0].advantage("partial")[rows[0].first] < -1      # the teacher does see the error


def test_kinds_of_tokens_of_traces_written_by_hand(rows):
    of = [["".join(p for p, k in zip(r.pieces, r.places()) if min(k, 3) == kind) for kind in range(4)]
          for r in rows]
    assert of[0][:3] == ["", "<step_1> 7*8=5", "4"]         # 54 for 56: the 5 is right
    assert of[0][3].startswith(" </step_1>\n<step_2> 6*9=54")
    assert of[1][:3] == ["<step_1> 7 times 8 is 56 </step_1>\n<step_2> 6 times 9 is 54 </step_2>\n<step_3> ",
                         "56 plus 54 gives 11", "2"]        # the tags between two steps are the first one's
    assert (of[2][0].endswith("110+12=122 </step_5>\n<answer> ")
            and of[2][1:] == ["12", "6", " </answer>"])     # and <eos>
    assert [("".join(r.pieces[r.start:r.end])) for r in rows] == [
        "".join(p for p, k in zip(r.pieces, r.places()) if 0 < k < 4) for r in rows] == [
        "<step_1> 7*8=54 </step_1>\n<step_2> ", "56 plus 54 gives 112 </step_3>\n<step_4> ", "126 </answer>"]
    assert all((r.places() == 2).sum() == 1 for r in rows)


@pytest.mark.parametrize("pieces, right, number, expected", [
    (["<step_1> ", "3", "=", "9", " </step_1>\n<step_2> ", "4", "=", "2", "9", " </step_2>"], "4=28", 1,
     (5, 8, 10)),
    (["<step_1> ", "12", "=", "3", " </step_1>"], "12=36", 0, (0, 4, 5)),        # too short: must go on here
    (["<step_1> ", "12", "=", "36", "4", " </step_1>"], "12=36", 0, (0, 4, 6)),  # says too much
    (["<step_1> ", "12", "=", "3"], "12=36", 0, (0, 3, 4)),                      # not closed, not continued
    (["<step_1> ", "12", "=", "3", ""], "12=36", 0, (0, 4, 5)),                  # ended: <eos> is the error
    (["<step_1>", "  12=34 ", "</step_1>"], "12=36", 0, (0, 1, 3)),              # spaces are not its text
    (["<step_1> 3 </step", "_1><step_2> 4", " </step_2>"], "5", 1, (1, 1, 3)),   # a token across the border
    (["<step_1> ", "a", " </step_1>\n", "<step_2> ", "b", " </step_2>"], "", 1, (3, 4, 6)),  # no counterpart
])
def test_the_place_of_the_error(pieces, right, number, expected):
    assert locate(pieces, parse("".join(pieces)).steps[number], right) == expected


def test_the_corrected_step_follows_the_copy_even_with_steps_inserted(solver):
    def corrected(steps, wrong, critique, answer="1"):
        step, right = correction(parse(render(steps, answer)), Critique("D", render(*critique), wrong))
        assert step.text == [*(" ".join(s.split()) if "\n" not in s else s for s in steps), answer][wrong]
        return right

    trace = ["7*8=56", "56+54=110", "3*4=13", "110+13=123"]
    critique = ["7*8=56", "6*9=54", "56+54=110", "3*4=12", "110+12=122"], "122"
    assert corrected(trace, 2, critique) == "3*4=12"
    assert corrected(trace, 0, critique) == "7*8=56"
    assert corrected(trace, 4, critique, "123") == "122"                            # the answer
    assert corrected(trace, 3, (["7*8=56", "56+54=110", "3*4=13"], "122")) == ""  # dropped
    # a step said twice; a model's copy, that is not verbatim
    assert corrected(list("abax"), 3, (list("abay"), "2")) == "y"
    assert corrected(["a  =\n1", "b"], 1, (["a = 1", "c"], "2")) == "c"


def test_means_medians_shares_and_tokens_by_hand():
    summary = summarise([row(kinds="bbueaa", partial=[0.1, 0.7, 0, -4, -1, 1]),
                         row("q", kinds="ueaaa", end=2, partial=[0.2, -6, 0, 0, -0.6])])
    first, after = summary["partial"]["first wrong token"], summary["partial"]["after it"]
    assert (first["mean"], first["median"], first["below"], first["above"], first["tokens"]) == (
        -5, -5, 1, 0, 2)
    assert (first["low"], first["high"]) == (-6, -4)
    assert after["mean"] == pytest.approx(-0.6 / 5) and after["median"] == 0 and after["tokens"] == 5
    assert (after["below"], after["above"]) == (0.4, 0.2)
    before = summary["partial"]["correct steps before"]
    assert before["mean"] == pytest.approx(0.4) and before["above"] == 0.5 and before["low"] == before["high"]
    assert all(summary["grpo"][kind]["mean"] == -0.5 for kind in KINDS)


def test_finding_the_wrong_token_by_hand():
    """The error is token 3 of six, and token 1 of five: 4 and 3 of the others have a larger A_t."""
    rows = [row(kinds="bbueaa", partial=[-0.5, 2, 0.3, -1, -1, -4]),       # one is lower, one is the same
            row("q", kinds="ueaaa", end=2, partial=[0.2, -6, 0, -7, -0.6])]
    share = summarise(rows)["partial"][FOUND]
    assert share["mean"] == pytest.approx((3.5 / 5 + 3 / 4) / 2)
    assert (share["low"], share["high"]) == (pytest.approx(0.7), pytest.approx(0.75))
    assert summarise(rows)["grpo"][FOUND]["mean"] == 0.5
    early = summarise([row(kinds="ueaaa", partial=[0.0] * 5)])                          # no correct step
    assert KINDS[0] not in early["partial"] and KINDS[1] in early["partial"]


def test_intervals_are_those_of_a_known_distribution():
    """400 problems of 5 tokens of equal value, normal: half-width 1.96 / sqrt(400), not 1.96 / sqrt(2000)."""
    values = np.random.default_rng(5).normal(2, 1, 400)
    of = np.arange(2000) % 400
    found = ratio(values[of], np.ones(2000), of)
    assert found["mean"] == pytest.approx(values.mean())
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.05)
    sparse = ratio(np.array([3.0, 0, 0]), np.array([1, 0, 0]), np.arange(3))    # most draws have none
    assert (sparse["low"], sparse["high"]) == (3, 3)


def test_intervals_cover_the_truth_as_often_as_they_say(monkeypatch):
    monkeypatch.setattr("sd.metrics.DRAWS", 400)
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(300):
        n = rng.integers(1, 9, 60)                                          # tokens per problem
        low, high = bootstrap(n * rng.normal(1, 1, 60), n)       # as `ratio` calls it
        hits += low <= 1 <= high
    assert 0.90 <= hits / 300 <= 0.98


def test_rollouts_that_the_critic_calls_right_or_malformed_are_left_out(solver):
    model, tokenizer = solver
    right, wrong = rollout(tokenizer, WRONG[2][0], "122"), rollout(tokenizer, *WRONG[0])

    class Unsure(SymbolicCritic):
        def batch(self, rollouts):
            return [Critique("", "", malformed="no tags") if "54+54" in r.trace.text else c
                    for r, c in zip(rollouts, super().batch(rollouts))]

    def found(contexts, *rollouts):
        return [r.rollout for r in analyse_rollouts(model, model, tokenizer, [*rollouts], contexts, CONFIG)]

    assert found(CONTEXTS, right, wrong) == [wrong] and found(CONTEXTS, right) == []
    assert found({"partial": (SHOWN, Unsure())}, right, wrong) == [] and found(CONTEXTS) == []
    other = rollout(tokenizer, *WRONG[1])
    assert found({"any": (SHOWN, Unsure())}, wrong, other) == [other]
    assert found({"partial": (SHOWN, SymbolicCritic()), "other": (SHOWN, Unsure())}, wrong, other) == [other]   # not under all
    assert all(r.critique is None and r.teacher_prompt is None for r in (right, wrong, other))  # copies have


def test_a_wrong_answer_in_a_box_after_right_steps_has_no_step_to_show(solver):
    """A language model's critique named the answer as the wrong step, and there was none: a traceback."""
    model, tokenizer = solver
    steps = "<step_1> 7*8=56 </step_1>\n<step_2> 6*9=54 </step_2>"
    boxed = SimpleNamespace(batch=lambda rollouts: [Critique("D", steps + "\n<answer> 122 </answer>", 2)])
    assert analyse_rollouts(model, model, tokenizer, [rollout(tokenizer, [], "", text=steps)],
                            {"critique": (SHOWN, boxed)}, CONFIG) == []


def test_another_teacher_reads_and_the_student_stays(solver, rows):
    model, tokenizer = solver
    other, _ = load(EMBEDDED)
    with torch.no_grad():
        other.lm_head.weight.mul_(0)
    r, = analyse_rollouts(model, other, tokenizer, [rows[0].rollout], CONTEXTS, CONFIG)
    np.testing.assert_allclose(r.rollout.logprobs, rows[0].rollout.logprobs, atol=1e-5)
    np.testing.assert_allclose(r.views["partial"].logprobs, -np.log(tokenizer.vocab_size), atol=1e-5)


def test_grpo_compares_a_rollout_with_its_group(solver, monkeypatch):
    model, tokenizer = solver
    good, bad = (rollout(tokenizer, *trace).completion for trace in ((WRONG[2][0], "122"), WRONG[0]))
    group = [good, bad, bad, bad] + [bad] * 4
    ids = torch.tensor([y + [0] * (max(map(len, group)) - len(y)) for y in group])
    sampled = Sampled(ids, torch.tensor([len(y) for y in group]), torch.zeros_like(ids, dtype=torch.float),
                       torch.zeros(8, dtype=torch.bool))
    monkeypatch.setattr("sd.rollouts.sample", lambda *args: sampled)
    rollouts = sample_rollouts(model, tokenizer, [PROBLEM, PROBLEM], 4, CONFIG, "test")
    feedback(Config("grpo", group=4), rollouts, None, tokenizer, 0)
    found = analyse_rollouts(model, model, tokenizer, rollouts, CONTEXTS, CONFIG)
    for row, expected in zip(found, [-1 / 3 ** 0.5] * 3 + [0] * 4, strict=True):
        np.testing.assert_allclose(row.advantage("grpo"), [expected] * len(bad), rtol=1e-5)
        assert row.rollout.completion == bad
    sampled.logprobs[0] = float("nan")
    with pytest.raises(FloatingPointError, match="not finite"):
        sample_rollouts(model, tokenizer, [PROBLEM, PROBLEM], 4, CONFIG, "test")


def data_of(html):
    return re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)[1]


@pytest.fixture(scope="module")
def evil(rows):
    """The page of rows one of which has markup in a token, a context, its problem and a context's name."""
    bad = row(kinds="bueaa", partial=[0.1, 0.2, -4, 0, 0], **{"<b>&": [0.0] * 5})
    bad.pieces[2] = EVIL
    bad.views["partial"].critique = Critique("D", EVIL, 0)
    bad.rollout.problem = Problem("evil", EVIL, EVIL)
    return page([bad], summarise([bad]), EVIL)


def test_markup_in_a_rollout_stays_text(evil):
    data = json.loads(data_of(evil))
    shown = data["rollouts"][0]
    assert (shown["pieces"][2] == shown["views"]["partial"]["critique"] == shown["rollout"]["problem"]
            == data["about"] == EVIL)
    assert ("alert(1)</" not in evil and "<script>alert" not in evil
            and "\u2028" not in evil and "<b>" not in evil)
    assert not set("<>&") & set(data_of(evil))
    template = advantage.TEMPLATE.read_text()
    assert [evil.count(tag) for tag in ("<script", "</script", "</style", "<!--")] == [2, 2, 2, 0]
    assert "innerHTML" not in template and "eval(" not in template and "http" not in re.sub(
        r"http-equiv|http://www.w3.org/2000/svg", "", template)
    assert ("default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
            in template)


def test_the_page_shows_twelve_rollouts_at_most_spread_over_all():
    many = [row(str(i), grpo=-float(i), partial=[0, 0, 0, -1, 0, i]) for i in range(60)]
    shown = json.loads(data_of(page(many, summarise(many), ABOUT)))["rollouts"]
    assert [r["rollout"]["advantage"] for r in shown] == [-5.0 * i for i in range(12)]
    for count in (1, 3, 12, 13, 25):
        few = json.loads(data_of(page(many[:count], summarise(many[:count]), ABOUT)))["rollouts"]
        assert min(count, 7) <= len(few) <= 12 and few[0]["rollout"]["advantage"] == 0


@pytest.mark.parametrize("longest, ends", [({}, (-10, 1)), ({"low": -16.8, "high": -0.001}, (-30, 1)),
                                           ({"high": 3.2, "low": -400}, (-1000, 10))])
def test_the_figure_is_an_svg_whose_bars_are_the_means_on_an_axis_beyond_the_longest(rows, longest, ends):
    summary = summarise(rows)
    for of in summary.values():                 # so that the longest is the one given
        for kind in KINDS:
            of[kind] = {key: np.clip(value, -9.5, 0.95) for key, value in of[kind].items()}
    summary["partial"]["first wrong token"] |= longest
    svg = ElementTree.fromstring(figure(summary))
    space = {"s": "http://www.w3.org/2000/svg"}
    labels = ["".join(t.itertext()) for t in svg.findall("s:text", space)]
    for name, of in summary.items():
        for kind in KINDS:
            assert kind in labels and name in labels
            written = [f"{of[kind][key]:.2f}".replace("-0.00", "0.00") for key in ("mean", "low", "high")]
            assert "{} [{}, {}]".format(*written).replace("-", "\u2212") in labels
    bars = [r for r in svg.findall("s:rect", space) if r.get("class") != "card"]
    assert len(bars) == 4 * 5 and {r.get("class") for r in bars} == {"blue", "orange"}
    assert any("logarithmic" in label for label in labels)
    zero, = [p for p in svg.findall("s:path", space) if p.get("class") == "zero grey"]
    at = float(re.match(r"M([\d.]+)", zero.get("d"))[1])
    whiskers = [p.get("d") for p in svg.findall("s:path", space) if p.get("class") == ""]
    means = [of[kind] for kind in KINDS for of in summary.values()]
    whole = np.log1p(-ends[0] / 0.1) + np.log1p(ends[1] / 0.1)         # in 266 pixels
    grid = [p.get("d") for p in svg.findall("s:path", space) if p.get("class") == "grid"]
    assert [float(re.match(r"M([\d.]+)", d)[1]) for d in (grid[0], grid[-1])] == [84, 350]
    assert {f"{end:g}".replace("-", "\u2212") for end in ends} <= set(labels)
    for r, d, m in zip(bars, whiskers, means, strict=True):
        left, right = float(r.get("x")), float(r.get("x")) + float(r.get("width"))
        assert (r.get("class") == "blue") == (m["mean"] > 0)
        assert (left if m["mean"] > 0 else right) == pytest.approx(at, abs=0.2)
        low, high = map(float, re.match(r"M([\d.]+) .*L([\d.]+) ", d).groups())
        assert 83.9 <= low <= (right if m["mean"] > 0 else left) + 0.1 <= high + 0.25 <= 350.3
        scaled = np.log1p(abs(m["mean"]) / 0.1)
        assert abs(left - right) == pytest.approx(266 * scaled / whole, abs=0.2)


def browse(html, tmp_path, script=""):
    """The page's DOM after its scripts ran; `script` is a visitor."""
    file = tmp_path / "page.html"
    file.write_text(html + (f"<script>{script}</script>" if script else ""), encoding="utf-8")
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu",
               f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", "--window-size=1200,900",
               "--dump-dom", file.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120).stdout


needs_chromium = pytest.mark.skipif(shutil.which("chromium") is None,
                                    reason="no chromium to open the page with")


@needs_chromium
def test_a_browser_renders_every_token_in_every_context(rows, tmp_path):
    visitor = ("""
      const box = (id) => document.getElementById(id).getBoundingClientRect();
      const wide = document.querySelector(".wide");
      const overflows = (one) => one.scrollWidth > one.clientWidth, seen = [overflows(wide)];
      seen.push(box("readout").top >= box("what").bottom, box("readout").bottom <= box("tokens").top);
      document.querySelector("main").style.width = "390px";                   // a phone
      seen.push(overflows(wide), overflows(document.documentElement));
      document.documentElement.dataset.seen = JSON.stringify(seen);""")
    dom = browse(page(rows[:1], summarise(rows), ABOUT), tmp_path, visitor)
    cut_off, below, above, scrolls, page_scrolls = json.loads(re.search(r'data-seen="([^"]*)"', dom)[1])
    assert not cut_off and below and above and scrolls and not page_scrolls
    assert "data-error" not in dom and "first wrong token" in dom
    cells = re.findall(r'<td class="([^"]*)" role="gridcell" tabindex="(-?\d)" aria-label="([^"]*)"', dom)
    assert len(cells) == 5 * len(rows[0].pieces) and [c[1] for c in cells].count("0") == 1
    chosen, = [label for _, tabindex, label in cells if tabindex == "0"]
    assert chosen.startswith(f"partial, token {rows[0].first + 1} “4” (first wrong token): A = −")
    assert f">{unescape(chosen)}</p>" in unescape(dom)              # the line below says what the cell is
    assert dom.count("<details>") == 4 and PROBLEM.solution in dom
    heads = re.findall(r'<th class="token[^"]*" scope="col">([^<]*)</th>', dom)
    assert [unescape(h) for h in heads] == rows[0].pieces[:-1] + ["⟨end⟩"]


@needs_chromium
def test_a_browser_shows_markup_as_text(evil, tmp_path):
    dom = browse(evil, tmp_path)
    assert "data-error" not in dom and len(re.findall('role="gridcell"', dom)) == 3 * 5
    assert "&lt;script&gt;alert(1)&lt;/script&gt;&lt;/style&gt;" in dom and "<script>alert" not in dom
    assert dom.count("<script") == 2 and "<b>&amp;</b>" not in dom


@needs_chromium
def test_arrow_keys_move_between_tokens_and_buttons_between_rollouts(tmp_path):
    many = [row(str(i), grpo=-float(i), partial=[0, 0, 0, -1 - i, 0, 2], ref=[0, 0.5, 0, -2, 0, 0])
            for i in range(3)]
    visitor = ("""
      const seen = [], note = () => seen.push(document.activeElement.getAttribute("aria-label") ===
        document.getElementById("readout").textContent ? """
          """document.getElementById("readout").textContent : "differs");
      document.querySelector('[tabindex="0"]').focus(); note();
      for (const key of """
        """["ArrowRight", "ArrowDown", "Home", "ArrowLeft", "End", "ArrowDown", "ArrowDown", "ArrowUp"]) {
        document.activeElement.dispatchEvent("""
          """new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true })); note();
      }
      document.getElementById("before").click();
      seen.push(document.getElementById("choose").value);
      document.documentElement.dataset.seen = JSON.stringify(seen);""")
    dom = browse(page(many, summarise(many), ABOUT), tmp_path, visitor)
    assert "data-error" not in dom
    seen = json.loads(unescape(re.search(r'data-seen="([^"]*)"', dom)[1]))
    assert [re.match(r"(\w+), token (\d)", s).groups() for s in seen[:-1]] == [
        ("partial", "4"), ("partial", "5"), ("ref", "5"), ("ref", "1"), ("ref", "1"), ("ref", "6"),
        ("grpo", "6"), ("grpo", "6"), ("ref", "6")]
    assert "A = −1.000; teacher 0.135, student 0.368" in seen[0] and seen[-1] == "2"   # from first to last


@needs_chromium
def test_a_failing_script_leaves_a_mark(evil, tmp_path):
    """Otherwise the absence of the mark in the tests above would say nothing."""
    assert "data-error" in browse(evil.replace('"rollouts": [', '"rollouts": {"0": [', 1), tmp_path)


def run(capsys, monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["sd.advantage", *map(str, args)])
    try:
        status = advantage.main()
    except SystemExit as end:
        status = end.code
    return status, *capsys.readouterr()


def test_the_command_prints_a_table_and_writes_its_files(capsys, monkeypatch, tmp_path):
    files = [tmp_path / f"a.{name}" for name in ("json", "html", "svg")]
    write_problems(tmp_path / "val.jsonl", easy_problems(9))    # grpo has a signal
    options = ["--data", tmp_path / "val.jsonl", "--problems", 6, "--samples", 4, "--seed", 3]
    status, out, err = run(capsys, monkeypatch, *options,
                           *[x for f in files for x in (f"--{f.suffix[1:]}", f)])
    assert status == 0 and err == ""
    numbers = json.loads(files[0].read_text())
    tokens = numbers["contexts"]["partial"]["first wrong token"]["tokens"]
    assert numbers["about"] == out.splitlines()[0] == (
        f"student the embedded solver, teacher the embedded solver: {tokens} wrong rollouts "
        "of 6 val problems, 4 rollouts each, temperature 1.1, seed 3")
    assert numbers["right"] == 24 - tokens and numbers["lucky"] < numbers["right"] and out.splitlines()[1] == (
        f"{24 - tokens} rollouts are right, {numbers['lucky']} of them with wrong steps whose errors cancel")
    assert list(numbers["contexts"]) == ["partial", "full", "omit", "ref", "grpo"]
    partial = numbers["contexts"]["partial"]
    assert partial["first wrong token"]["mean"] < -2
    for name, of in numbers["contexts"].items():
        line, = [line for line in out.splitlines() if line.startswith(name + " ")]
        assert all(f"{of[kind]['mean']:.2f} [" in line for kind in (*KINDS, FOUND))
    assert json.loads(data_of(files[1].read_text()))["summary"] == numbers["contexts"]
    assert figure(numbers["contexts"]) == files[2].read_text()
    assert partial[FOUND]["mean"] > 0.9 and numbers["contexts"]["grpo"][FOUND]["mean"] == 0.5
    assert all(f"{name}: {of['mean']:.2f} [" in out for name, of in numbers["student"].items())
    table, *written = out.rpartition("]\n")
    assert written[1].splitlines() == [f"written: {f}" for f in files]
    assert run(capsys, monkeypatch, *options)[1] == table + "]\n"       # the seed determines it


def test_problems_of_ones_own_and_a_critic_behind_a_server(capsys, monkeypatch, tmp_path):
    """A server that writes as the symbolic critic: the advantages are those of its partial quoting."""
    rows = [{"id": p.id, "problem": p.problem, "answer": p.answer} for p in embedded("val")[:6]]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = ["--problems", 6, "--samples", 4, "--seed", 3]
    with ThreadingHTTPServer(("127.0.0.1", 0), Scribe) as server:
        server.left, server.keys = 10_000, set()
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        status, out, err = run(capsys, monkeypatch, *options, "--data", tmp_path / "mine.jsonl", "--json",
                               tmp_path / "served.json", "--critic",
                               f"http://127.0.0.1:{server.server_port}/v1#scribe")
        server.shutdown()
    assert status == 0 and "of 6 mine problems" in out, err
    assert run(capsys, monkeypatch, *options, "--json", tmp_path / "exact.json")[0] == 0
    served, exact = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("served", "exact"))
    assert list(served["contexts"]) == ["critique", "grpo"]
    assert served["contexts"]["critique"] == exact["contexts"]["partial"]


@pytest.mark.parametrize("args, fact", [
    (["nowhere"], "nowhere"), (["--teacher", "nowhere"], "nowhere"), (["--samples", "0"], "--samples"),
    (["--temperature", "0"], "--temperature"), (["--problems", "0"], "--problems"),
    (["--critic-tokens", "0"], "--critic-tokens"), (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
    (["--max-new-tokens", "3", "--problems", "2"], ": 0 wrong rollouts"),
])
def test_what_cannot_be_done_is_said_in_a_sentence(args, fact, capsys, monkeypatch):
    status, out, err = run(capsys, monkeypatch, *args)
    assert status == 2 and out == "" and fact in err.strip().split("\n")[-1] and "Traceback" not in err
    assert err.count("\n") == 1 or err.startswith("usage:")
