"""2,000 random inputs to each parser, made of its own words and of anything else: only our own exceptions.

It takes 40 seconds, so test_hostile.py runs it in a process of its own, beside the other tests.
"""
import json

import pytest

from sd import UserError
from sd.answers import canonical, equal, final_answer
from sd.llm.checkpoint import read_config
from sd.critic import QUOTING
from sd.task.symbolic import SymbolicCritic
from sd.problems import EMBEDDED, Problem, read_problems
from sd.scribe import HERO, RULES, align
from sd.steps import parse, render, token_span

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import strategies as st

PROBLEM = Problem("p", "7*8 + 6*9 + 3*4", "122")
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
    "\n", "%", longest=20)
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
@inputs(traces, st.sampled_from(QUOTING), st.booleans())
def test_the_symbolic_critic(text, quoting, truncated):
    critique = SymbolicCritic(quoting)(PROBLEM, text, truncated)
    assert critique.case in tuple("ABCD") and parse(critique.text).answer is not None


@many
@inputs(critiques, st.booleans(), critiques)
def test_what_a_scribe_writes(text, truncated, output):
    critique = align(PROBLEM, text, truncated, output)
    steps, written = parse(critique.text), parse(text).steps
    if critique.malformed:
        assert critique.case == "" and critique.wrong is None
    else:
        assert critique.case in tuple("ABCD") and steps.answer.text == "122" and steps.steps
        assert [step.number for step in steps.steps] == list(range(1, len(steps.steps) + 1))
        assert critique.wrong is None or 0 <= critique.wrong <= len(written)
        assert (critique.wrong is None) <= (critique.case != "D")


@many
@inputs(answers, answers)
def test_answers(left, right):
    assert equal(left, left) and equal(left, right) is equal(right, left)
    assert (canonical(left) == canonical(right)) <= equal(left, right)
    for truncated in (False, True):
        final = final_answer(left, truncated)
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
