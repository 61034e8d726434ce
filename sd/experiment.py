"""The paper's claims and further questions, over seeds: one command, one table, nothing picked.

    python -m sd.experiment main --seeds 5  grpo, ref, critique
    python -m sd.experiment alignment       ref, with references near to and far from the solver's
    python -m sd.experiment quoting         critiques that quote partially, fully, not at all
    also: divergence, teacher, critic-noise, and scale, for a smaller solver that this makes first:
    python -m sd.pretrain --width 64 --out solver-64

Further options go to train.py: --steps 20 for a quick look.

Every run calls `train.py` and then `eval.py` as a user would, so nothing here can differ from what
they do. Runs are in OUT/runs, each in a folder named by a digest of its options, so experiments
share the runs that they have in common; start one experiment at a time per OUT. A run that is
finished is skipped, and one that was killed is resumed. Tables come from stored results alone:
OUT/NAME/table.md and results.json are the same to the digit when made again. Checkpoints are chosen
on validation problems and measured on test problems. Intervals are over seeds and problems.
"""
import argparse
import json
import math
import os
import random
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch

from sd import UserError, command, losses
from sd.advantage import sample_rollouts
from sd.conditions import completion_hidden, feedback
from sd.config import Config, parse_config
from sd.llm.checkpoint import load, write_atomic, write_json
from sd.problems import EMBEDDED, Problem, embedded, read_problems, write_problems
from sd.report import read_curves, write_report
from sd.run.figure import axis, document, interval, line, point, text, ticks
from sd.steps import render, token_span
from sd.task import times_table as tt
from sd.task.symbolic import SymbolicCritic

# An experiment's arms: a condition, then the options that set it apart. All are train.py's but one:
# --references writes reference solutions of one kind; here from near the solver's to far.
SMALL = " --model solver-64 --data solver-64/train.jsonl --val solver-64/val.jsonl"
ARMS = {
    "main": ["grpo", "ref", "critique"],
    "alignment": [
        "ref --references same",
        "ref --references worded",
        "ref --references half",
        "ref --references reordered",
        "ref --references decomposed",
        "critique",
        "grpo"],
    "quoting": [
        "critique --quoting partial",
        "critique --quoting full",
        "critique --quoting omit",
        "ref"],
    "divergence": [
        "ref --divergence forward",
        "critique --divergence forward",
        "ref --divergence reverse",
        "critique --divergence reverse",
        "ref --divergence jsd",
        "critique --divergence jsd",
        "ref --divergence sampled",
        "critique --divergence sampled"],
    "teacher": [
        "ref --teacher base",
        "critique --teacher base",
        "ref --teacher ema",
        "critique --teacher ema",
        "ref --teacher live",
        "critique --teacher live"],
    "critic-noise": [
        "critique --critic-noise 0.0",
        "critique --critic-noise 0.1",
        "critique --critic-noise 0.25",
        "critique --critic-noise 0.5",
        "ref"],
    "scale": ["grpo" + SMALL, "ref" + SMALL, "critique" + SMALL]}
OWN = {"--seed", "--cond", "--model", "--data", "--val", "--preset", "--resume"}
METRICS = ("avg@12", "maj@12", "pass@12")
ROOT = Path(__file__).resolve().parent.parent
# 97.5 % of Student's t for 2, 3, ... 10 seeds
T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
COLOURS = {"ref": "blue", "critique": "orange"}


def arms(experiment: str, out: Path, extra: list[str]) -> dict[str, list[str]]:
    """Name of an arm -> its options for train.py, then `extra`; makes the files that they name."""
    options = {}
    for arm in ARMS[experiment]:
        cond, *rest = arm.split()
        if "--references" in rest:
            rest = write_references(rest[1], out / "data")
        name = " ".join(arm.split()[:3]).replace("--", "")
        options[name] = ["--cond", cond, *rest, *extra]
    return options


def reference(problem: Problem, kind: str) -> str:
    """A reference solution of one kind: the facts stay, the derivation moves from the solver's."""
    pairs, rng = tt.read_problem(problem.problem), random.Random(f"{problem.id} {kind}")
    if kind == "same":
        equations = tt.derive(tt.State(list(pairs)), False, tt.SYMBOLS)
        return render(list(map(str, equations)), problem.answer)
    if kind == "half":
        pairs = tt.author_order(pairs, rng)
    elif kind != "worded":
        pairs = rng.choice([pairs[i:] + pairs[:i] for i in range(1, len(pairs))] + [pairs[::-1]])
    if kind != "decomposed":
        return tt.reference_text(pairs)
    parts = []
    for a, b in pairs:
        half, rest = b // 2, b - b // 2
        parts.append(f"{a} multiplied by {half} makes {a * half}, "
                     f"then {a} multiplied by {rest} makes {a * rest}, "
                     f"then {a * half} plus {a * rest} gives {a * b}")
    return "first " + ", then ".join(parts) + f", so {problem.answer} is correct"


