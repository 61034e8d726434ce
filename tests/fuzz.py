"""2,000 random inputs to each parser, made of its own words and of anything else: only our own exceptions.

It takes 40 seconds, so test_hostile.py runs it in a process of its own, beside the other tests.
"""
import json

import pytest

from sd import UserError
from sd.answers import equal, final_answer
from sd.critic import align
from sd.llm.checkpoint import read_config
from sd.problems import EMBEDDED, read_problems
from sd.scribe import HERO, RULES, read_critique
from sd.steps import parse, render, token_span
from tests.test_critic import critique_of, rollout

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import strategies as st

RIGHT = render(["7*8=56", "6*9=54", "3*4=12", "56+54=110", "110+12=122"], "122")
WRONG = render(["7*8=56", "6*9=52", "3*4=12", "56+52=108", "108+12=120"], "120")
inputs = hypothesis.given
many = hypothesis.settings(max_examples=2000, deadline=None, derandomize=True, database=None)


def texts(*words, longest=12):
    return st.text(max_size=80) | st.lists(st.sampled_from(words), max_size=longest).map("".join)


traces = texts(
    "<step_1>", "</step_1>", "<step_2>", "</step_9999>", "<answer>", "</answer>", "7*8=56", "56+54=110",
    "7 times 8 is 56", "<step_", ">", "\n", " ", "\x00", "\ud7ff", "<|im_start|>", "correct", "9" * 30)
answers = texts(
    "\\frac", "\\sqrt", "{", "}", "(", ")", "[", "]", "\\{", "\\}", "^", "_", ",", "1", "23", ".5", "x", "ab",
    "+", "-", "*", "/", "=", "\\pm", "\\cup", "\\in", "<", "\\pi", "\\text{", "cm", " ", "$", "\\boxed{", "&",
    "\\\\", "|", "\\begin{pmatrix}", "\\end{pmatrix}", "\\sin", "or", "<answer>", "#### ",
    "\n", "%", "!", "9" * 30, "e5", "1/2", " 000", ",000", "\\binom", "\\lfloor", "\\rfloor", "\\log_", "<=", "e^", "i", "million",
    longest=20)
critiques = texts(
    "<step_1>", "</step_1>", "<step_2>", "</step_2>", "<answer>", "</answer>", "122", "...", "…", "<",
    "</think>", "7*8=56", HERO, "\n", "\ud800", RIGHT, WRONG, RULES)
problems = st.binary(max_size=200) | traces.map(lambda t: json.dumps({"problem": t, "answer": t}).encode())
values = (st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
          | st.lists(st.integers(), max_size=3)
          | st.dictionaries(st.text(max_size=9), st.integers(), max_size=3))
config = json.loads((EMBEDDED / "config.json").read_text())


@many
@inputs(traces)
def test_steps(text):
    trace = parse(text)
    for step in trace.steps + ([trace.answer] if trace.answer else []):
        assert 0 <= step.start < step.end <= len(text)
        assert token_span(list(text), step.start, step.end) == (step.start, step.end)
    plain = [step.text for step in trace.steps if step.text and "<" not in step.text]
    assert [step.text for step in parse(render(plain, "1")).steps] == plain


@many
@inputs(traces, st.sampled_from(("partial", "full", "omit")), st.sampled_from((0.0, 0.5)), st.booleans())
def test_the_symbolic_critic(text, quoting, noise, truncated):
    critique = critique_of(text, truncated=truncated, quoting=quoting, noise=noise)
    assert critique.case in tuple("ABCD") and parse(critique.text).answer is not None
    assert (critique.wrong is None) == (critique.case != "D")
    assert critique.wrong is None or 0 <= critique.wrong <= len(parse(text).steps)


@many
@inputs(critiques, st.booleans(), critiques, st.booleans())
def test_what_a_scribe_writes(text, truncated, output, cut_off):
    written = rollout(text, truncated=truncated)
    critique = read_critique(written, output, cut_off)
    trace = parse(critique.text)
    if critique.malformed:
        assert critique.case == "" and critique.wrong is None and critique.text == output[:2000]
    else:
        assert critique == align(written, output) and not cut_off
        assert critique.case in tuple("ABCD") and trace.answer.text == "122" and trace.steps
        assert critique.wrong is None or 0 <= critique.wrong <= len(written.trace.steps)
        assert (critique.wrong is None) <= (critique.case != "D")


@many
@inputs(answers, answers)
def test_answers(left, right):
    assert equal(left, left) and equal(left, right) is equal(right, left)
    for truncated in (False, True):
        final = final_answer(parse(left), truncated)
        assert final is None or final == final.strip() != "" and final in left


@many
@inputs(data=problems)
def test_problems(tmp_path_factory, data):
    (file := tmp_path_factory.getbasetemp() / "problems.jsonl").write_bytes(data)
    try:
        assert all(p.problem and p.answer for p in read_problems(file))
    except UserError as error:
        assert str(error).isprintable()


@many
@inputs(entries=st.dictionaries(
    st.sampled_from([*config, "rope_scaling", "rope_parameters", "layer_types"]), values, max_size=3))
def test_a_checkpoints_config(tmp_path_factory, entries):
    ((folder := tmp_path_factory.getbasetemp()) / "config.json").write_text(json.dumps(config | entries))
    try:
        read_config(folder)
    except UserError as error:
        assert str(error).isprintable()
