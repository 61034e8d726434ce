"""The experiments' own parts: references moving away from the solver, intervals, tables of stored results."""
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from sd import UserError, experiment
from sd.controls import reference
from sd.experiment import ARMS, confidence, publish, summary, table
from sd.problems import EMBEDDED, embedded, read_problems, write_problems
from sd.rollouts import Rollout
from sd.steps import parse
from sd.study import gap
from sd.study import ledger as kept
from sd.study.ledger import METRICS, make_job, measure, problems_of, read_curve, run
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
    assert 0.3 < np.mean(order["half"]) < 0.7           # its own order half of the time, else random of 720
    assert all("=" in reference(p, "same") and "=" not in reference(p, "worded") for p in PROBLEMS)
    assert all(len(facts(reference(p, "decomposed"))) == 3 * len(own[p.id]) for p in PROBLEMS)


def test_the_interval_is_the_textbooks_and_not_finite_for_one_seed():
    # Student's t of two degrees of freedom, 4.30 * sqrt(1 / 3); of one, 12.71 * sqrt(0.5 / 2)
    assert confidence(np.array([1.0, 2.0, 3.0])) == pytest.approx((-0.4826, 4.4826), abs=1e-3)
    assert confidence(np.array([1.0, 2.0])) == pytest.approx((-4.855, 7.855), abs=1e-3)
    assert confidence(np.array([1.0])) == (-np.inf, np.inf)
    assert confidence(np.arange(30.0))[0] > 14.5 - 2.27 * 8.81 / 30 ** 0.5


def line(avg, rollouts=32, curve=(4.0, 50.0)):
    """A run in the ledger, its Maj and Pass the same as its Avg."""
    rows = [{"step": 10 * i, "avg": value, "rollouts": rollouts * i, "tokens": 1000 * i, "entropy": 0.5,
             "signal": 0.25, "length": 100.0} for i, value in enumerate(curve)]
    return {"test": {f"{name}@12": avg for name in ("avg", "maj", "pass")}, "curve": rows}


def test_the_table_says_what_the_ledger_has():
    arms = {"ref": [line(37.5), line(50.0)], "critique": [line(62.5), line(75.0)]}
    text = table(summary(arms))
    # by hand: ref 37.5 and 50, critique 62.5 and 75; sample standard deviation 12.5 / sqrt(2)
    assert "| ref | 43.8 ± 8.8 | 43.8 ± 8.8 | 43.8 ± 8.8 | 32 |" in text
    assert "| critique | 68.8 ± 8.8 |" in text and "2 seeds" in text
    assert "| critique - ref | +25.0 | +25.0 to +25.0 |" in text
    one = table(summary({name: lines[:1] for name, lines in arms.items()}))
    assert "| ref | 37.5 ± 0.0 |" in one and "1 seeds" in one and "-inf to +inf" in one
    three = summary(arms | {"again": arms["ref"]})["differences in avg@12"]
    assert list(three) == ["critique - ref", "again - ref", "again - critique"]
    assert three["again - ref"] == [0, 0, 0] and three["again - critique"][0] == -25
    many = summary(arms | {f"more {i}": arms["ref"] for i in range(3)})["differences in avg@12"]
    assert list(many) == ["critique - ref", "more 0 - ref", "more 1 - ref", "more 2 - ref"]


