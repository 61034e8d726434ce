"""The exact critic, on traces and critiques written by hand. 7*8=56, 6*9=54, 3*4=12, together 122."""
import random
import re

import pytest
import torch

from sd import UserError
from sd.answers import equal, final_answer
from sd.problems import Problem
from sd.rollouts import Rollout
from sd.steps import parse
from sd.task.symbolic import SymbolicCritic

PROBLEM = Problem("p", "7*8 + 6*9 + 3*4", "122")
FIRST = ["7*8=56", "6*9=54", "3*4=12", "56+54=110", "110+12=122"]       # products first
MIXED = ["7*8=56", "6*9=54", "56+54=110", "3*4=12", "110+12=122"]       # interleaved
WORDS = ["7 times 8 is 56", "6 times 9 is 54", "56 plus 54 is 110", "3 times 4 is 12",
         "110 plus 12 is 122"]
WORDS_FIRST = [WORDS[i] for i in (0, 1, 3, 2, 4)]
OTHER = ["3*4=12", "8*7=56", "6*9=54", "12+56=68", "68+54=122"]         # order, factors


def rollout(text, problem=PROBLEM, truncated=False):
    """What `roll` makes of a completion that says `text`; there are no tokens."""
    trace = parse(text)
    answer = final_answer(trace, truncated)
    return Rollout(problem, [], [], torch.zeros(0), truncated, trace, answer,
                   float(equal(answer, problem.answer)))


def critique_of(text, problem=PROBLEM, truncated=False, quoting="partial", noise=0.0):
    critic = SymbolicCritic(quoting, noise)
    critic.check([problem])
    critiques = critic.batch([rollout(text, problem, truncated)])
    assert len(critiques) == 1 and critiques[0].malformed == ""
    return critiques[0]


def write(steps, answer="122"):
    lines = [f"<step_{n}> {text} </step_{n}>" for n, text in enumerate(steps, 1)]
    return "\n".join(lines + ([f"<answer> {answer} </answer>"] if answer is not None else []))