def write_references(kind: str, folder: Path) -> list[str]:
    """Writes the embedded problems with such references; returns the options that name them."""
    for split in ("train", "val"):
        problems = [replace(p, solution=reference(p, kind)) for p in embedded(split)]
        write_problems(folder / f"{kind}-{split}.jsonl", problems)
    return [f"--data={folder}/{kind}-train.jsonl", f"--val={folder}/{kind}-val.jsonl"]


def run_command(*command: str) -> None:
    """Runs one of this project's commands. Raises UserError with its last line of stderr."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, text=True,
                            capture_output=True)
    if result.returncode:
        raise UserError(f"{' '.join(command)}: {' '.join(result.stderr.splitlines()[-1:])}")


def config_of(options: list[str]) -> Config:
    """What train.py makes of `options`; ends like train.py if it refuses them."""
    config, _ = parse_config(argparse.ArgumentParser("train.py", allow_abbrev=False), options)
    return config


def place(runs: Path, config: Config) -> Path:
    """A run's folder. No two share a name: it has a digest of all options, defaults too."""
    digest = sha256(json.dumps(asdict(config)).encode()).hexdigest()[:8]
    return runs / f"{config.cond}-seed{config.seed}-{digest}"


def run(runs: Path, options: list[str]) -> Path:
    """Trains and measures one arm and seed, unless that is done. Returns the run's folder."""
    config = config_of(options)
    folder = place(runs, config)
    if (folder / "test.json").exists():
        return folder
    if any(folder.glob("state-*.safetensors")):
        run_command("train.py", f"--resume={folder}")           # does nothing if finished
    else:
        shutil.rmtree(folder, ignore_errors=True)               # killed before its first state
        run_command("train.py", *options, f"--out={folder}")
    run_command(
        "eval.py", f"{folder}/best",
        f"--test={config.model or EMBEDDED}/test.jsonl",
        f"--temperature={config.temperature}",                  # measured as it was trained
        f"--max-new-tokens={config.max_new_tokens}",
        f"--json={folder}/test.json")
    print(f"done: {folder}", flush=True)
    return folder


