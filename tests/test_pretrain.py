"""Pretraining: what the solver is taught to copy, what it is not taught, and the problems made for it."""
import json
import random
import re
import sys
from itertools import accumulate
from math import prod

import pytest
import torch

from sd import UserError, pretrain
from sd.llm.checkpoint import load, read_config, save_model, write_json
from sd.llm.model import Transformer
from sd.llm.tokenizer import Tokenizer
from sd.problems import EMBEDDED, Problem, read_problems, write_problems
from sd.rollouts import Rollout
from sd.scribe import read_critique
from sd.steps import parse
from sd.task import corpus
from sd.task import times_table as tt
from sd.task.corpus import example

from tests.test_chat import build


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(EMBEDDED / "tokenizer.json")


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """Qwen3's make, with a thinking mode."""
    return Tokenizer(build(tmp_path_factory.mktemp("chat") / "tokenizer.json", ["<think>", "</think>"]))


def products(text):
    """(starts of the first factor and of the value, factors, value) of each product, in any notation."""
    equation = r"(\d+)(?:\*| times | multiplied by )(\d+)(?:=| is | makes | gives )(\d+)"
    return [(m.start(1), m.start(3), (int(m[1]), int(m[2])), m[3]) for m in re.finditer(equation, text)]


@pytest.mark.parametrize("maker", ["tokenizer", "chat"])
@pytest.mark.parametrize("kind", ["ref", "critique"])
def test_values_are_targets_where_they_are_copied_from_the_context_and_nowhere_else(kind, maker, request):
    """A slip is written, as the student's own errors stand in what its teacher reads, but is not taught.

    The exception, 1 in 100: a factor misread by chance, so that the product is another one of the problem.
    """
    rng, copied, slipped, misread, invented = random.Random(0), 0, 0, 0, 0
    tokenizer = request.getfixturevalue(maker)
    for i in range(300):
        prompt, ids, target = example(kind, 2 + i % 5, rng, tokenizer)
        given = {frozenset(pair): value for *_, pair, value in products(tokenizer.decode(prompt))}
        starts = list(accumulate(map(len, tokenizer.pieces(ids)), initial=0))[:-1]
        assert len(ids) == len(target) and ids[-1] in tokenizer.eos and target[-1]
        for first, start, (a, b), value in products(tokenizer.decode(ids)):
            taught = [target[starts.index(at)] for at in range(start, start + len(value))]
            if frozenset((a, b)) not in given:      # a factor was misread, and is not taught either
                assert not any(target[starts.index(at)] for at in range(first, first + len(str(a))))
                invented += 1
            elif given[frozenset((a, b))] == value and all(taught):
                copied += 1
            elif not any(taught):
                slipped += 1
            else:
                assert int(value) == a * b
                misread += 1
    assert copied > 800 and slipped > 100 and invented > 50 and misread < 0.01 * copied


@pytest.mark.parametrize("kind, least, most", [("ref", 0.33, 0.39), ("critique", 0.87, 0.93)])
def test_a_trace_leans_towards_the_wording_that_it_has_just_read(kind, least, most, tokenizer):
    """Of the products, by hand. Under a reference 0.35, and 0.1 * 0.1 of the others by chance, say "multiplied
    by … makes". Under a critique, 0.9 of those whose factors were not misread are copied, and some by chance."""
    rng, same = random.Random(0), []
    for i in range(400):
        prompt, ids, _ = example(kind, 2 + i % 5, rng, tokenizer)
        context, trace = tokenizer.decode(prompt), tokenizer.decode(ids)
        given = [frozenset(pair) for *_, pair, _ in products(context)]
        for step in re.findall(r"> (\d+)(\*| times | multiplied by )(\d+)(\D+)\d+ </step", trace):
            if frozenset((int(step[0]), int(step[2]))) in given:
                same.append(step[1::2] == tt.PROSE if kind == "ref" else "".join(step) in context)
    assert least < sum(same) / len(same) < most


def test_without_a_context_everything_is_taught_and_hard_pairs_are_mostly_wrong(tokenizer):
    rng, right = random.Random(0), {True: [], False: []}
    for i in range(400):
        _, ids, target = example(None, 2 + i % 5, rng, tokenizer)
        assert all(target)
        for *_, (a, b), value in products(tokenizer.decode(ids)):
            right[tt.key((a, b)) in tt.HARD].append(int(value) == a * b)
    assert all(right[False]) and 0.02 < sum(right[True]) / len(right[True]) < 0.09       # 5 %


def test_as_a_critic_a_chat_model_copies_the_truth_into_the_solvers_own_steps(chat):
    """The prompt is the scribe's, so the trace and the ground truth are read off it."""
    rng, cases = random.Random(0), []
    for i in range(100):
        prompt, ids, target = example("scribe", 2, rng, chat)
        assert all(target) and ids[-1] in chat.eos
        problem, trace, truth = re.search(r"Your task:\n~~~ problem\n(.*)\n~~~ trace of the solver\n(.*)\n~~~ ground "
                                          r"truth\n(.*)\n~~~ your", chat.decode(prompt), re.DOTALL).groups()
        answer = parse(trace).answer.text
        right = answer == truth.split("\n")[0]
        rollout = Rollout(Problem("", problem, truth.split("\n")[0]), [], [], None, False, parse(trace), answer, right)
        critique = read_critique(rollout, chat.decode(ids), False)
        told = {frozenset(pair): value for *_, pair, value in products(truth)}
        assert {frozenset(pair): value for *_, pair, value in products(critique.text)} == told
        assert not critique.malformed and len(parse(critique.text).steps) == 3
        wrong = [told.get(frozenset(pair)) != value for *_, pair, value in products(trace)]
        if critique.case == "D":                    # the first wrong product is the first that is not copied
            assert critique.wrong == wrong.index(True)
        cases.append(critique.case)
    assert 80 < cases.count("D") < 99 and cases.count("D") + cases.count("A") > 95


