"""The shipped problems and what the solver's corpus believes; all facts are worked out anew here."""
import random
import re

import pytest

from sd.problems import EMBEDDED, embedded
from sd.task.times_table import (CHANCE, HARD, PAIRS, PRODUCTS, PROSE, SPACED, SYMBOLS, Equation, belief,
                                 read_equation, read_problem, usual_mistakes, write_problem)

SPLITS = {split: embedded(split) for split in ("train", "val", "test")}
ALL = [problem for problems in SPLITS.values() for problem in problems]


def products(text, sign):
    return [(int(a), int(b)) for a, b in re.findall(rf"(\d+){sign}(\d+)", text)]


def test_sizes_and_ids():
    assert {split: len(problems) for split, problems in SPLITS.items()} == {
        "train": 282, "val": 100, "test": 200}
    assert len({p.id for p in ALL}) == 582


def test_no_two_problems_have_the_same_facts_in_any_order():
    facts = {frozenset(frozenset(pair) for pair in products(p.problem, r"\*")) for p in ALL}
    assert len(facts) == 582


def test_every_answer_is_true():
    for p in ALL:
        pairs = products(p.problem, r"\*")
        assert p.problem == " + ".join(f"{a}*{b}" for a, b in pairs) and len(pairs) == PRODUCTS
        assert (all(2 <= f <= 12 for pair in pairs for f in pair)
                and int(p.answer) == sum(a * b for a, b in pairs))


def test_every_reference_is_true_prose_about_the_same_products():
    for p in ALL:
        first, answer = re.fullmatch(r"first (.*), so (\d+) is correct", p.solution).groups()
        said = [tuple(map(int, re.fullmatch(r"(\d+) multiplied by (\d+) makes (\d+)", part).groups()))
                for part in first.split(", then ")]
        assert all(a * b == value for a, b, value in said) and answer == p.answer
        assert sorted((a, b) for a, b, _ in said) == sorted(products(p.problem, r"\*"))
        assert "<" not in p.solution and "*" not in p.solution and "=" not in p.solution


def test_a_reference_takes_another_order_about_half_the_time():
    """Own order with 1/2, else random of 720: 4 standard deviations of 582 draws are 0.083."""
    other = sum(products(p.solution, " multiplied by ") != products(p.problem, r"\*") for p in ALL) / len(ALL)
    assert other == pytest.approx(0.5 * 719 / 720, abs=0.083)


def test_the_embedded_solver_is_small():
    names = ("config.json", "model.safetensors", "tokenizer.json")
    assert sum((EMBEDDED / name).stat().st_size for name in names) <= 4 * 2**20


def test_half_of_the_pairs_are_hard():
    assert len(PAIRS) == 66 and len(HARD) == 33 and HARD < set(PAIRS)


def test_the_corpus_is_always_right_on_easy_pairs_and_rarely_on_hard_ones():
    rng, right, count = random.Random(1), 0, 0
    for a, b in [(a, b) for a, b in PAIRS] + [(b, a) for a, b in PAIRS]:
        values = [belief((a, b), rng) for _ in range(50)]
        if (min(a, b), max(a, b)) in HARD:
            right, count = right + values.count(a * b), count + 50
            assert all(v > 1 for v in values) and len(set(values)) <= 9
        else:
            assert set(values) == {a * b}
    assert right / count == pytest.approx(CHANCE, abs=0.021)       # 4 standard deviations of 3,300 draws


@pytest.mark.parametrize("text, equation", [
    ("7*8=56", Equation(7, True, 8, 56, SYMBOLS)), ("56+54=110", Equation(56, False, 54, 110, SYMBOLS)),
    ("7 * 8 = 56", Equation(7, True, 8, 56, SPACED)), ("7 × 8 = 56", Equation(7, True, 8, 56, SPACED)),
    ("7 + 8 = 15", Equation(7, False, 8, 15, SPACED)), ("7*8 = 56", Equation(7, True, 8, 56, ("*", " = "))),
    ("7 times 8 is 56", Equation(7, True, 8, 56, (" times ", " is "))),
    ("56 plus 54 gives 110", Equation(56, False, 54, 110, (" times ", " gives "))),
    ("7 multiplied by 8 makes 56", Equation(7, True, 8, 56, PROSE)),
    ("7*8 is 56", Equation(7, True, 8, 56, ("*", " is "))),
    ("7 times 8 = 56", Equation(7, True, 8, 56, (" times ", " = "))),
    ("56+54 makes 110", Equation(56, False, 54, 110, ("*", " makes "))),
    *((text, None) for text in (
        "", "7*8", "7*8=", "7*8=56 ", " 7*8=56", "7*8=56=56", "7*8*9=504", "-7*8=56", "7.0*8=56", "7-8=1",
        "7 times 8", "7 by 8 is 56", "7 times8=56", "7*8is 56", "7  *  8=56", "1234567*8=9", "well, 54"))])
def test_an_equation_is_read_in_all_wordings(text, equation):
    assert read_equation(text) == equation


def test_what_is_written_is_read_back_the_same():
    for notation in (SYMBOLS, SPACED, PROSE, (" times ", " is "), ("*", " gives ")):
        for product in (True, False):
            equation = Equation(12, product, 3, 99, notation)
            read = read_equation(str(equation))
            assert str(read) == str(equation) and (not product or read == equation)
    pairs = [(7, 8), (12, 2), (3, 3)]
    assert write_problem(pairs) == "7*8 + 12*2 + 3*3" and read_problem(write_problem(pairs)) == pairs
    assert read_problem("What is 7 times 8 plus 12 times 2?") == pairs[:2]


def test_usual_mistakes_are_wrong_values_the_same_for_both_orders():
    for a, b in PAIRS:
        mistakes = usual_mistakes((a, b))
        assert 5 <= len(set(mistakes)) == len(mistakes) <= 8
        assert a * b not in mistakes and min(mistakes) > 1
        assert usual_mistakes((b, a)) == mistakes
    assert usual_mistakes((7, 8)) == [63, 49, 64, 48, 57, 55, 66, 46]