CASES = {   # name: steps, answer, case, index of the first wrong step, steps of the critique
    "A symbols": (FIRST, "122", "A", None, FIRST),
    "A interleaved": (MIXED, "122", "A", None, MIXED),
    "A words": (WORDS, "122", "A", None, WORDS),
    "A spaced": ([t.replace("*", " * ").replace("+", " + ").replace("=", " = ") for t in FIRST], "122", "A",
                 None, [t.replace("*", " * ").replace("+", " + ").replace("=", " = ") for t in FIRST]),
    "D spaced": (["7 × 8 = 56", "6 × 9 = 52", "3 × 4 = 12", "56 + 52 = 108", "108 + 12 = 120"], "120", "D", 1,
                 ["7 × 8 = 56", "6 * 9 = 54", "3 * 4 = 12", "56 + 54 = 110", "110 + 12 = 122"]),
    "A words products first": (WORDS_FIRST, "122", "A", None, WORDS_FIRST),
    "A own order": (OTHER, "122", "A", None, OTHER),
    "A says a true step twice": ([FIRST[0], *FIRST], "122", "A", None, [FIRST[0], *FIRST]),
    "A answer spelt otherwise": (FIRST, "122.0", "A", None, FIRST),
    "B missing product": (MIXED[:3] + MIXED[4:], "122", "B", None, MIXED),
    "B missing product in words": (WORDS[:3] + WORDS[4:], "122", "B", None, WORDS),
    "B missing sum": (FIRST[:3] + FIRST[4:], "122", "B", None, FIRST),
    "B missing end": (FIRST[:4], "122", "B", None, FIRST),
    "B answer alone": ([], "122", "B", None, FIRST),
    "C symbols": (FIRST[:2], None, "C", None, FIRST),
    "C interleaved": (MIXED[:3], None, "C", None, MIXED),
    "C words": (WORDS[:2], None, "C", None, WORDS_FIRST),
    "C goes on in the last wording": (["8*7 is 56", "6 times 9 makes 54"], None, "C", None,
                                      ["8*7 is 56", "6 times 9 makes 54", "3 times 4 makes 12",
                                       "56 plus 54 makes 110", "110 plus 12 makes 122"]),
    "C own order": (OTHER[:1], None, "C", None, ["3*4=12", "7*8=56", "6*9=54", "12+56=68", "68+54=122"]),
    "C drops what was said twice": ([FIRST[0], *FIRST[:3]], None, "C", None, FIRST),
    "C all but the answer": (FIRST, None, "C", None, FIRST),
    "D product": (["7*8=54", "6*9=54", "3*4=12", "54+54=108", "108+12=120"], "120", "D", 0, FIRST),
    "D second product": (["7*8=56", "6*9=52", "3*4=12", "56+52=108", "108+12=120"], "120", "D", 1, FIRST),
    "D words": (["7 times 8 is 56", "6 times 9 is 52", "56 plus 52 is 108", "3 times 4 is 12",
                 "108 plus 12 is 120"], "120", "D", 1, WORDS),
    "D interleaved": (["7*8=56", "6*9=54", "56+54=100", "3*4=12", "100+12=112"], "112", "D", 2, MIXED),
    "D own order": (["3*4=14", "8*7=56", "6*9=54", "14+56=70", "70+54=124"], "124", "D", 0, OTHER),
    "D sum": (FIRST[:3] + ["56+54=100", "100+12=112"], "112", "D", 3, FIRST),
    "D names only the first of two": (["7*8=56", "6*9=52", "3*4=10", "56+52=108", "108+10=118"], "118", "D",
                                      1, FIRST),
    "D wrong step, right answer": (["7*8=56", "6*9=52", "3*4=14", "56+52=108", "108+14=122"], "122", "D",
                                   1, FIRST),
    "D operands of no product": (["7*8=56", "6*9=54", "3*5=15", "56+54=110", "110+15=125"], "125", "D",
                                 2, FIRST),
    "D operands of no sum": (FIRST[:3] + ["56+55=111", "111+12=123"], "123", "D", 3, FIRST),
    "D unreadable step": (["7*8=56", "well, 54", *FIRST[2:]], "122", "D", 1, FIRST),
    # a product that does not belong stands for the one the solver never takes: correcting it into the next
    # one left over rewarded a scrambled order, and a run learned to repeat products (validation Avg 79 -> 10)
    "D misread factor": (["7*8=56", "7*9=63", "3*4=12", "56+63=119", "119+12=131"], "131", "D", 1, FIRST),
    "D product said twice": (["7*8=56", "7*8=56", "3*4=12", "56+56=112", "112+12=124"], "124", "D", 1, FIRST),
    "D said twice for a later one": (["7*8=56", "3*4=12", "3*4=12", "56+12=68", "68+12=80"], "80", "D", 2,
                                     ["7*8=56", "3*4=12", "6*9=54", "56+12=68", "68+54=122"]),
    "D without an answer keeps what was said twice": (
        [FIRST[0], FIRST[0], "6*9=52"], None, "D", 2, [FIRST[0], *FIRST]),
    "D goes on in the notation of the step corrected": (
        ["7 times 8 is 54", *FIRST[1:3], "54+54=108", "108+12=120"], "120", "D", 0, WORDS_FIRST),
    "D superfluous step": (FIRST + ["122+1=123"], "123", "D", 5, FIRST),
    "D answer": (FIRST, "132", "D", 5, FIRST),
    "D empty answer": (FIRST, "", "D", 5, FIRST),
    "D wrong answer, missing end": (FIRST[:4], "110", "D", 4, FIRST),
    "D after a missing step": (["7*8=56", "6*9=54", "56+54=110", "110+12=123"], "123", "D", 3, MIXED),
}


@pytest.mark.parametrize("name", CASES)
def test_the_partial_critique_is(name):
    steps, answer, case, wrong, expected = CASES[name]
    critique = critique_of(write(steps, answer))
    kept = answer if case == "A" else "122"
    assert parse_answerless(critique.text) == write(expected, None)
    assert critique.text.endswith(f"\n<answer> {kept} </answer>") or name == "A answer spelt otherwise"
    assert (critique.case, critique.wrong) == (case, wrong)


def parse_answerless(text):
    return text[:text.rindex("\n<answer>")]


def test_a_correct_trace_is_reproduced_character_by_character():
    text = ("<step_1> 7*8=56 </step_1>\n<step_2> 6*9=54 </step_2>\n<step_3> 3*4=12 </step_3>\n"
            "<step_4> 56+54=110 </step_4>\n<step_5> 110+12=122 </step_5>\n<answer> 122 </answer>")
    assert critique_of(text).text == text == critique_of(text, quoting="full").text


