"""Pretraining: what the solver is taught to copy, what it is not taught, and the problems made for it."""
import json
import random
import re
import sys

import pytest

from sd import pretrain
from sd.llm.checkpoint import load
from sd.llm.tokenizer import Tokenizer
from sd.problems import EMBEDDED, read_problems
from sd.task import times_table as tt
from sd.task.corpus import example


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(EMBEDDED / "tokenizer.json")


def products(text):
    """(starts of the first factor and of the value, factors, value) of each product, in any notation."""
    return [(m.start(1), m.start(3), (int(m[1]), int(m[2])), m[3])
            for m in re.finditer(r"(\d+)(?:\*| times | multiplied by )(\d+)(?:=| is | makes )(\d+)", text)]


@pytest.mark.parametrize("kind", ["ref", "critique"])
def test_values_are_targets_where_they_are_copied_from_the_context_and_nowhere_else(kind, tokenizer):
    """A slip is written, as the student's own errors stand in what its teacher reads, but is not taught.

    The exception, 3 in 1,000: a factor misread by chance as the problem's own; then its true value is taught.
    """
    rng, copied, slipped, misread, invented = random.Random(0), 0, 0, 0, 0
    for _ in range(300):
        prompt, ids, target = example(kind, rng, tokenizer)
        given = {frozenset(pair): value for *_, pair, value in products(tokenizer.decode(prompt))}
        starts = [len("".join(tokenizer.pieces(ids)[:i])) for i in range(len(ids))]
        assert len(ids) == len(target) and ids[-1] in tokenizer.eos and target[-1]
        for first, start, (a, b), value in products(tokenizer.decode(ids)):
            taught = [target[starts.index(at)] for at in range(start, start + len(value))]
            if frozenset((a, b)) not in given:      # its first factor was misread, and is not taught either
                assert not any(target[starts.index(at)] for at in range(first, first + len(str(a))))
                invented += 1
            if frozenset((a, b)) in given and given[frozenset((a, b))] == value:
                assert all(taught)
                copied += 1
            elif frozenset((a, b)) in given and any(taught):
                assert int(value) == a * b
                misread += 1
            else:
                slipped += 1
    assert copied > 500 and slipped > 50 > 10 * misread and invented > 20       # the test's own premise


def test_without_a_context_everything_is_taught_and_hard_pairs_are_mostly_wrong(tokenizer):
    rng, right = random.Random(0), {True: [], False: []}
    for _ in range(400):
        _, ids, target = example(None, rng, tokenizer)
        assert all(target)
        for *_, (a, b), value in products(tokenizer.decode(ids)):
            right[tt.key((a, b)) in tt.HARD].append(int(value) == a * b)
    assert all(right[False]) and 0.02 < sum(right[True]) / len(right[True]) < 0.09       # 5 %


def test_labels_are_the_next_token_where_it_is_a_target():
    ids, labels = pretrain.collate([([7, 8], [5, 6, 0], [True, False, True]), ([9], [4, 0], [True, True])])
    assert ids.tolist() == [[7, 8, 5, 6, 0], [9, 4, 0, 0, 0]]
    assert labels.tolist() == [[-100, 5, -100, 0, -100], [4, 0, -100, -100, -100]]


def test_the_command_makes_a_solver_and_problems_that_it_cannot_solve(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pretrain, "SPLITS", {"train": 5, "val": 3, "test": 2})
    monkeypatch.setattr(sys, "argv", ["pretrain", "--out", str(tmp_path), "--steps", "2", "--width", "16"])
    assert pretrain.main() == 0 and capsys.readouterr().out.count("validation problems, ") == 3
    assert load(tmp_path)[0].config.hidden_size == 16
    assert json.loads((tmp_path / "tokenizer.json").read_text()) == json.loads(
        (EMBEDDED / "tokenizer.json").read_text())
    seen = set()
    for split, count in (("train", 5), ("val", 3), ("test", 2)):
        problems = read_problems(tmp_path / f"{split}.jsonl")
        assert len(problems) == count
        for p in problems:
            pairs = tt.read_problem(p.problem)
            assert p.answer == str(sum(a * b for a, b in pairs)) == re.findall(r"\d+", p.solution)[-1]
            assert all(int(value) == a * b for *_, (a, b), value in products(p.solution))
            seen.add(frozenset(map(tt.key, pairs)))
    assert len(seen) == 10                                          # no two with the same three products
