"""Runs that are killed, stopped or damaged go on: to the numbers of a run that never stopped, bit for bit."""
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import time
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import train
from sd import UserError
from sd.conditions import Teacher
from sd.config import Config, read_run_config
from sd.llm import checkpoint
from sd.llm.checkpoint import load
from sd.llm.lora import add_lora
from sd.metrics import Scores
from sd.problems import EMBEDDED, read_problems
from sd.run import runs
from sd.run.ranks import Ranks
from sd.run.runs import RunFolder
from sd.run.stop import Stopped, StopRequest

STEPS = 6
TINY = ["--batch", 4, "--eval-samples", 1, "--steps", STEPS, "--eval-every", 2, "--lr", 1e-3]
PLAIN = ["--cond", "ref", "--max-new-tokens", 30, *TINY]
LORA = ["--cond", "critique", "--lora-rank", 4, "--lora-alpha", 8, "--teacher", "ema", *TINY]


def contents(folder):
    """All that must be the same, whatever happened on the way."""
    out = {}
    for path in sorted(folder.rglob("*.safetensors")):
        out[path.relative_to(folder)] = {name: sha256(t.numpy().tobytes()).hexdigest()
                                         for name, t in load_file(path).items()}
    for name in ("best", "last"):
        with safe_open(folder / name / "model.safetensors", "pt") as file:
            out[name] = file.metadata()
    out["metrics"] = [{k: v for k, v in json.loads(line).items() if k != "seconds"}
                      for line in (folder / "metrics.jsonl").read_text().splitlines()]
    out["rollouts"] = (folder / "rollouts.jsonl").read_text()
    return out


def assert_same(folder, whole):
    one, other = contents(folder), contents(whole)
    assert one.keys() == other.keys()
    for key in one:
        assert one[key] == other[key], key
    assert not [p for p in folder.rglob("*") if "tmp" in p.name]


