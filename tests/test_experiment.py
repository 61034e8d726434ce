"""The experiments' own parts: references moving away from the solver, intervals, tables of stored results."""
import json
import re
import sys
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest

from sd import UserError, experiment
from sd.config import Config
from sd.experiment import REFERENCES, arms, figure, interval, place, reference, run, summary, table
from sd.problems import embedded
from sd.steps import parse

PROBLEMS = embedded("val")


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
    low, high = interval(values)
    # 0.98 = 1.96 * 10 / sqrt(400)
    assert (low, high) == pytest.approx((values.mean() - 0.98, values.mean() + 0.98), abs=0.2)
    low, high = interval(np.concatenate([values - 20, values, values + 20]))
    assert high - low > 20
    # seeds alone: Student's t of two degrees of freedom, 4.30 * sqrt(1 / 3); of one, 12.71 * sqrt(0.5 / 2)
    assert interval(np.array([[1.0] * 9, [2.0] * 9, [3.0] * 9])) == pytest.approx((-0.4826, 4.4826), abs=1e-3)
    assert interval(np.array([[1.0] * 9, [2.0] * 9])) == pytest.approx((-4.855, 7.855), abs=1e-3)
    assert interval(np.repeat(np.arange(30.0), 9).reshape(30, 9))[0] > 14.5 - 2.27 * 8.81 / 30 ** 0.5   # many


@pytest.mark.parametrize("seeds", [2, 3, 5, 20])
def test_intervals_cover_the_truth_as_often_as_they_say(seeds):
    """Of 200 problems: effects of seed, of problem and of both, as in the runs; a bootstrap of three seeds
    covered the truth 82 times of 100."""
    rng, hits = np.random.default_rng(seeds), 0
    for _ in range(400):
        values = (3 * rng.normal(size=(seeds, 1)) + 15 * rng.normal(size=(1, 200))
                  + 10 * rng.normal(size=(seeds, 200)))
        low, high = interval(values)
        hits += low <= 0 <= high
    assert 0.92 <= hits / 400


def stored(folder, avg, rollouts, split="test"):
    folder.mkdir(parents=True)
    means = {f"{name}@12": {"mean": 100 * np.mean(avg)} for name in ("avg", "maj", "pass")}
    (folder / "test.json").write_text(json.dumps(
        means | {"split": split, "mean_length": 48.0, "values": {"avg": avg}}))
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
    assert "| ref | 43.8 ± 8.8 |" in table(result) and "| critique | 68.8 ± 8.8 |" in table(result)
    assert "| critique - ref | +25.0 | +25.0 to +25.0 |" in table(result)
    stored(tmp_path / "other-0", [0.5, 0.75], 32, "test.jsonl")         # other problems: nothing to pair
    differences = summary(runs | {"other": [tmp_path / "other-0"]})["differences in avg@12"]
    assert list(differences) == ["critique - ref"]


def test_the_figure_shows_what_was_measured():
    """Heights are linear in Avg, distances from left to right logarithmic in the divergence."""
    measured = {"ref same": (0.01, 90.0), "ref half": (0.1, 50.0), "ref decomposed": (1.0, 10.0),
                "critique": (0.1, 70.0)}
    result = {"arms": {name: {"avg@12": [avg - 5, avg + 5]} for name, (_, avg) in measured.items()} |
              {"grpo": {"avg@12": [60.0, 60.0]}}, "distance": {name: d for name, (d, _) in measured.items()}}
    svg = figure(result)
    ElementTree.fromstring(svg)
    (x0, y0), (x1, y1), (x2, y2), (x3, y3) = [tuple(map(float, at))
                                              for at in re.findall(r'cx="(\S+)" cy="(\S+)"', svg)]
    assert x1 - x0 == pytest.approx(x2 - x1) and x1 == x3 and x0 < x1
    assert y1 - y0 == pytest.approx(y2 - y1) and y3 == pytest.approx((y0 + y1) / 2) and y0 < y1
    assert all(f">{name}</text>" in svg for name in ("same", "half", "decomposed", "critique", "grpo"))


def test_finished_runs_are_skipped_killed_ones_go_on_and_others_start_afresh(tmp_path, monkeypatch):
    commands, options = [], ["--cond", "ref", "--seed", "7", "--temperature", "0.9"]

    def run_command(command):
        commands.append(command[1:])
        if command[1] == "eval.py":
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
        assert second[:2] == ["eval.py", str(folder / "best")]
        assert second[second.index("--temperature") + 1] == "0.9"       # tested as it was trained
        fresh = ["train.py", *options, "--out", str(folder)]
        assert first == (["train.py", "--resume", str(folder)] if name == "killed" else fresh)
        count = len(commands)
        assert run(tmp_path / name, options) == folder and len(commands) == count


def test_experiments_share_the_runs_whose_options_are_the_same_and_no_others(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "run_command", lambda command: pytest.fail(str(command)))
    made = place(tmp_path, Config(cond="ref", steps=2, keep=True))
    stored(made, [0.5], 32)
    short = ["--cond", "ref", "--seed", "0", "--steps", "2"]
    for options in (short, [*short, "--teacher", "base"], [*short, "--keep"]):      # base is the default
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


def test_every_experiment_has_options_that_train_py_takes(tmp_path, monkeypatch):
    from sd.config import parse_config
    monkeypatch.setattr(experiment, "solver_options", lambda width, out: [])
    for name in ("main", "alignment", "quoting", "divergence", "teacher", "critic-noise", "scale"):
        options = arms(name, tmp_path)
        assert len(options) >= 3
        for arm in options.values():
            parse_config("", arm)


def test_a_noisy_critic_is_wrong_as_often_as_asked_and_goes_on_consistently():
    from sd.task.symbolic import SymbolicCritic
    wrong = total = 0
    for p in PROBLEMS:
        (a, b), (c, d), (e, f) = [tuple(map(int, t.split("*"))) for t in p.problem.split(" + ")]
        text = f"<step_1> {a}*{b}={a * b + 3} </step_1>"
        exact, noisy = SymbolicCritic()(p, text), SymbolicCritic(noise=0.3)(p, text)
        assert exact.wrong == noisy.wrong == 0
        first, *_ = facts(noisy.text)
        wrong, total = wrong + (first[3] != a * b), total + 1
        assert parse(noisy.text).answer.text == str(first[3] + c * d + e * f)   # carries the error to the end
        assert parse(exact.text).answer.text == p.answer
    assert wrong / total == pytest.approx(0.3, abs=0.15)


def test_an_option_that_the_experiment_sets_itself_is_refused(monkeypatch, capsys, tmp_path):
    """`--seed 7` for `--seeds 7` went on to every run, and the table told of seven seeds without any spread.
    A model of one's own was trained, and tested on the embedded problems."""
    for option, value in ("--seed", "7"), ("--model", "mine"):
        monkeypatch.setattr(sys, "argv", ["sd.experiment", "quoting", option, value, "--out", str(tmp_path)])
        with pytest.raises(SystemExit):
            experiment.main()
        assert f"{option} is the experiment's own" in capsys.readouterr().err and not list(tmp_path.iterdir())