def test_a_curve_has_what_was_spent_until_each_evaluation(tmp_path):
    """By hand: 8 rollouts a step of 10 and 20 tokens, then 8 of 5."""
    rows = [{"step": 0, "val_avg@4": 3.0},
            {"step": 1, "loss": 1.0, "length": 10.0, "rollouts": 8, "entropy": 0.2, "signal": 0.5},
            {"step": 2, "loss": 1.0, "length": 20.0, "rollouts": 16, "entropy": 0.4, "signal": 1.0},
            {"step": 2, "val_avg@4": 7.5, "val_length": 9.0},
            {"step": 3, "loss": 1.0, "length": 5.0, "rollouts": 24, "entropy": 0.1, "signal": 0.0},
            {"step": 3, "val_avg@4": 9.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    curve = [
        {"step": 0, "avg": 3.0, "rollouts": 0, "tokens": 0},
        {"step": 2, "avg": 7.5, "rollouts": 16, "tokens": 240, "entropy": 0.3, "signal": 0.75, "length": 15.0},
        {"step": 3, "avg": 9.0, "rollouts": 24, "tokens": 280, "entropy": 0.1, "signal": 0.0, "length": 5.0}]
    assert read_curve(tmp_path / "metrics.jsonl", []) == curve
    begun = [{"step": 0, "avg": 1.0, "rollouts": 0, "tokens": 0}, {"step": 30, "avg": 2.0, "rollouts": 100, "tokens": 1000}]
    joined = read_curve(tmp_path / "metrics.jsonl", begun)
    assert [[row[name] for name in ("step", "avg", "rollouts", "tokens")] for row in joined] == [
        [0, 1.0, 0, 0], [30, 3.0, 100, 1000], [32, 7.5, 116, 1240], [33, 9.0, 124, 1280]]


class Commands:
    """In place of train.py and eval.py: remembers what was asked, and writes what they would."""

    def __init__(self, monkeypatch):
        self.asked = []
        monkeypatch.setattr(kept, "run_command", self)

    def __call__(self, *command):
        self.asked.append(list(command))
        folder = Path(command[-1].partition("=")[2]) if command[0] == "train.py" else Path(command[1]).parent
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.jsonl").write_text(json.dumps({"step": 0, "val_avg@4": 3.0}) + "\n")
        if command[0] == "eval.py":
            (folder / "test.json").write_text(json.dumps(
                {f"{name}@12": {"mean": 1.5} for name in ("avg", "maj", "pass")}))


def test_killed_runs_go_on_and_others_start_afresh(tmp_path, monkeypatch):
    commands = Commands(monkeypatch)
    job = make_job("ref --temperature 0.9", 7, ["--steps", "3"])
    for name, files in (("new", []), ("killed early", ["config.json"]),
                        ("killed", ["config.json", "state-3.safetensors"]), ("measured", ["test.json"])):
        out = tmp_path / name
        run(job, tmp_path / "a")                # says which folder it is
        folder = out / commands.asked[0][-1].partition("=")[2].removeprefix(f"{tmp_path}/a/")
        folder.mkdir(parents=True)
        for file in files:
            (folder / file).write_text((tmp_path / "a/runs" / folder.name / file).read_text()
                                       if file == "test.json" else "")
        (folder / "metrics.jsonl").write_text(json.dumps({"step": 0, "val_avg@4": 3.0}) + "\n")
        del commands.asked[1:]
        found = run(job, out)
        assert found["test"]["avg@12"] == 1.5 and found["options"]["seed"] == 7
        train, test = commands.asked[1:] or ([], [])
        assert test == ([] if name == "measured" else [
            "eval.py", str(folder / "best"), f"--test={EMBEDDED}/test.jsonl", "--temperature=0.9",
            "--max-new-tokens=128", f"--json={folder}/test.json"])          # as it was trained
        fresh = ["train.py", "--cond", "ref", "--temperature", "0.9", "--steps", "3", "--seed=7",
                 f"--data={EMBEDDED}/train.jsonl", f"--val={EMBEDDED}/val.jsonl", f"--out={folder}"]
        assert train == {"killed": ["train.py", f"--resume={folder}"], "measured": []}.get(name, fresh)


def test_the_ledger_knows_a_run_by_its_options_and_nothing_is_measured_twice(tmp_path, monkeypatch):
    commands = Commands(monkeypatch)
    jobs = {arm: [make_job(arm, seed, []) for seed in (0, 1)] for arm in ("ref", "ref --teacher base", "grpo")}
    ledger = []
    measure(jobs, ledger, tmp_path, 1)          # base is the default, so the first two are the same
    assert len(ledger) == 4 and len(commands.asked) == 8
    stored = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    assert stored == ledger
    measure(jobs, stored, tmp_path, 1)
    assert len(commands.asked) == 8
    path = tmp_path / "ledger.jsonl"
    path.write_text(path.read_text()[:-9])      # killed while the last line was written
    measure({"grpo": [make_job("grpo", 0, [])]}, ledger[:0], tmp_path, 1)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [*ledger[:-1], ledger[1]]
    find = lambda arm, seed=0, extra=(): make_job(arm, seed, extra).find(stored)
    assert find("ref")["options"]["cond"] == "ref" and find("ref", 1)["options"]["seed"] == 1
    for other in ("critique", "ref --divergence jsd", "ref --products 3", "ref --references same"):
        assert find(other) is None
    assert find("ref", 2) is find("ref", 0, ["--steps", "2"]) is None
    for row in stored:                          # of an earlier version, which lacked an option
        del row["options"]["clip"]
    assert find("ref") and find("ref", 0, ["--clip", "2"]) is None
    monkeypatch.setattr(kept, "solver_digest", lambda: "another solver")
    assert find("ref") is None


def test_a_run_after_another_begins_with_its_best_weights(tmp_path, monkeypatch):
    commands = Commands(monkeypatch)
    found = run(make_job("grpo --after ref --steps 31", 5, []), tmp_path)
    first, _, second, _ = commands.asked
    assert first[:6] == ["train.py", "--cond", "ref", "--steps", "30", "--seed=5"]
    folder = first[-1].partition("=")[2]
    assert second[:7] == ["train.py", "--cond", "grpo", "--steps", "31", "--seed=5", f"--model={folder}/best"]
    assert found["after"] == "ref" and make_job("grpo --after ref --steps 31", 5, []).find([found])
    assert make_job("grpo --steps 31", 5, []).find([found]) is None


def test_problems_of_another_length_or_with_other_references_are_made_once(tmp_path, monkeypatch):
    made = []

    def make_problems(folder, model, tokenizer, products):
        made.append(products)
        for split in ("train", "val", "test"):
            write_problems(folder / f"{split}.jsonl", PROBLEMS[:2])
    monkeypatch.setattr(kept, "make_problems", make_problems)
    assert problems_of(make_job("ref", 0, []), tmp_path) == EMBEDDED
    folder = problems_of(make_job("ref --products 3", 0, []), tmp_path)
    assert problems_of(make_job("grpo --products 3", 1, []), tmp_path) == folder and made == [3]
    other = problems_of(make_job("ref --references worded", 0, []), tmp_path)
    found = read_problems(other / "test.jsonl")
    assert [p.problem for p in found] == [p.problem for p in embedded("test")] and made == [3]
    assert [p.solution for p in found] == [reference(p, "worded") for p in embedded("test")]


def test_all_arms_are_options_of_train_and_no_experiment_needs_a_run_that_another_has():
    for arms in ARMS.values():
        assert len(arms) == len(set(arms)) and all(make_job(arm, 0, []).config for arm in arms)
    rate = [make_job(arm, 0, []).facts for arm in ARMS["rate"]]
    horizon = [make_job(arm, 0, []).facts for arm in ARMS["horizon"] if "reverse" not in arm]
    assert all(facts in rate for facts in horizon)
    gap = [str(make_job(arm, 0, []).facts) for arm in ARMS["gap"]]
    assert len(set(gap)) == len(gap) == 28              # no context counts twice in a correlation


def test_each_experiment_writes_its_table_and_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gap, "before", lambda config, problems: dict.fromkeys(
        ("lead", "correct", "wrong", "auroc", "low", "high"), config.critic_noise + 0.01 * len(config.control)))
    monkeypatch.setattr(experiment, "problems_of", lambda job, out: EMBEDDED)
    figures = {"rate": [], "horizon": ["curves.svg", "figure.svg"], "long": ["figure.svg"], "gap": ["figure.svg"],
               "contexts": ["figure.svg"]}
    for name, arms in ARMS.items():
        jobs = {arm: [make_job(arm, seed, []) for seed in range(2)] for arm in arms}
        lines = {arm: [line(40.0), line(50.0, curve=(4.0, 50.0 + i))] for i, arm in enumerate(arms)}
        publish(name, jobs, lines, tmp_path)
        written = sorted(path.name for path in (tmp_path / name).iterdir())
        assert written == [*figures.get(name, []), "table.md"]
        table = (tmp_path / name / "table.md").read_text()
        assert f"{name}\n{table}" in capsys.readouterr().out
        assert {"rate": "by the rule", "horizon": "untrained", "long": "a tenth lower", "gap": "rank correlation"}.get(
            name, "2 seeds") in table


def test_contexts_are_measured_with_the_options_that_they_are_trained_with(tmp_path, monkeypatch):
    """They were measured at the default temperature whatever the runs were given."""
    seen = []

    def before(config, problems):
        seen.append(config.temperature)
        return dict.fromkeys(("lead", "correct", "wrong", "auroc", "low", "high"), 0.01 * len(seen))
    monkeypatch.setattr(gap, "before", before)
    jobs = {arm: [make_job(arm, 0, ["--temperature", "0.7"])] for arm in ("critique", "ref", "ref --control none")}
    publish("contexts", jobs, {arm: [line(0.0, curve=(4.0, 9.0 + i))] for i, arm in enumerate(jobs)}, tmp_path)
    assert seen == [0.7] * 3


def test_reference_solutions_are_written_once(tmp_path):
    """Runs at the same time wrote them over each other, which failed now and then."""
    job = make_job("ref --references worded", 0, [])
    folder = problems_of(job, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert problems_of(job, tmp_path) == folder and len(before) == 3
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_a_failure_starts_nothing_more(tmp_path, monkeypatch, capsys):
    begun = []

    def fails(job, out):
        begun.append(job)
        raise UserError("no space")
    monkeypatch.setattr(kept, "run", fails)
    monkeypatch.setattr(sys, "argv", ["sd.experiment", "main", "--fresh", "--jobs", "1", "--out",
                                      str(tmp_path)])
    assert experiment.main() == 2 and "no space" in capsys.readouterr().err and len(begun) <= 3


def test_a_noisy_critic_is_wrong_as_often_as_asked_and_goes_on_consistently():
    wrong = total = 0
    for p in PROBLEMS:
        (a, b), *rest = [tuple(map(int, t.split("*"))) for t in p.problem.split(" + ")]
        text = f"<step_1> {a}*{b}={a * b + 3} </step_1>"
        r = Rollout(p, [], [], None, False, parse(text), None, 0.0)
        exact, noisy = SymbolicCritic()(r), SymbolicCritic(noise=0.3)(r)
        assert exact.wrong == noisy.wrong == 0
        first, *_ = facts(noisy.text)
        wrong, total = wrong + (first[3] != a * b), total + 1
        assert parse(noisy.text).answer.text == str(first[3] + sum(c * d for c, d in rest))    # carries the error to the end
        assert parse(exact.text).answer.text == p.answer
    assert wrong / total == pytest.approx(0.3, abs=0.15)


def test_an_option_that_the_experiment_sets_itself_is_refused(monkeypatch, capsys, tmp_path):
    """`--seed 7` for `--seeds 7` went on to every run, and the table told of seven seeds without any spread.
    A model of one's own was trained, and tested on the embedded problems."""
    for option, *value in ("--seed", "7"), ("--model", "mine"), ("--seed=7",), ("--products", "3"):
        monkeypatch.setattr(sys, "argv", ["sd.experiment", "quoting", option, *value, "--out", str(tmp_path)])
        with pytest.raises(SystemExit):
            experiment.main()
        assert f"{option} is the experiment's own" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_number_that_an_arm_has_too_is_no_option(monkeypatch, tmp_path):
    """`horizon --steps 6` was refused, since its arms have --products 6."""
    seen = []
    monkeypatch.setattr(experiment, "measure", lambda jobs, *rest: seen.extend(jobs))
    monkeypatch.setattr(experiment, "publish", lambda *args: None)
    monkeypatch.setattr(sys, "argv", ["sd.experiment", "horizon", "--steps", "6", "--out", str(tmp_path)])
    assert experiment.main() == 0 and len(seen) == 30


def test_a_wrong_option_is_reported_once_before_anything_runs(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(kept, "run_command", lambda *command: pytest.fail(str(command)))
    for extra, fact in (["--stepps", "20"], "--stepps"), (["--batch=0"], "--batch"):
        monkeypatch.setattr(sys, "argv", ["sd.experiment", "main", *extra, "--out", str(tmp_path)])
        try:
            status = experiment.main()
        except SystemExit as end:
            status = end.code
        err = capsys.readouterr().err
        assert status == 2 and fact in err.splitlines()[-1] and "Traceback" not in err
        assert sum("error" in line or "must" in line for line in err.splitlines()) == 1


def test_both_parts_of_a_handoff_are_given_the_users_options(tmp_path, monkeypatch):
    """The steps before --after had the defaults, whatever the user gave."""
    given = []

    def run_command(name, *options):
        given.append(options)
        out = next(option for option in options if option.startswith(("--out", "--json"))).partition("=")[2]
        if name == "eval.py":
            Path(out).write_text(json.dumps({metric: {"mean": 1.0} for metric in METRICS}))
        else:
            Path(out).mkdir(parents=True)
            (Path(out) / "metrics.jsonl").write_text('{"step": 0, "val_avg@4": 1.0}\n')
    monkeypatch.setattr(kept, "run_command", run_command)
    run(make_job("grpo --after critique --steps 31", 0, ["--temperature", "0.7"]), tmp_path)
    trained = [" ".join(options) for options in given if "--cond" in options]
    assert len(trained) == 2 and all("--temperature 0.7" in options for options in trained)


def test_a_step_that_was_evaluated_twice_is_one_point_of_the_curve(tmp_path):
    """So it is in a run that lost its best/ and was resumed; the tables could not be made of two."""
    rows = [{"step": 0, "val_avg@4": 4.0}, {"step": 1, "loss": 1.0, "length": 100, "rollouts": 32, "entropy": 0.3,
                                           "signal": 1.0}, {"step": 1, "val_avg@4": 9.0}, {"step": 1, "val_avg@4": 9.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    curve = read_curve(tmp_path / "metrics.jsonl", [])
    assert [row["step"] for row in curve] == [0, 1] and curve[1]["length"] == 100 and curve[1]["tokens"] == 3200


def test_what_is_shipped_counts_as_a_whole(monkeypatch, tmp_path):
    """With other test problems, the numbers of the shipped ones were printed."""
    before = kept.solver_digest.__wrapped__()
    monkeypatch.setattr(kept, "embedded", lambda split: embedded(split)[:-1])
    assert kept.solver_digest.__wrapped__() != before


@pytest.mark.parametrize("option", ["--seeds", "--jobs"])
def test_no_seeds_and_no_jobs_are_refused(option, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sd.experiment", "main", option, "0"])
    with pytest.raises(SystemExit, match="2"):
        experiment.main()
    assert "must be 1 or more" in capsys.readouterr().err