def sampled(folder):
    """rollouts.jsonl but for its nats, which are rounded otherwise where a batch has other parts."""
    return [{key: value for key, value in json.loads(line).items() if key != "nats"}
            for line in (folder / "rollouts.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(trainer, tmp_path_factory):
    """Two runs that were left alone, and how long one takes."""
    base = tmp_path_factory.mktemp("whole")
    assert trainer([*LORA, "--out", base / "lora"])[0] == 0
    begin = time.time()
    assert trainer([*PLAIN, "--out", base / "plain"])[0] == 0
    return base, time.time() - begin


def test_killed_at_random_moments_and_resumed_it_ends_as_if_left_alone(trainer, whole, tmp_path):
    """It could not be resumed before its first evaluation was over: the first state was written then."""
    out = tmp_path / "run"
    assert trainer([*PLAIN, "--out", out], lambda text: f"{STEPS} steps of" in text)[0] == -9
    moments = [random.uniform(0.05, 0.5) * whole[1] for _ in range(3)]
    for moment in [*moments, 1e9]:
        begun = time.time()
        code, text = trainer(["--resume", out], lambda text: time.time() - begun > moment)
        assert code == (-9 if moment < 1e9 and "done." not in text else 0), (moments, text)
    assert_same(out, whole[0] / "plain")


def test_terminated_and_interrupted_with_an_adapter_and_a_moving_average_it_goes_on_exactly(
        trainer, whole, tmp_path):
    out = tmp_path / "run"
    code, text = trainer([*LORA, "--out", out], lambda text: "step    1/" in text, signal.SIGTERM)
    step = int(re.search(r"after step (\d); go on with", text)[1])
    assert code == 143 and text.count("the run stops after this step") == 1 and 1 <= step <= 2
    assert text.splitlines()[-2:] == [f"after step {step}; go on with: python train.py --resume {out}",
                                      "train.py: stopped"]
    assert load(out / "last") and (out / "last/adapter/adapter_config.json").exists()
    code, text = trainer(["--resume", out], lambda text: "step    3/" in text, signal.SIGINT)
    assert code == 130 and re.search(rf"after step [34]; go on with: python train.py --resume {out}\n", text)
    assert f"to {out}, from step {step}\n" in text and "Traceback" not in text
    assert trainer(["--resume", out])[0] == 0
    assert_same(out, whole[0] / "lora")


def test_a_run_that_is_done_resumes_to_the_same(trainer, whole, tmp_path):
    shutil.copytree(whole[0] / "plain", tmp_path / "run")
    code, text = trainer(["--resume", tmp_path / "run"])
    assert code == 0 and "done." in text and "validation" not in text.split("done.")[0]
    assert_same(tmp_path / "run", whole[0] / "plain")


def test_two_processes_never_write_one_run(whole, tmp_path, here):
    """Both wrote: the log had its steps twice, or lost those of the run that was still going."""
    out = tmp_path / "run"
    shutil.copytree(whole[0] / "plain", out)
    before = (out / "metrics.jsonl").read_bytes()
    other = sqlite3.connect(out / "lock", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    code, text = here("--resume", out)
    assert code == 2 and "another process is writing this run" in text and text.count("\n") == 1
    assert (out / "metrics.jsonl").read_bytes() == before
    other.close()
    assert here("--resume", out)[0] == 0


def flip(path, at, bits=0x10):
    data = bytearray(path.read_bytes())
    data[at] ^= bits
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["flipped", "truncated"])
def test_a_damaged_state_gives_way_to_the_one_before(trainer, whole, tmp_path, how):
    """And what was written after that one is written anew, with the leftovers of a killed process gone."""
    out = tmp_path / "run"
    shutil.copytree(whole[0] / "plain", out)
    newest = out / f"state-{STEPS:06d}.safetensors"
    flip(newest, newest.stat().st_size // 2) if how == "flipped" else \
        os.truncate(newest, newest.stat().st_size // 2)
    for left in (out / "state-000005.safetensors.tmp", out / ".tmpaB3", out / "best" / ".tmpxyz"):
        left.write_text("half")
    code, text = trainer(["--resume", out])
    assert code == 0 and f"damaged: {newest}: " in text and f"from step {STEPS - 2}\n" in text
    assert_same(out, whole[0] / "plain")


def test_a_line_of_a_log_that_was_half_written_goes_when_the_run_goes_on(trainer, whole, tmp_path):
    """A power cut may take what a log had last, though the state after it is there."""
    out = tmp_path / "run"
    shutil.copytree(whole[0] / "plain", out)
    run_state = sorted(out.glob("state-*"))[0]
    (out / f"state-{STEPS:06d}.safetensors").unlink()
    log = out / "metrics.jsonl"
    lines, facts = log.read_bytes().splitlines(True), json.loads(
        safe_open(run_state, "pt").metadata()["facts"])
    kept = facts["logs"][0]
    log.write_bytes(b"".join(lines)[:kept - 7])         # its last seven bytes were lost
    code, text = trainer(["--resume", out])
    assert code == 0, text
    assert all(json.loads(line) for line in log.read_text().splitlines())


@pytest.fixture
def open_run():
    """A folder's run with an adapter as `train` opens it, not trained on: it and the step it goes on from."""
    student, tokenizer = load(EMBEDDED)
    add_lora(student, 4, 8, 0)
    initial = {name: p.clone() for name, p in student.state_dict().items()}

    def begin(folder):
        student.load_state_dict(initial)
        config = read_run_config(folder / "config.json")
        run, problems = (RunFolder(config, Ranks(torch.device("cpu")), folder),
                         map(read_problems, map(Path, (config.data, config.val))))
        optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad])
        teacher = Teacher("ema", student, 0.9)
        return run, run.begin(student, tokenizer, optimizer, teacher, STEPS, sum(problems, []))
    return begin


def test_no_flipped_bit_anywhere_goes_unnoticed(whole, tmp_path, capsys, open_run):
    """The checksum was of the tensors alone: a step of 4 that read 5, or another best score, was believed."""
    out, rng = tmp_path / "run", random.Random(0)
    shutil.copytree(whole[0] / "lora", out)
    newest = out / f"state-{STEPS:06d}.safetensors"
    good, (run, step) = newest.read_bytes(), open_run(out)
    state = {name: t.clone() for name, t in run.tensors.items()}
    facts = run.best, run.best_at, run.evaluated_at
    header, begin = 8 + int.from_bytes(good[:8], "little"), good.index(b'"facts"')
    assert step == STEPS
    numbers = [at for at in range(begin, good.index(b'}"', begin)) if good[at:at + 1].isdigit()]
    for at in [0, 7, *rng.sample(range(8, header), 25), *numbers[:12],
               *rng.sample(range(header, len(good)), 5)]:
        newest.write_bytes(good)
        flip(newest, at, 1 if at in numbers else 1 << rng.randrange(8))
        run.__exit__(None, None, None)                  # which unlocks the folder
        run, step = open_run(out)
        told = "damaged" in capsys.readouterr().out
        assert (step == STEPS - 2) == told and told >= (at in numbers), at
        if not told:                                    # in what is not read, such as a space
            assert step == STEPS and (run.best, run.best_at, run.evaluated_at) == facts
            assert all(torch.equal(t, state[name]) for name, t in run.tensors.items())


def test_the_last_two_states_are_kept(whole):
    assert sorted(p.name for p in (whole[0] / "plain").glob("state-*")) == [
        "state-000004.safetensors", "state-000006.safetensors"]


def test_without_a_whole_state_a_run_is_not_resumed(whole, tmp_path, here):
    out = tmp_path / "run"
    shutil.copytree(whole[0] / "plain", out)
    for path in out.glob("state-*"):
        flip(path, path.stat().st_size // 2)
    metrics = (out / "metrics.jsonl").read_text()
    code, text = here("--resume", out)
    assert code == 2 and text.splitlines()[-1].startswith(f"train.py: {out}: has no intact state"), text
    assert "Traceback" not in text and (out / "metrics.jsonl").read_text() == metrics


def test_a_resume_that_fails_leaves_the_run_as_it_was(whole, tmp_path, here):
    """It wrote the untrained model to last/, and a state of step 0."""
    out = tmp_path / "run"
    shutil.copytree(whole[0] / "plain", out)
    for path in out.glob("state-*"):
        flip(path, path.stat().st_size - 9)
    before = {path: sha256(path.read_bytes()).hexdigest() for path in out.rglob("*") if path.is_file()}
    code, text = here("--resume", out)
    assert code == 2 and text.splitlines()[-1].startswith(f"train.py: {out}: has no intact state"), text
    assert before == {path: sha256(path.read_bytes()).hexdigest()
                      for path in out.rglob("*") if path.is_file()}


@pytest.mark.parametrize("change, told", [
    ("weights", "the weights and config.json in --model are not those"), ("moved", ""),
    ("rope", "the weights and config.json in --model are not those"),
    ("tokenizer", "the tokenizer and chat template in --model are not those"),
    ("data", "the problems in --data or --val are not those"),
    ("lr", "the options in config.json are not those"), ("device", "")])
def test_a_run_does_not_go_on_with_other_weights_problems_or_options(whole, tmp_path, here, change, told):
    """A --model that was replaced by one of the same shape went on without a word. Files may lie elsewhere."""
    out, data, model = tmp_path / "run", tmp_path / "train.jsonl", tmp_path / "model"
    shutil.copytree(whole[0] / "plain", out)
    config = json.loads((out / "config.json").read_text())
    lines = Path(config["data"]).read_text().splitlines(keepends=True)
    data.write_text("".join(lines[:-1] if change == "data" else lines))
    shutil.copytree(EMBEDDED, model)
    if change == "weights":
        tensors = load_file(model / "model.safetensors")
        tensors["model.norm.weight"] *= 1.01
        save_file(tensors, model / "model.safetensors", {"format": "pt"})
    if change == "rope":
        (model / "config.json").write_text((model / "config.json").read_text().replace("10000.0", "20000.0"))
    if change == "tokenizer":
        raw = json.loads((model / "tokenizer.json").read_text())
        raw["model"]["vocab"] |= {"8": raw["model"]["vocab"]["9"], "9": raw["model"]["vocab"]["8"]}
        (model / "tokenizer.json").write_text(json.dumps(raw))
    config |= {"data": str(data), "model": str(model)} | {"lr": {"lr": 2e-3}, "device": {"device": "cpu"}}.get(change, {})
    (out / "config.json").write_text(json.dumps(config))
    code, text = here("--resume", out)
    assert (code, "done." in text) == ((2, False) if told else (0, True)), text
    assert told in text and (not told or text.count("\n") == 1)


STEP = dict.fromkeys(["loss", "reward", "entropy", "length", "truncated", "rollouts"], 0)


class Untrained:
    """Runs of the embedded solver as `train` opens them, without training: to write, to break and to resume."""

    def __init__(self, base):
        self.student, self.tokenizer = load(EMBEDDED)
        self.student.requires_grad_(False)
        self.student.model.norm.weight.requires_grad_()
        self.initial = self.student.model.norm.weight.detach().clone()
        self.config = Config(cond="ref", out=str(base / "run"), eval_samples=1)

    def __call__(self, resume=None, begin=True, **options):
        self.fill(self.initial)
        run = RunFolder(replace(self.config, **options), Ranks(torch.device("cpu")), resume)
        return self.begin(run) if begin else run

    def begin(self, run):
        optimizer = torch.optim.AdamW([self.student.model.norm.weight])
        run.begin(self.student, self.tokenizer, optimizer, None, 4, [])
        return run

    def fill(self, value):
        with torch.no_grad():
            self.student.model.norm.weight.copy_(value)

    def step(self, run, step, score=None):
        self.fill(torch.full((128,), float(step)))
        run.stepped(step, STEP)
        if score is not None:
            run.evaluated(step, Scores(1, *[np.array([score])] * 3, 1.0, 0.0))


@pytest.fixture
def untrained(tmp_path):
    return Untrained(tmp_path)


@pytest.mark.parametrize("fault, resumed, after", [
    ("best", (1, 0.1), (3, 0.2)), ("state", (2, 0.3), (2, 0.3)),
    ("gone", (0, -1), (3, 0.2)), ("half", (0, -1), (3, 0.2)), ("other version", (0, -1), (3, 0.2))])
def test_best_holds_what_a_resumed_run_says_whatever_happened(untrained, monkeypatch, capsys, fault, resumed, after):
    """A kill between best/ and the state: the run said step 1 and held step 2. Without best/, it went on as well."""
    run, save = untrained(), runs.save_tensors
    untrained.step(run, 1, 0.1)
    best, written = run.path / "best/model.safetensors", []

    def full(path, *more):                      # the disk, at the first or the second file of an evaluation
        written.append(path)
        if len(written) == {"best": 1, "state": 2}.get(fault):
            raise UserError("full")
        save(path, *more)

    with monkeypatch.context() as patch, suppress(UserError):
        for module in (runs, checkpoint):
            patch.setattr(module, "save_tensors", full)
        untrained.step(run, 2, 0.3)
    run.__exit__(None, None, None)
    if fault == "gone":
        best.unlink()
    elif fault == "half":
        os.truncate(best, 1000)
    elif fault == "other version":
        save_file(load_file(best), best, {"format": "pt", "step": "2"})
    run = untrained(run.path)
    assert (run.best_at, run.best) == resumed
    assert ("chooses it anew" in capsys.readouterr().out) == (resumed[1] == -1)
    for expected in (resumed, after):
        assert (run.best_at, run.best) == expected
        if expected[0]:
            assert set(load_file(best)["model.norm.weight"].tolist()) == {expected[0]}
        untrained.step(run, 3, 0.2)


def test_the_logs_are_on_the_disk_before_a_state_that_counts_on_them(untrained, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (events.append(os.fstat(file).st_ino), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda old, new: (events.append(Path(new).name), replace(old, new)))
    run = untrained()
    run.log_rollouts(1, [{"trace": "x"}])
    untrained.step(run, 1, 0.1)
    before = events[events.index("state-000000.safetensors"):events.index("state-000001.safetensors")]
    assert {(run.path / name).stat().st_ino for name in ("metrics.jsonl", "rollouts.jsonl")} <= set(before)


def test_a_clock_that_is_set_back_changes_no_seconds(untrained, monkeypatch):
    run = untrained()
    monkeypatch.setattr(time, "time", lambda: 0.0)
    untrained.step(run, 1, 0.1)
    assert all(0 <= json.loads(line)["seconds"] < 60 for line in (run.path / "metrics.jsonl").open())


def test_two_runs_begun_at_once_with_the_default_name_both_get_a_folder(untrained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    both = [untrained(out="", begin=False) for _ in range(2)]
    assert [str(untrained.begin(run).path) for run in both] == ["runs/ref-seed0", "runs/ref-seed0-2"]


def test_paths_are_kept_absolute_and_what_is_no_path_as_it_is(untrained, tmp_path, monkeypatch):
    """A run with relative paths could be resumed from its own working directory only."""
    monkeypatch.chdir(tmp_path)
    for i, critic in enumerate(("models/critic", "self", "http://host:8000/v1#models/critic")):
        run = untrained(out=f"run{i}", model="m", data="d/train.jsonl", val="/val.jsonl", critic=critic)
        config = read_run_config(run.path / "config.json")
        assert (config.out, config.model, config.data, config.val) == (
            str(tmp_path / f"run{i}"), str(tmp_path / "m"), str(tmp_path / "d/train.jsonl"), "/val.jsonl")
        assert config.critic == (critic if i else str(tmp_path / critic))
    assert read_run_config(untrained(out="plain").path / "config.json").model == ""


def test_ranks_that_would_go_on_from_different_states_do_not_begin(untrained, tmp_path, monkeypatch):
    """Each reads the folder by itself: two machines' may differ, and only rank 0's would be written on."""
    run = untrained()
    untrained.step(run, 1, 0.1)
    run.__exit__(None, None, None)
    shutil.copytree(run.path, tmp_path / "other")
    (tmp_path / "other/state-000001.safetensors").unlink()
    rows = []
    monkeypatch.setattr(Ranks, "gather", lambda self, mine: rows.extend(mine) or list(rows))
    untrained(tmp_path / "other")
    before = (run.path / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match="do not all find the same run"):
        untrained(run.path)
    assert (run.path / "metrics.jsonl").read_text() == before
    rows.clear()
    for name in ("one", "two"):                                 # the same state twice
        assert untrained(shutil.copytree(run.path, tmp_path / name)).done == 1


@pytest.mark.parametrize("what", ["infinite", "NaN"])
def test_weights_that_are_not_finite_are_never_written(untrained, what):
    """A stop after such a step left them in last/ and in the newest state without a word."""
    run = untrained()
    untrained.step(run, 1, 0.1)
    kept = {path: path.read_bytes() for path in run.path.rglob("*.safetensors")}
    untrained.step(run, 2)
    untrained.fill(torch.full((128,), float(what[:3])))
    for write in (lambda: run.evaluated(2, Scores(1, *[np.array([0.9])] * 3, 1.0, 0.0)), run.close):
        with pytest.raises(FloatingPointError, match="is not finite"):
            write()
    assert kept == {path: path.read_bytes() for path in run.path.rglob("*.safetensors")}
    assert (run.best, run.best_at) == (0.1, 1)


@pytest.mark.parametrize("args", [["--lr", 1e-5], ["--cond", "grpo"], ["--out", "x"], ["--preset", "paper"],
                                  ["--dtype", "float32"]])
def test_other_options_beside_resume_are_refused(whole, here, args):
    code, text = here("--resume", whole[0] / "plain", *args)
    assert code == 2 and "--resume keeps the run's options" in text


def test_a_run_goes_on_with_other_options_of_memory_to_the_same_numbers(trainer, whole, tmp_path):
    out = tmp_path / "run"
    assert trainer([*PLAIN, "--out", out], lambda text: "step    2/" in text, signal.SIGTERM)[0] == 143
    code, text = trainer(["--resume", out, "--micro-batch", 1, "--sample-batch", 3, "--recompute"])
    assert code == 0, text
    assert (read_run_config(out / "config.json").micro_batch,
            read_run_config(out / "config.json").recompute) == (1, True)
    assert sampled(out) == sampled(whole[0] / "plain")
    torch.testing.assert_close(load_file(out / "last/model.safetensors"),
                               load_file(whole[0] / "plain/last/model.safetensors"), atol=1e-5, rtol=0)


@pytest.mark.parametrize("change", [{"divergence": "foo"}, {"learning_rate": 1.0}, {"lr": "1e-3"},
                                    {"steps": 6.0}, {"cond": None}, "lacks", "[]", "{", ""])
def test_a_run_of_another_version_is_refused(whole, tmp_path, here, change):
    out = tmp_path / "run"
    shutil.copytree(whole[0] / "plain", out)
    config = json.loads((out / "config.json").read_text())
    config.pop("clip") if change == "lacks" else None
    text = json.dumps(config | change) if isinstance(change, dict) else \
        json.dumps(config) if change == "lacks" else change
    (out / "config.json").write_text(text)
    code, text = here("--resume", out)
    told = "--divergence must be one of" if "divergence" in change else f"{out}/config.json: "
    assert code == 2 and told in text and text.count("\n") == 1
    with pytest.raises(UserError):
        read_run_config(tmp_path / "none")


def test_a_log_shorter_than_the_state_says_is_not_filled_up(whole, tmp_path, open_run):
    """After a power cut a log may have lost its end; cutting it to a larger size put zero bytes there."""
    out = tmp_path / "run"
    shutil.copytree(whole[0] / "lora", out)
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(lines[:-2]))
    (out / "rollouts.jsonl").write_text((out / "rollouts.jsonl").read_text() + '{"step": 7}\n')
    open_run(out)
    assert (out / "metrics.jsonl").read_text() == "".join(lines[:-2])
    assert (out / "rollouts.jsonl").read_text() == (whole[0] / "lora/rollouts.jsonl").read_text()


def test_the_first_signal_is_a_request_and_the_second_one_ends_the_run_at_once(capfd):
    before = signal.getsignal(signal.SIGTERM), signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(Stopped) as stopped:
            with StopRequest() as stop:
                assert stop.number == 0
                os.kill(os.getpid(), signal.SIGINT)     # ignored, so it stays
                assert stop.number == 0 and signal.getsignal(signal.SIGINT) == signal.SIG_IGN
                os.kill(os.getpid(), signal.SIGTERM)
                assert stop.number == signal.SIGTERM and "a second" in capfd.readouterr().err
                os.kill(os.getpid(), signal.SIGTERM)
        assert stopped.value.number == signal.SIGTERM and signal.getsignal(signal.SIGTERM) == before[0]
    finally:
        signal.signal(signal.SIGINT, before[1])


def test_ended_at_once_in_mid_step_it_saves_nothing_and_goes_on_exactly(
        trainer, whole, tmp_path, here, monkeypatch):
    out, step, calls = tmp_path / "run", train.accumulate, []

    def interrupted(*args):
        calls.append(step(*args))
        for _ in range(2 if len(calls) == 4 else 0):
            os.kill(os.getpid(), signal.SIGTERM)
        return calls[-1]

    with monkeypatch.context() as patch:
        patch.setattr(train, "accumulate", interrupted)
        code, text = here(*PLAIN, "--out", out, *trainer.data)
    assert code == 143 and f"after step 3; go on with: python train.py --resume {out}\n" in text
    assert not (out / "last").exists() and not (out / "state-000003.safetensors").exists()
    code, text = here("--resume", out)
    assert code == 0 and "from step 2\n" in text
    assert_same(out, whole[0] / "plain")