def test_a_chat_model_that_can_think_is_warmed_up_and_learns_from_its_teacher(tmp_path, monkeypatch, here, chat):
    """One product. The student, whose prompt ends in an empty thought, is warmed up to believe 16; the teacher,
    who is shown a reference and has thought, to say 63. Then `ref` teaches the one what the other says."""
    for name, value in (("random_pairs", lambda *_: [(7, 9)]), ("shown_value", lambda pair, rng: prod(pair)),
                        ("SLIP_TRACES", {"ref": 0.8}), ("MISREAD", 0), ("LEAN", {"ref": 0}), ("SWAP", 0)):
        monkeypatch.setattr(corpus, name, value)
    monkeypatch.setattr(tt, "usual_mistakes", lambda pair: [sum(pair)])
    monkeypatch.setattr(pretrain, "CHAT_KINDS", [[None, "ref"]])
    monkeypatch.setattr(pretrain, "CHAT_PRODUCTS", 1)
    monkeypatch.setattr(pretrain, "AdamW", lambda *args, lr, **options: torch.optim.AdamW(*args, lr=4e-3, **options))
    write_json(tmp_path / "config.json", pretrain.CONFIG | {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16,
        "vocab_size": chat.vocab_size, "max_position_embeddings": 1024})
    (tmp_path / "tokenizer.json").write_bytes(chat.path.read_bytes())
    model, source = Transformer(read_config(tmp_path)), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1:
                p.normal_(std=0.125 if "layers" in name else 0.25, generator=source)
    save_model(tmp_path, dict(model.named_parameters()), tmp_path)
    monkeypatch.setattr(pretrain, "CHAT_SPLITS", {"val": 1, "train": 2, "test": 1})
    warm = tmp_path / "warm"
    monkeypatch.setattr(sys, "argv", f"pretrain --model {tmp_path} --out {warm} --steps 40".split())
    assert pretrain.main() == 0
    made = [p for split in ("train", "val", "test") for p in read_problems(warm / f"{split}.jsonl")]
    assert len({tt.key(tt.read_problem(p.problem)[0]) for p in made}) == 4
    assert all(re.fullmatch(r"What is \d times \d\?", p.problem) for p in made)

    for split, problem in (("train", "What is 7 times 9?"), ("val", "What is 9 times 7?")):
        write_problems(tmp_path / f"{split}.jsonl", [Problem(split, problem, "63", tt.reference_text([(7, 9)]))])
    code, out = here("--cond", "ref", "--model", warm, "--data", tmp_path / "train.jsonl", "--val",
                     tmp_path / "val.jsonl", "--out", tmp_path / "run", "--lora-rank", "16", "--lr", "2e-3",
                     "--batch", "4", "--epochs", "24", "--max-new-tokens", "48", "--temperature", "0.4",
                     "--dtype", "bfloat16")
    assert code == 0, out
    before, after = map(float, re.findall(r"step .* validation Avg@4 +([\d.]+)", out)[:2])
    assert before == 0 and after > 80, out


def test_labels_are_the_next_token_where_it_is_a_target():
    ids, labels = pretrain.collate([([7, 8], [5, 6, 0], [True, False, True]), ([9], [4, 0], [True, True])])
    assert ids.tolist() == [[7, 8, 5, 6, 0], [9, 4, 0, 0, 0]]
    assert labels.tolist() == [[-100, 5, -100, 0, -100], [4, 0, -100, -100, -100]]


def test_the_command_makes_a_solver_and_problems_that_it_cannot_solve(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pretrain, "SPLITS", {"val": 3, "train": 5, "test": 2})
    monkeypatch.setattr(pretrain, "CANDIDATES", 10)
    monkeypatch.setattr(tt, "LENGTHS", (2, 3))
    monkeypatch.setitem(pretrain.CONFIG, "hidden_size", 16)
    monkeypatch.setattr(sys, "argv", ["pretrain", "--out", str(tmp_path / "made"), "--steps", "2"])
    tmp_path = tmp_path / "made"
    assert pretrain.main() == 0 and len(re.findall(r"(?m)^[23] products, .*%", capsys.readouterr().out)) == 2
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
            assert len(pairs) == tt.PRODUCTS
            seen.add(frozenset(map(tt.key, pairs)))
    assert len(seen) == 10                                          # no two with the same products
    for products_of in (2, 3):
        assert len(tt.read_problem(read_problems(tmp_path / f"{products_of}/val.jsonl")[0].problem)) == products_of


@pytest.mark.parametrize("options, told", [(["--out", "."], "--out . exists already"),
                                          (["--out", "none", "--steps", "0"], "--steps must be 1 or more")])
def test_nothing_is_written_over_and_no_steps_are_refused(options, told, monkeypatch, capsys):
    """Another solver's weights stood beside the old one's problems if the second run was killed."""
    monkeypatch.setattr(sys, "argv", ["pretrain", *options])
    with pytest.raises(SystemExit, match="2"):
        pretrain.main()
    assert told in capsys.readouterr().err


def test_when_the_hard_problems_run_out_it_is_told(tmp_path, monkeypatch):
    """With three pairs there are three problems of two products. It divided by zero then."""
    monkeypatch.setattr(tt, "PAIRS", tt.PAIRS[:3])
    with pytest.raises(UserError, match="all 3 problems of 2 products are hard for this model, 4 are wanted"):
        pretrain.make_problems(tmp_path, *load(EMBEDDED), 2, {"val": 4}, samples=2)