@pytest.mark.parametrize("text", [
    "<step_1> 7*8=56 </step_1>\n<step_2> 6*9=5",                    # in mid-step
    "<step_1> 7*8=56 </step_1>\n<step_2> 6*9=54 </step_2>\n<step_3>",
    write(FIRST, None) + "\n<answer> 12",                           # in mid-answer
    "<step_1> 7*", "",
])
def test_a_trace_that_ran_out_of_tokens_is_finished_and_not_wrong(text):
    critique = critique_of(text, truncated=True)
    assert (critique.case, critique.wrong, critique.text) == ("C", None, write(FIRST))


def test_a_truncated_trace_with_an_error_before_is_case_d():
    critique = critique_of("<step_1> 7*8=54 </step_1>\n<step_2> 6*9=5", truncated=True)
    assert (critique.case, critique.wrong, critique.text) == ("D", 0, write(FIRST))


WRONG = ["7*8=56", "6*9=52", "3*4=12", "56+52=108", "108+12=120"]
QUOTED = {  # quoting, steps, answer: steps and answer of the critique
    ("full", "D"): (WRONG, "120", ["7*8=56", "6*9=52, so 6*9=54 is correct", *FIRST[2:]], "122"),
    ("full", "answer"): (FIRST, "120", FIRST, "120, so 122 is correct"),
    ("full", "words"): (["7 times 8 is 54", *WORDS_FIRST[1:]], "122",
                        ["7 times 8 is 54, so 7 times 8 is 56 is correct", *WORDS_FIRST[1:]], "122"),
    ("full", "A"): (FIRST, "122", FIRST, "122"),
    ("full", "B"): (FIRST[:4], "122", FIRST, "122"),
    ("full", "C"): (FIRST[:2], None, FIRST, "122"),
    ("omit", "A"): (FIRST, "122", ["correct"] * 5, "122"),
    ("omit", "B"): (FIRST[:3] + FIRST[4:], "122", ["correct"] * 3 + ["56+54=110", "correct"], "122"),
    ("omit", "C"): (FIRST[:2], None, ["correct"] * 2 + FIRST[2:], "122"),
    ("omit", "D"): (WRONG, "120", ["correct", *FIRST[1:]], "122"),
    ("omit", "answer"): (FIRST, "120", ["correct"] * 5, "122"),
}


@pytest.mark.parametrize("quoting, name", QUOTED)
def test_quoting(quoting, name):
    steps, answer, expected, final = QUOTED[quoting, name]
    assert critique_of(write(steps, answer), quoting=quoting).text == write(expected, final)


def test_the_critiques_of_a_batch_are_in_the_order_of_its_rollouts():
    texts = [write(FIRST), write(WRONG, "120"), write(FIRST[:4]), write(MIXED[:3], None)]
    critiques = SymbolicCritic().batch([rollout(text) for text in texts])
    assert [c.case for c in critiques] == ["A", "D", "B", "C"]
    assert critiques == [critique_of(text) for text in texts] and SymbolicCritic().batch([]) == []


@pytest.mark.parametrize("answer", ["122", "122.0", "$122$", r"\boxed{122}", "**122**"])
def test_an_answer_is_right_however_it_is_spelt_if_its_reward_says_so(answer):
    assert critique_of(write(FIRST, answer)).case == "A"


@pytest.mark.parametrize("problem", ["7*8 - 6*9", "Find x with x^2 = 4.", "", "7*8 + ", "777*8"])
def test_a_problem_that_is_no_sum_of_products_is_the_users_error(problem):
    problem = Problem("p-1", problem, "1")
    with pytest.raises(UserError, match="problem p-1: "):
        SymbolicCritic().check([PROBLEM, problem])
    with pytest.raises(UserError, match="problem p-1: "):
        SymbolicCritic().batch([rollout(write(FIRST), problem)])


def test_a_problem_in_words_is_read_too():
    problem = Problem("p", "What is 7 times 8 plus 6 times 9 plus 3 times 4?", "122")
    assert critique_of(write(FIRST[:2], None), problem).text == write(FIRST)


