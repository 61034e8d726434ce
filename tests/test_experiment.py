"""The experiments' own parts: references moving away from the solver, intervals, tables of stored results."""
import argparse
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from sd import UserError, experiment
from sd.config import Config, parse_config
from sd.experiment import arms, confidence, distance, figure, place, reference, run, summary, table
from sd.llm.checkpoint import load
from sd.problems import EMBEDDED, embedded, read_problems, write_problems
from sd.rollouts import Rollout
from sd.steps import parse
from sd.task.symbolic import SymbolicCritic

PROBLEMS = embedded("val")
REFERENCES = ("same", "worded", "half", "reordered", "decomposed")


def facts(text):
    """(left, sign, right, value) of every equation in words or symbols."""
    found = re.findall(r"(\d+)(\*|\+| multiplied by | plus )(\d+)(?:=| makes | gives )(\d+)", text)
    return [(int(a), "*" if sign in ("*", " multiplied by ") else "+", int(b), int(v))
            for a, sign, b, v in found]


@pytest.mark.parametrize("kind", REFERENCES)
def test_every_reference_is_true_and_says_the_answer(kind):
    for p in PROBLEMS:
        text = reference(p, kind)
        assert facts(text) and all(v == (a * b if sign == "*" else a + b) for a, sign, b, v in facts(text))
        assert p.answer == (parse(text).answer.text if kind == "same" else
                            re.search(r"so (\d+) is correct$", text)[1])


def test_references_move_away_from_the_solver_in_order_wording_and_decomposition():
    own = {p.id: [(a, b) for a, b in re.findall(r"(\d+)\*(\d+)", p.problem)] for p in PROBLEMS}
    order = {kind: [[(str(a), str(b)) for a, sign, b, _ in facts(reference(p, kind)) if sign == "*"]
                    == own[p.id] for p in PROBLEMS] for kind in REFERENCES}
    assert (all(order["same"]) and all(order["worded"])
            and not any(order["reordered"]) and not any(order["decomposed"]))
    assert 0.4 < np.mean(order["half"]) < 0.8           # its own order half of the time, else random of six
    assert all("=" in reference(p, "same") and "=" not in reference(p, "worded") for p in PROBLEMS)
    assert all(len(facts(reference(p, "decomposed"))) == 9 for p in PROBLEMS)


def test_the_interval_is_the_textbooks_for_one_seed_and_wider_when_seeds_differ():
    values = np.random.default_rng(1).normal(50, 10, (1, 400))
    low, high = confidence(values)
    # 0.98 = 1.96 * 10 / sqrt(400)
    assert (low, high) == pytest.approx((values.mean() - 0.98, values.mean() + 0.98), abs=0.2)
    low, high = confidence(np.concatenate([values - 20, values, values + 20]))
    assert high - low > 20
    # seeds alone: Student's t of two degrees of freedom, 4.30 * sqrt(1 / 3); of one, 12.71 * sqrt(0.5 / 2)
    three = np.array([[1.0] * 9, [2.0] * 9, [3.0] * 9])
    assert confidence(three) == pytest.approx((-0.4826, 4.4826), abs=1e-3)
    assert confidence(np.array([[1.0] * 9, [2.0] * 9])) == pytest.approx((-4.855, 7.855), abs=1e-3)
    many = np.repeat(np.arange(30.0), 9).reshape(30, 9)
    assert confidence(many)[0] > 14.5 - 2.27 * 8.81 / 30 ** 0.5


@pytest.mark.parametrize("seeds", [2, 3, 5, 20])
def test_intervals_cover_the_truth_as_often_as_they_say(seeds):
    """Of 200 problems: effects of seed, of problem and of both, as in the runs; a bootstrap of three seeds
    covered the truth 82 times of 100."""
    rng, hits = np.random.default_rng(seeds), 0
    for _ in range(400):
        values = (3 * rng.normal(size=(seeds, 1)) + 15 * rng.normal(size=(1, 200))
                  + 10 * rng.normal(size=(seeds, 200)))
        low, high = confidence(values)
        hits += low <= 0 <= high
    assert 0.92 <= hits / 400