def confidence(values: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean of `values` (seeds, problems), from the variances over both.

    Student's t is used over the seeds, since a bootstrap over three covers the truth only some 80
    times in 100. The problems are many enough for the normal distribution. With one seed, the
    interval is over the problems alone.
    """
    S, P = values.shape
    half = 1.96 ** 2 * values.mean(0).var(ddof=1) / P
    if S > 1:
        half += T[min(S, len(T) + 1) - 2] ** 2 * values.mean(1).var(ddof=1) / S
    return float(values.mean() - half ** 0.5), float(values.mean() + half ** 0.5)


def summary(runs: dict[str, list[Path]]) -> dict:
    """The numbers of all arms, from what their runs, one per seed, stored."""
    arms, differences = {}, {}
    averages = {}       # arm -> Avg (seeds, problems)
    for name, folders in runs.items():
        tests = [json.loads((folder / "test.json").read_text()) for folder in folders]
        curves = read_curves(folders[0] / "metrics.jsonl")
        arms[name] = {metric: [test[metric]["mean"] for test in tests] for metric in METRICS}
        arms[name]["rollouts"] = curves["train"]["rollouts"][-1]
        average = 100 * np.array([test["values"]["avg"] for test in tests])
        for other in averages:
            difference = average - averages[other]
            differences[f"{name} - {other}"] = [difference.mean(), *confidence(difference)]
        averages[name] = average
    return {"seeds": len(folders), "arms": arms, "differences in avg@12": differences}


def spread(values: list[float]) -> float:
    """Standard deviation over seeds; 0 for one seed."""
    return np.std(values, ddof=len(values) > 1)


def table(result: dict) -> str:
    """The summary in Markdown."""
    lines = ["| | Avg@12 | Maj@12 | Pass@12 | rollouts |", "|---|---|---|---|---|"]
    for name, arm in result["arms"].items():
        cells = [f"{np.mean(arm[metric]):.1f} ± {spread(arm[metric]):.1f}" for metric in METRICS]
        lines.append(f"| {name} | {' | '.join(cells)} | {arm['rollouts']:,} |")
    over = "seeds and problems" if result["seeds"] > 1 else "problems alone"
    lines += [
        f"\n{result['seeds']} seeds, mean ± standard deviation; checkpoint chosen on validation",
        f"problems, measured on test problems; intervals over {over}.",
        "\n| difference in Avg@12 | mean | 95 % interval |",
        "|---|---|---|"]
    for name, (mean, low, high) in result["differences in avg@12"].items():
        lines.append(f"| {name} | {mean:+.1f} | {low:+.1f} to {high:+.1f} |")
    if "distance" in result:
        lines.append("\n| context | KL(teacher, student) on correct steps, nats per token |")
        lines.append("|---|---|")
        lines += [f"| {name} | {value:.4f} |" for name, value in result["distance"].items()]
    return "\n".join(lines) + "\n"


@torch.no_grad()
def distance(config: Config) -> float:
    """How far a context is from the solver: KL(teacher || student) per token of correct steps.

    This is the loss before the first step of training, on those tokens of validation rollouts.
    """
    model, tokenizer = load(EMBEDDED)
    problems = read_problems(Path(config.val or EMBEDDED / "val.jsonl"))
    rollouts = sample_rollouts(model, tokenizer, problems, 1, config, "distance")
    critic = SymbolicCritic()
    limit = model.config.max_position_embeddings - config.max_new_tokens
    feedback(config.cond, rollouts, 1, critic, tokenizer, limit)
    total = tokens = 0
    for rollout in rollouts:
        correct = rollout.trace.steps[:critic(rollout).wrong]       # all of them if it is None
        if correct:
            _, end = token_span(tokenizer.pieces(rollout.completion), 0, correct[-1].end)
            logprobs = []
            for prompt in (rollout.prompt, rollout.teacher_prompt):
                hidden = completion_hidden(model, [prompt], [rollout.completion[:end]])
                logprobs.append(losses.log_probs(model.lm_head(hidden), config.temperature))
            total += losses.forward_kl(*logprobs).sum().item()
            tokens += end
    return total / tokens


def figure(result: dict) -> str:
    """Avg@12 against each context's measured distance, an SVG."""
    x = axis(0.015, 3, 60, 520, math.log10)
    y = axis(0, 100, 300, 40)
    marks = ticks(x, (0.03, 0.1, 0.3, 1), 40, 300, vertical=True)
    marks += ticks(y, range(0, 101, 20), 60, 520)
    grpo = y(np.mean(result["arms"]["grpo"]["avg@12"]))     # it has no context, so no distance
    marks += [line([(60, grpo), (520, grpo)], "grey dashed"), text(526, grpo, "grpo", "grey")]
    for name, value in result["distance"].items():
        cond, *kind = name.split()
        values = result["arms"][name]["avg@12"]
        mean, half = np.mean(values), spread(values)
        at, colour = x(value), COLOURS[cond]
        marks += [
            interval((at, y(mean - half)), (at, y(mean + half)), colour),
            point(at, y(mean), colour),
            text(at + 9, y(mean) + 4, " ".join(kind[1:]) or cond)]
    title = "Avg@12 after training, mean and standard deviation over seeds"
    scale = "KL(teacher, student) on correct steps before training, nats per token"
    marks += [text(16, 22, title, "bold"), text(290, 340, scale, "middle")]
    return document(title + f", against the {scale}", 600, 356, marks)


@command("sd.experiment", __doc__)
def main(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", choices=tuple(ARMS))
    parser.add_argument("--seeds", type=int, default=3, help="runs per arm (default: 3)")
    parser.add_argument("--out", type=Path, default=Path("experiments"),
                        help="folder of runs and tables (default: experiments)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(),
                        help="runs at a time, one thread each (default: one per core)")
    args, extra = parser.parse_known_args()     # the rest goes to train.py
    for word in extra:
        if word.split("=")[0] in {*OWN, *" ".join(ARMS[args.name]).split()}:
            parser.error(f"{word} is the experiment's own; leave it out (--seeds says how many)")
    out = (args.out / args.name).resolve()
    runs = out.parent / "runs"
    options = arms(args.name, out, extra)
    jobs = [[*arm, f"--seed={seed}"] for seed in range(args.seeds) for arm in options.values()]
    for job in jobs:
        config_of(job)                          # a wrong option is reported once, and now
    print(f"{args.name}: {len(jobs)} runs, {args.jobs} at a time, to {runs}; "
          "the same command, if stopped, goes on", flush=True)
    with ThreadPoolExecutor(args.jobs) as pool:         # after a failure, nothing new begins
        folders = list(pool.map(lambda job: run(runs, job), jobs))
    result = summary({name: folders[i::len(options)] for i, name in enumerate(options)})
    if args.name == "alignment":
        del options["grpo"]                     # it has no context
        result["distance"] = {name: distance(config_of(arm)) for name, arm in options.items()}
        write_atomic(out / "figure.svg", figure(result))
    write_json(out / "results.json", result)
    write_atomic(out / "table.md", table(result))
    write_report(folders, out / "report.html")
    print(f"{table(result)}\nwritten: {out}/table.md, results.json, report.html")


if __name__ == "__main__":
    sys.exit(main())