def test_a_problem_whose_answer_is_wrong_is_the_users_error():
    """It was taught: the critique of a perfect trace ended in the wrong answer."""
    with pytest.raises(UserError, match="problem p-1: its answer"):
        SymbolicCritic().check([PROBLEM, Problem("p-1", "7*8 + 6*9", "111")])


def values(text):
    """Left, right and the value of each product that a critique writes."""
    return [tuple(map(int, found)) for found in re.findall(r"(\d+)\*(\d+)=(\d+)", text)]


def test_noise_makes_that_share_of_the_corrected_products_wrong_and_nothing_else():
    """The steps copied stay as they are; sums and the answer follow from the wrong product."""
    wrong_steps, seen = ["7*8=56", "6*9=52", "3*4=12", "56+52=108", "108+12=120"], 0
    for i in range(400):
        problem = Problem(f"p{i}", PROBLEM.problem, "122")
        exact = critique_of(write(wrong_steps, "120"), problem)
        noisy = critique_of(write(wrong_steps, "120"), problem, noise=0.3)
        assert noisy == critique_of(write(wrong_steps, "120"), problem, noise=0.3)    # no hidden state
        assert (noisy.case, noisy.wrong) == ("D", 1)
        (first, second, third), (_, right, _) = values(noisy.text), values(exact.text)
        assert first == (7, 8, 56) and third == (3, 4, 12) and right == (6, 9, 54)
        total = 56 + second[2] + 12
        assert noisy.text.endswith(f"{56 + second[2]}+12={total} </step_5>\n<answer> {total} </answer>")
        seen += second != right
    assert 0.3 * 400 - 37 < seen < 0.3 * 400 + 37           # 4 standard deviations
    for text in (write(FIRST), write(FIRST[:4]), write(FIRST[:2], None), write(FIRST, "120"),
                 write(FIRST[:3] + ["56+54=100", "100+12=112"], "112")):    # no product is corrected
        assert critique_of(text, noise=1.0) == critique_of(text)


def corrupted(rng):
    """Problem, answer, steps with one or two wrong values, and the index of the first; written anew here."""
    pairs = [(rng.randint(2, 12), rng.randint(2, 12)) for _ in range(rng.randint(2, 4))]
    order, words, interleaved = rng.sample(pairs, len(pairs)), rng.random() < 0.5, rng.random() < 0.5
    bad = set(rng.sample(range(2 * len(pairs) - 1), rng.randint(1, 2)))
    steps, pool = [], []

    def say(left, sign, right, value):
        value += rng.choice([-1, 1, 10]) if len(steps) in bad else 0
        names = {"*": (" times ", " is "), "+": (" plus ", " is ")}[sign] if words else (sign, "=")
        steps.append(f"{left}{names[0]}{right}{names[1]}{value}")
        return value

    for a, b in order:
        a, b = rng.choice([(a, b), (b, a)])
        pool.append(say(a, "*", b, a * b))
        if interleaved and len(pool) == 2:
            pool = [say(pool[0], "+", pool[1], sum(pool))]
    while len(pool) > 1:
        pool[:2] = [say(pool[0], "+", pool[1], pool[0] + pool[1])]
    problem = Problem("r", " + ".join(f"{a}*{b}" for a, b in pairs), str(sum(a * b for a, b in pairs)))
    return problem, str(pool[0]), steps, min(bad)


def test_a_partial_critique_copies_up_to_the_first_wrong_step_and_is_itself_fully_correct():
    rng = random.Random(7)
    for _ in range(300):
        problem, answer, steps, first = corrupted(rng)
        critique = critique_of(write(steps, answer), problem)
        assert (critique.case, critique.wrong) == ("D", first)
        assert critique.text.startswith(write(steps[:first], None))
        again = critique_of(critique.text, problem)
        assert (again.case, again.text) == ("A", critique.text)
        lines = re.findall(r"> (\d+)(\*|\+| times | plus )(\d+)(?:=| is )(\d+) <", critique.text)
        assert len(lines) == len(steps)         # as many steps as the solver's own, each of them true
        for left, sign, right, value in lines:
            product = sign in ("*", " times ")
            assert int(value) == (int(left) * int(right) if product else int(left) + int(right))
        assert critique.text.endswith(f"<answer> {problem.answer} </answer>")