def stored(folder, avg, rollouts):
    folder.mkdir(parents=True)
    means = {f"{name}@12": {"mean": 100 * np.mean(avg)} for name in ("avg", "maj", "pass")}
    (folder / "test.json").write_text(json.dumps(
        means | {"values": {"avg": avg}}))
    rows = [{"step": 1, "rollouts": rollouts, "seconds": 1.0}, {"step": 1, "val_avg@4": 1.0, "seconds": 3.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_table_is_made_from_stored_results_to_the_digit(tmp_path):
    for seed, shift in ((0, 0.0), (1, 0.25)):
        stored(tmp_path / f"ref-{seed}", [0.25 + shift, 0.5], 32)
        stored(tmp_path / f"critique-{seed}", [0.5 + shift, 0.75], 32)
    runs = {name: [tmp_path / f"{name}-0", tmp_path / f"{name}-1"] for name in ("ref", "critique")}
    result = summary(runs)
    assert table(result) == table(json.loads(json.dumps(result))) == table(summary(runs))
    # by hand: ref 37.5 and 50, critique 62.5 and 75; sample standard deviation 12.5 / sqrt(2)
    assert "| ref | 43.8 ± 8.8 | 43.8 ± 8.8 | 43.8 ± 8.8 | 32 |" in table(result)
    assert "| critique | 68.8 ± 8.8 |" in table(result) and "2 seeds" in table(result)
    assert "| critique - ref | +25.0 | +25.0 to +25.0 |" in table(result)
    one = table(summary({name: folders[:1] for name, folders in runs.items()}))
    assert "| ref | 37.5 ± 0.0 |" in one and "1 seeds" in one and "over problems alone" in one
    differences = summary(runs | {"again": runs["ref"]})["differences in avg@12"]
    assert list(differences) == ["critique - ref", "again - ref", "again - critique"]
    assert differences["again - ref"] == [0, 0, 0] and differences["again - critique"][0] == -25


def test_the_figure_shows_what_was_measured():
    """Heights are linear in Avg, distances from left to right logarithmic in the divergence."""
    measured = {"ref references same": (0.02, 90.0), "ref references half": (0.2, 50.0),
                "ref references decomposed": (2.0, 10.0), "critique": (0.2, 70.0)}
    result = {"arms": {name: {"avg@12": [avg - 5, avg + 5]} for name, (_, avg) in measured.items()} |
              {"grpo": {"avg@12": [60.0, 60.0]}}, "distance": {name: d for name, (d, _) in measured.items()}}
    svg = figure(result)
    ElementTree.fromstring(svg)
    (x0, y0), (x1, y1), (x2, y2), (x3, y3) = [tuple(map(float, at))
                                              for at in re.findall(r'cx="(\S+)" cy="(\S+)"', svg)]
    assert x1 - x0 == pytest.approx(x2 - x1) and x1 == x3 and x0 < x1
    assert y1 - y0 == pytest.approx(y2 - y1) and y3 == pytest.approx((y0 + y1) / 2) and y0 < y1
    half = 50 ** 0.5 * (y1 - y0) / 40               # the standard deviation of 85 and 95, in pixels
    assert f"M{x0:.1f} {y0 + half:.1f}h" in svg and f"L{x0:.1f} {y0 - half:.1f}h" in svg
    assert re.search(rf'grey dashed" d="M\S+ {(y1 + y3) / 2:.1f}L', svg)            # grpo's 60
    assert all(f">{name}</text>" in svg for name in ("same", "half", "decomposed", "critique", "grpo"))


def test_the_distance_is_the_mean_divergence_of_correct_steps(tmp_path):
    """Written out: both prompts, one rollout at a time, the whole trace scored, the tokens then chosen."""
    model, tokenizer = load(EMBEDDED)
    problems, seen = PROBLEMS[:24], []
    write_problems(tmp_path / "val.jsonl", [replace(p, solution=reference(p, "reordered")) for p in problems])
    with pytest.MonkeyPatch.context() as patch:
        sample = experiment.sample_rollouts
        patch.setattr(experiment, "sample_rollouts",
                      lambda *args: seen.append(sample(*args)) or [replace(r) for r in seen[0]])
        found = distance(Config("ref", val=str(tmp_path / "val.jsonl")))
    total = count = 0
    for p, r in zip(problems, seen[0], strict=True):
        assert isinstance(r, Rollout) and p.id == r.problem.id
        wrong = SymbolicCritic()(r).wrong
        text = "".join(tokenizer.pieces(r.completion))
        steps = re.findall(r"<step_\d+>.*?</step_\d+>\s*", text, re.S)[:wrong]
        part, end = "", 0
        while steps and len(part) < len("".join(steps).rstrip()):
            part += tokenizer.pieces(r.completion)[end]
            end += 1
        logp = []
        for tag in ([], [tokenizer.control("<reference>"), *tokenizer.encode(reference(p, "reordered"))]):
            prompt = [tokenizer.control("<problem>"), *tokenizer.encode(p.problem), *tag,
                      tokenizer.control("<solution>")]
            with torch.no_grad():
                logits = model(torch.tensor([prompt + r.completion]))[0, len(prompt) - 1:-1]
            logp.append(torch.log_softmax(logits.double() / 1.1, -1)[:end])
        student, teacher = logp
        total, count = total + (teacher.exp() * (teacher - student)).sum().item(), count + end
    assert count > 50 and found == pytest.approx(total / count, rel=1e-4)


def test_finished_runs_are_skipped_killed_ones_go_on_and_others_start_afresh(tmp_path, monkeypatch):
    commands, options = [], ["--cond", "ref", "--seed", "7", "--temperature", "0.9"]

    def run_command(*command):
        commands.append(list(command))
        if command[0] == "eval.py":
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "test.json").write_text(json.dumps({"avg@12": {"mean": 1.0}}))
    monkeypatch.setattr(experiment, "run_command", run_command)
    for name, files in (("new", []), ("killed early", ["config.json"]),
                        ("killed", ["config.json", "state-3.safetensors"])):
        folder = place(tmp_path / name, Config(cond="ref", seed=7, temperature=0.9))
        for file in files:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text("")
        assert run(tmp_path / name, options) == folder
        first, second = commands[-2:]
        assert second == ["eval.py", str(folder / "best"), f"--test={EMBEDDED}/test.jsonl",
                          "--temperature=0.9", "--max-new-tokens=80",           # as it was trained
                          f"--json={folder}/test.json"]
        fresh = ["train.py", *options, f"--out={folder}"]
        assert first == (["train.py", f"--resume={folder}"] if name == "killed" else fresh)
        count = len(commands)
        assert run(tmp_path / name, options) == folder and len(commands) == count


def test_experiments_share_the_runs_whose_options_are_the_same_and_no_others(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "run_command", lambda *command: pytest.fail(str(command)))
    made = place(tmp_path, Config(cond="ref", steps=2))
    stored(made, [0.5], 32)
    short = ["--cond", "ref", "--seed", "0", "--steps", "2"]
    for options in (short, [*short, "--teacher", "base"]):                          # base is the default
        assert run(tmp_path, options) == made
    for options in (short[:-2], [*short, "--seed", "1"], [*short, "--divergence", "jsd"],
                    [*short, "--cond", "critique"], [*short, "--data", "a/x", "--val", "v"]):
        with pytest.raises(pytest.fail.Exception):
            run(tmp_path, options)
    one, other = Config(cond="ref", data="a/x", val="v"), Config(cond="ref", data="b/x", val="v")
    assert place(tmp_path, one) != place(tmp_path, other) == place(tmp_path, replace(one, data="b/x"))
    monkeypatch.setattr(experiment, "asdict", lambda config: {"an option of another version": 1})
    with pytest.raises(pytest.fail.Exception):
        run(tmp_path, short)


def test_a_failure_starts_nothing_more(tmp_path, monkeypatch, capsys):
    begun = []

    def fails(runs, options):
        begun.append(options)
        raise UserError("no space")
    monkeypatch.setattr(experiment, "run", fails)
    monkeypatch.setattr(sys, "argv", ["sd.experiment", "main", "--seeds", "20", "--jobs", "1", "--out",
                                      str(tmp_path)])
    assert experiment.main() == 2 and "no space" in capsys.readouterr().err and len(begun) <= 3


def test_every_experiment_has_options_that_train_py_takes(tmp_path, monkeypatch):
    for name in experiment.ARMS:
        options = arms(name, tmp_path, [])
        assert len(options) == len(experiment.ARMS[name]) >= 3
        for arm in options.values():
            parse_config(argparse.ArgumentParser(), arm)
    made = arms("alignment", tmp_path, ["--steps", "3"])["ref references same"]
    files = [f"{tmp_path}/data/same-{split}.jsonl" for split in ("train", "val")]
    assert made == ["--cond", "ref", f"--data={files[0]}", f"--val={files[1]}", "--steps", "3"]
    for split, file in zip(("train", "val"), files):
        expected = [replace(p, solution=reference(p, "same")) for p in embedded(split)]
        assert read_problems(Path(file)) == expected
    assert list(arms("scale", tmp_path, [])) == [f"{c} model solver-64" for c in ("grpo", "ref", "critique")]
    full = arms("quoting", tmp_path, [])["critique quoting full"]
    assert full == ["--cond", "critique", "--quoting", "full"]


def test_a_noisy_critic_is_wrong_as_often_as_asked_and_goes_on_consistently():
    wrong = total = 0
    for p in PROBLEMS:
        (a, b), (c, d), (e, f) = [tuple(map(int, t.split("*"))) for t in p.problem.split(" + ")]
        text = f"<step_1> {a}*{b}={a * b + 3} </step_1>"
        r = Rollout(p, [], [], None, False, parse(text), None, 0.0)
        exact, noisy = SymbolicCritic()(r), SymbolicCritic(noise=0.3)(r)
        assert exact.wrong == noisy.wrong == 0
        first, *_ = facts(noisy.text)
        wrong, total = wrong + (first[3] != a * b), total + 1
        assert parse(noisy.text).answer.text == str(first[3] + c * d + e * f)   # carries the error to the end
        assert parse(exact.text).answer.text == p.answer
    assert wrong / total == pytest.approx(0.3, abs=0.15)


def test_an_option_that_the_experiment_sets_itself_is_refused(monkeypatch, capsys, tmp_path):
    """`--seed 7` for `--seeds 7` went on to every run, and the table told of seven seeds without any spread.
    A model of one's own was trained, and tested on the embedded problems."""
    for option, *value in ("--seed", "7"), ("--model", "mine"), ("--seed=7",):
        monkeypatch.setattr(sys, "argv", ["sd.experiment", "quoting", option, *value, "--out", str(tmp_path)])
        with pytest.raises(SystemExit):
            experiment.main()
        assert f"{option} is the experiment's own" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_wrong_option_is_reported_once_before_anything_runs(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(experiment, "run_command", lambda *command: pytest.fail(str(command)))
    for extra, fact in (["--stepps", "20"], "--stepps"), (["--batch=0"], "--batch"):
        monkeypatch.setattr(sys, "argv", ["sd.experiment", "main", *extra, "--out", str(tmp_path)])
        try:
            status = experiment.main()
        except SystemExit as end:
            status = end.code
        err = capsys.readouterr().err
        assert status == 2 and fact in err.splitlines()[-1] and "Traceback" not in err
        assert sum("error" in line or "must" in line for line in err.splitlines()) == 1
