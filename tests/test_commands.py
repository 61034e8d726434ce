"""train.py and eval.py as a user runs them: what they write, what they refuse, how they end."""
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import eval as evaluation
import sd
import train
from sd.llm.checkpoint import load
from sd.conditions import Teacher
from sd.config import Config
from sd.metrics import Scores
from sd.run.ranks import Ranks
from sd.run.runs import RunFolder
from sd.problems import EMBEDDED
from tests.conftest import ROOT, Trainer, few_problems

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
SHORT = ["--steps", "2", "--eval-every", "1", "--eval-samples", "1", "--batch", "4", "--lr", "1e-3"]


def command(*args, before=None):
    return subprocess.run([sys.executable, *map(str, args)], cwd=ROOT, env=ENV, preexec_fn=before, text=True,
                          capture_output=True, stdin=subprocess.DEVNULL, timeout=300)


def metadata(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return file.metadata()


def rows(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def refused(result, *facts):
    """Exit 2 and one line for the user; argparse puts its usage before it."""
    last = result.stderr.strip().split("\n")[-1]
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr and re.match(r"(train|eval)\.py: ", last), result.stderr
    assert result.stderr.startswith("usage:") or result.stderr.count("\n") == 1
    for fact in facts:
        assert fact in last


def ahead(base):
    """name -> (folder, result); `again` in a Python of its own, with other hashes of strings."""
    jobs = {"grpo": ["--cond", "grpo"], "ref": ["--cond", "ref"], "critique": ["--cond", "critique"],
            "again": ["--cond", "critique"], "seed 1": ["--cond", "critique", "--seed", "1"]}
    trainer, results = Trainer(base), {}
    for name, args in jobs.items():
        args = [*args, *SHORT, *trainer.data, "--out", base / name]
        if name == "again":
            results[name] = base / name, command("train.py", *args)
        else:
            code, text = trainer(args)
            results[name] = base / name, subprocess.CompletedProcess(args, code, text, text)
    trainer.close()
    return results


@pytest.fixture(scope="module")
def runs(ahead):
    return ahead["test_commands"].result()


@pytest.mark.parametrize("cond", ["grpo", "ref", "critique"])
def test_a_run_writes_its_folder_and_both_checkpoints_load(runs, cond):
    folder, result = runs[cond]
    assert result.returncode == 0, result.stderr
    assert sorted(p.name for p in folder.iterdir()) == [
        "best", "config.json", "last", "lock", "metrics.jsonl", "report.html", "rollouts.jsonl",
        "state-000001.safetensors", "state-000002.safetensors"]
    config = json.loads((folder / "config.json").read_text())
    assert (config["cond"], config["steps"], config["lr"], config["out"]) == (cond, 2, 1e-3, str(folder))
    trained = [row for row in rows(folder) if "loss" in row]
    assert ([row["step"] for row in trained] == [1, 2]
            and all(np.isfinite(list(row.values())).all() for row in trained))
    assert trained[-1]["rollouts"] == (64 if cond == "grpo" else 8)
    rollouts = rows(folder, "rollouts.jsonl")
    assert len(rollouts) == 8 and all(("critique" in row) == (cond == "critique") for row in rollouts)
    for name in ("best", "last"):
        model, tokenizer = load(folder / name)
        assert all(p.isfinite().all() for p in model.parameters()) and tokenizer.vocab_size
    assert metadata(folder / "last")["step"] == "2" and f"eval.py {folder}/best" in result.stdout


@pytest.mark.parametrize("cond", ["grpo", "ref", "critique"])
def test_best_is_the_checkpoint_with_the_best_validation(runs, cond):
    folder, _ = runs[cond]
    validated = [(row["step"], row["val_avg@1"]) for row in rows(folder) if "val_avg@1" in row]
    assert [step for step, _ in validated] == [0, 1, 2]
    step, _ = max(validated, key=lambda row: (row[1], -row[0]))         # the first of equals
    assert metadata(folder / "best")["step"] == str(step)
    source = {0: EMBEDDED, 2: folder / "last"}.get(step)
    if source:
        same, best = load_file(source / "model.safetensors"), load_file(folder / "best/model.safetensors")
        assert all(torch.equal(same[name], best[name]) for name in best)


def test_best_keeps_its_weights_when_later_scores_are_equal_or_worse(tmp_path):
    run = RunFolder(Config(cond="ref", out=str(tmp_path / "run"), eval_samples=1), Ranks(torch.device("cpu")))
    student, tokenizer = load(EMBEDDED)
    run.begin(student, tokenizer, torch.optim.AdamW(student.parameters()), Teacher("base", student, 0.9), 4, [])
    for step, score in enumerate((0.1, 0.3, 0.3, 0.2)):
        with torch.no_grad():
            student.model.norm.weight.fill_(step)
        run.evaluated(step, Scores(1, *[np.array([score])] * 3, 1.0, 0.0))
    assert metadata(run.path / "best")["step"] == "1"
    assert set(load_file(run.path / "best/model.safetensors")["model.norm.weight"].tolist()) == {1.0}


def test_the_seed_determines_a_run(runs):
    def facts(name):
        return [{key: value for key, value in row.items() if key != "seconds"} for row in rows(runs[name][0])]
    assert facts("critique") == facts("again")
    assert facts("critique") != facts("seed 1")
    assert rows(runs["critique"][0], "rollouts.jsonl") == rows(runs["again"][0], "rollouts.jsonl")


@pytest.mark.parametrize("context", [None, "ref", "critique"])
def test_eval_prints_and_writes_the_metrics(runs, tmp_path, context, here):
    file, folder = tmp_path / "numbers.json", runs["ref"][0] / "last"
    result = here("eval.py", folder, "--test", EMBEDDED / "val.jsonl", "--samples", 1, "--json", file,
                     *(["--context", context] if context else []))
    assert result.returncode == 0, result.stderr
    numbers = json.loads(file.read_text())
    assert (numbers["problems"], numbers["samples"], numbers["context"]) == (100, 1, context)
    assert (numbers["folder"], numbers["test"], numbers["seed"]) == (str(folder), str(EMBEDDED / "val.jsonl"), 0)
    for name in ("avg@1", "maj@1", "pass@1"):
        assert 0 <= numbers[name]["low"] <= numbers[name]["mean"] <= numbers[name]["high"] <= 100
        assert f"{name.capitalize()}" in result.stdout and f"{numbers[name]['mean']:6.2f}" in result.stdout
    if context:
        assert numbers["avg@1"]["mean"] > 20        # shown the way, the solver does far better than its 8 %


def broken(tmp_path, name):
    """A copy of the embedded solver with one thing wrong."""
    folder = tmp_path / "solver"
    folder.mkdir()
    for file in ("config.json", "tokenizer.json", "model.safetensors"):
        shutil.copy(EMBEDDED / file, folder)
    weights, tensors = folder / "model.safetensors", load_file(EMBEDDED / "model.safetensors")
    if name == "missing folder":
        shutil.rmtree(folder)
    elif name == "no config":
        (folder / "config.json").unlink()
    elif name == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    elif name in ("heads", "scaled positions", "epsilon"):
        entry = {"heads": {"num_key_value_heads": 3}, "epsilon": {"rms_norm_eps": None},
                 "scaled positions": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}}[name]
        config = json.loads((folder / "config.json").read_text()) | entry
        (folder / "config.json").write_text(json.dumps(config))
    elif name == "truncated":
        os.truncate(weights, 100_000)
    elif name == "wrong shape":
        save_file({**tensors, "model.norm.weight": torch.ones(64)}, weights)
    elif name == "missing tensor":
        del tensors["model.norm.weight"]
        save_file(tensors, weights)
    elif name == "nan":
        save_file({**tensors, "model.norm.weight": torch.full((128,), float("nan"))}, weights)
    return folder


@pytest.fixture
def here(monkeypatch, capsys):
    """`command` in this process: without starting Python and PyTorch anew."""
    def run(name, *args):
        monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
        try:
            status = {"train.py": train, "eval.py": evaluation}[name].main()
        except SystemExit as end:
            status = end.code
        return subprocess.CompletedProcess(args, status, *capsys.readouterr())
    return run


@pytest.mark.parametrize("names", ["critique/last ref/last", "seed 1/last seed 1/best", "critique/last again/last",
                                   "critique/last critique/last", "critique/last seed 1/best"])
def test_eval_gives_no_mean_but_over_seeds_of_one_setting(runs, here, tmp_path, names):
    """It printed one over different conditions."""
    few_problems(tmp_path)
    folders = [next(iter(runs.values()))[0].parent / name for name in re.findall(r"\S.*?/\w+", names)]
    result = here("eval.py", *folders, "--test", tmp_path / "val.jsonl", "--samples", 1)
    assert result.returncode == 0 and result.stdout.count("mean length") == 2 and "±" not in result.stdout


def test_eval_of_several_checkpoints_gives_mean_and_spread(runs, here, tmp_path):
    folders = [runs[name][0] / "last" for name in ("critique", "seed 1")]
    result = here("eval.py", *folders, "--test", EMBEDDED / "val.jsonl", "--samples", 1, "--json", tmp_path / "n.json")
    first, second = (row["avg@1"]["mean"] for row in json.loads((tmp_path / "n.json").read_text()))
    mean, spread = re.search(r"over 2 checkpoints\n  Avg@1 +([\d.]+) ± ([\d.]+)", result.stdout).groups()
    assert float(mean) == pytest.approx((first + second) / 2, abs=0.01)
    assert float(spread) == pytest.approx(abs(first - second) / 2 ** 0.5, abs=0.01)


@pytest.mark.parametrize("name, fact", [
    ("missing folder", "no such folder"), ("no config", "no config.json"), ("no tokenizer", "tokenizer.json"),
    ("heads", "num_key_value_heads"), ("scaled positions", "rotary"), ("epsilon", "rms_norm_eps"),
    ("truncated", "model.safetensors"), ("wrong shape", "model.norm.weight"),
    ("missing tensor", "model.norm.weight"),
])
def test_a_broken_checkpoint_is_refused_by_both_commands(tmp_path, name, fact, here):
    folder, kept = broken(tmp_path, name), tmp_path / "kept.json"
    kept.write_text("old")
    refused(here("train.py", "--cond", "ref", *SHORT, "--model", folder, "--out", tmp_path / "out"),
            str(folder), fact)
    refused(here("eval.py", folder, "--samples", 1, "--json", kept), str(folder), fact)
    assert not (tmp_path / "out").exists() and kept.read_text() == "old"


@pytest.mark.parametrize("args, fact", [
    (["train.py", "--cond", "other"], "--cond"), (["train.py"], "--cond"),
    (["train.py", "--cond", "ref", "--nonsense", "1"], "--nonsense"),
    (["train.py", "--cond", "ref", "--lr", "-1"], "--lr"),
    (["train.py", "--cond", "ref", "--lr", "nan"], "--lr"), (["train.py", "--cond", "ref", "--lr", "1e38"], "--lr"),
    (["train.py", "--cond", "ref", "--steps", "-1"], "--steps"),
    (["train.py", "--cond", "grpo", "--group", "1"], "--group"),
    (["train.py", "--cond", "ref", "--divergence", "jsd", "--beta", "1"], "--beta"),
    (["train.py", "--cond", "ref", "--device", "cpu:1"], "--device"),
    (["eval.py", "--device", "mps"], "--device"),
    (["train.py", "--cond", "ref", "--device", "cuda:99"], "--device"),
    (["train.py", "--cond", "ref", "--seed", "9" * 20], "--seed"),
    (["train.py", "--cond", "ref", "--device", "mps"], "--device"),
    (["train.py", "--cond", "ref", "--max-new-tokens", "600"], "--max-new-tokens"),
    (["eval.py", "--max-new-tokens", "495", "--context", "ref"], "fit the model beside --max-new-tokens"),
    (["train.py", "--preset", "paper", "--cond", "ref"], "needs --model"),
    (["train.py", "--cond", "ref", "--critic", "http://user:hush@host/v1"], "OPENAI_API_KEY"),
    (["train.py", "--cond", "critique", "--critic", "self", "--quoting", "full"], "--quoting"),
    (["train.py", "--cond", "ref", "--critic", "self", "--critic-noise", "0.5"], "--critic-noise"),
    (["train.py", "--cond", "grpo", "--control", "echo"], "--control"),
    (["eval.py", "--nonsense"], "--nonsense"), (["eval.py", "--samples", "0"], "--samples"),
    (["eval.py", "--temperature", "nan"], "--temperature"),
])
def test_an_option_that_makes_no_sense_is_refused(args, fact, tmp_path, here):
    out = "--out" if args[0] == "train.py" else "--json"
    refused(here(*args, out, tmp_path / "out"), fact)
    assert not (tmp_path / "out").exists()


def test_a_bad_option_ends_the_process_with_status_2(tmp_path):
    refused(command("train.py", "--cond", "ref", "--lr", "-1", "--out", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_an_output_folder_in_use_is_refused_and_left_alone(tmp_path, here):
    (tmp_path / "metrics.jsonl").write_text("precious")
    refused(here("train.py", "--cond", "ref", *SHORT, "--out", tmp_path), str(tmp_path),
            "exists already")
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert (tmp_path / "metrics.jsonl").read_text() == "precious"


def no_space(size):
    def before():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    return before


def test_without_disk_space_training_says_so_and_leaves_no_half_file(tmp_path):
    result = command("train.py", "--cond", "ref", *SHORT, "--out", tmp_path / "out", before=no_space(100_000))
    refused(result, ".safetensors", "cannot be written")
    assert (not list((tmp_path / "out").rglob("*.tmp"))
            and not (tmp_path / "out/best/model.safetensors").exists())


def test_without_disk_space_eval_keeps_the_old_numbers(tmp_path):
    file = tmp_path / "numbers.json"
    file.write_text("old")
    # PyTorch 2.9 writes a file of 2,355 bytes when it is imported; ours has 2,800
    refused(command("eval.py", "--test", EMBEDDED / "val.jsonl", "--samples", 1,
                    "--max-new-tokens", 4, "--json", file, before=no_space(2500)), str(file))
    assert file.read_text() == "old" and not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("kind", ["full", "closed"])
def test_a_standard_output_that_takes_nothing_is_told(monkeypatch, capsys, kind):
    """What was still unwritten as the command ended was lost; the sentence said not where there is no space."""
    @sd.command("name", "about")
    def main(parser):
        print("a result")

    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "argv", ["name"])
    with monkeypatch.context() as patch, open("/dev/full" if kind == "full" else writer, "w") as file:
        patch.setattr(sys, "stdout", file)
        status = main()
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())
    error = capsys.readouterr().err
    assert status == 2 and error.startswith("name: standard output, it seems: ") and error.count("\n") == 1
    assert main() == 0


@pytest.mark.parametrize("fault", ["model", "log"])
def test_a_file_that_fails_in_mid_run_is_told_and_the_run_goes_on(tmp_path, here, monkeypatch, fault):
    """The sentence about a log on a full disk named no file."""
    few_problems(tmp_path)
    model, out, scores = shutil.copytree(EMBEDDED, tmp_path / "model"), tmp_path / "run", []
    file = {"model": model / "config.json", "log": out / "metrics.jsonl"}[fault]

    def evaluate(*of, **more):
        scores.append(0.2 if scores else 0.1)
        if len(scores) == 2:
            file.rename(file.with_name("moved"))
            if fault == "log":
                file.symlink_to("/dev/full")
        return Scores(1, *[np.array([scores[-1]])] * 3, 1.0, 0.0)

    monkeypatch.setattr(train, "evaluate", evaluate)
    result = here("train.py", "--cond", "ref", *SHORT, "--steps", 1, "--model", model, "--out", out,
                  "--data", tmp_path / "train.jsonl", "--val", tmp_path / "val.jsonl")
    resume, told = result.stderr.splitlines()
    assert result.returncode == 2 and resume.startswith("after step 1; go on with: ")
    assert told.startswith(f"train.py: {file}: cannot be ")
    file.with_name("moved").replace(file)
    again = here("train.py", "--resume", out)
    assert again.returncode == 0 and "Avg@1 20.00, at step 1;" in again.stdout
    assert metadata(out / "best")["step"] == "1"


@pytest.mark.parametrize("cond", ["ref", "grpo"])
def test_nan_weights_are_told_by_all_commands(tmp_path, cond, here):
    """Under grpo all rewards are 0, so the loss is 0 and finite: the run ended as if nothing was wrong."""
    folder = broken(tmp_path, "nan")
    refused(here("train.py", "--cond", cond, *SHORT, "--model", folder, "--out", tmp_path / "out"), "not finite")
    assert not list((tmp_path / "out").rglob("*.safetensors"))
    few_problems(tmp_path)
    refused(here("eval.py", folder, "--test", tmp_path / "val.jsonl", "--samples", 1,
                 "--temperature", 0 if cond == "ref" else 1), "not finite")


def test_a_batch_larger_than_the_data_is_refused(tmp_path, here):
    refused(here("train.py", "--cond", "ref", "--batch", "5000", "--out", tmp_path / "run"), "--batch 5000")


def test_what_cannot_be_used_later_is_told_before_anything_is_sampled(tmp_path, here):
    """A prompt with room for the student's tokens alone, a problem the symbolic critic cannot read, …"""
    for cond, problem, other, told in (
            ("ref", "1" * 430, "2*3", "432 tokens"), ("critique", "7*8*9", "2*3", "critic reads only sums"),
            ("grpo", "How many are 3 and 4?", "2*3", "does not know all characters"),
            ("grpo", "2*3", "2*3", "in both --data and --val, such as '2*3'")):
        for split, text in (("data", problem), ("val", other)):
            row = {"problem": text, "answer": "1", "solution": "1"}
            (tmp_path / split).write_text(json.dumps(row) + "\n")
        refused(here("train.py", "--cond", cond, "--batch", 1, "--data", tmp_path / "data",
                     "--val", tmp_path / "val", "--out", tmp_path / "out"), told)
        assert not (tmp_path / "out").exists()
    refused(here("train.py", "--cond", "critique", "--critic", "self", "--out", tmp_path / "out"),
            "--critic self needs a chat model")


def test_a_diverging_run_ends_and_names_the_step(tmp_path, here):
    result = here("train.py", "--cond", "ref", "--steps", 5, "--eval-samples", 1, "--batch", 4,
                  "--lr", "1e15", "--out", tmp_path / "out")
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    step = int(re.match(r"after step (\d); go on with: .*\ntrain\.py: .*not finite", result.stderr)[1])
    assert 1 <= step <= 4
    assert [row["step"] for row in rows(tmp_path / "out") if "loss" in row] == list(range(1, step + 1))
