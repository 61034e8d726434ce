"""The paper's claims and further questions, over seeds: one command, one table, nothing picked.

    python -m sd.experiment main --seeds 5  grpo, ref, critique
    python -m sd.experiment horizon         the same for problems of 2 to 6 products
    python -m sd.experiment rate            how the learning rate and the default length were chosen
    python -m sd.experiment quoting         critiques that quote partially, fully, not at all
    python -m sd.experiment contexts        control contexts, which should teach nothing
    python -m sd.experiment credit          the loss on the wrong step alone, or on other parts
    python -m sd.experiment long --seeds 2  ten times as many steps
    python -m sd.experiment handoff         half of the steps with a context, then grpo
    python -m sd.experiment gap             does what is known before training predict the gain?
    also: alignment, divergence, teacher, critic-noise; all: one after another

Every finished run is a line of a ledger: sd/ledger.jsonl holds those behind RESULTS.md, so a table
is printed at once; OUT/ledger.jsonl those that you add, by more --seeds or other options, which go
to train.py (--steps 20 for a quick look). --fresh measures anew. A line is known by its
options, defaults too, and by the solver's weights, so experiments share the runs that they have in
common. Every run calls `train.py` and then `eval.py` as a user would, in a folder of OUT/runs; one
that was killed is resumed. Start one experiment at a time per OUT.

Tables come from the ledger: OUT/NAME/table.md is the same to the digit when made again. `contexts`
and `gap` also measure each context before training, which takes some 20 seconds each.
Checkpoints are chosen on validation problems and measured on test problems. Intervals are over
seeds.
"""
import argparse
import math
import os
import sys
from pathlib import Path

import numpy as np

from sd import command, controls
from sd.llm.checkpoint import write_atomic
from sd.problems import read_problems
from sd.report import read_rows
from sd.study import gap, horizon
from sd.study.horizon import mean_and_spread
from sd.study.ledger import LEDGER, METRICS, Arms, Job, make_job, measure, problems_of

# An experiment's arms: a condition, then the options that set it apart. All are train.py's but
# three: --products takes problems of another length, --references writes reference solutions of one
# kind, here from near the solver's to far, and --after goes on from 30 steps of a condition.
ARMS = {
    "main": ["critique", "ref", "grpo"],
    "horizon": [f"{arm} --products {n}" for n in horizon.LENGTHS for arm in (
        "critique", "ref", "grpo", f"grpo --lr {horizon.OWN_RATE}",
        "critique --divergence reverse", "ref --divergence reverse")],
    "rate": [f"{arm} --products {n}" for n in horizon.LENGTHS for arm in (
        f"critique --lr {horizon.EQUAL_RATE}", f"ref --lr {horizon.EQUAL_RATE}",
        *(f"grpo --lr {rate}" for rate in horizon.RATES))],
    "quoting": [
        "critique --quoting partial",
        "critique --quoting full",
        "critique --quoting omit",
        "ref"],
    "alignment": [
        "critique",
        "grpo",
        "ref --references same",
        "ref --references worded",
        "ref --references half",
        "ref --references reordered",
        "ref --references decomposed"],
    "divergence": [f"{cond} --divergence {kind}"
                   for kind in ("forward", "reverse", "jsd", "sampled")
                   for cond in ("critique", "ref")],
    "teacher": [f"{cond} --teacher {kind}" for kind in ("base", "ema", "live")
                for cond in ("critique", "ref")],
    "critic-noise": [
        "critique --critic-noise 0.0",
        "critique --critic-noise 0.1",
        "critique --critic-noise 0.25",
        "critique --critic-noise 0.5",
        "ref"],
    "contexts": [
        "critique",
        *(f"critique --control {kind}" for kind in ("other", "echo", "needless", "plan")),
        "ref",
        *(f"ref --control {kind}" for kind in ("other", "answer", "empty", "none"))],
    "credit": [
        "critique",
        *(f"critique --loss-on {part}" for part in controls.PARTS)],
    "long": [f"{cond} --epochs 70 --eval-every 20 --teacher {teacher} --divergence {kind}"
             for cond in ("critique", "ref") for teacher in ("base", "ema", "live")
             for kind in ("forward", "reverse")],
    "handoff": [            # beside each alone: as many steps, and as many rollouts
        *(f"grpo --after {cond} --steps 31" for cond in ("critique", "ref")),
        "critique", "ref", "grpo",
        "critique --epochs 32 --steps 278", "ref --epochs 32 --steps 278", "grpo --steps 35"]}
# All contexts, each once, with its own predictors and gain.
ARMS["gap"] = [arm for arm in dict.fromkeys(
    arm for name in ("contexts", "quoting", "alignment", "critic-noise", "horizon")
    for arm in ARMS[name]) if not arm.startswith("grpo") and "reverse" not in arm
    and not arm.endswith((" partial", " 0.0", " 6"))]           # which say the default
OWN = {"--seed", "--cond", "--model", "--data", "--val", "--preset", "--resume", "--products",
       "--references", "--after"}
# 97.5 % of Student's t for 2, 3, ... 10 seeds
T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


def confidence(values: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean of `values`, one a seed: Student's t. Not finite for one seed."""
    S = len(values)
    if S == 1:
        return -math.inf, math.inf
    half = T[min(S, len(T) + 1) - 2] * values.std(ddof=1) / S ** 0.5
    return float(values.mean() - half), float(values.mean() + half)


def summary(arms: Arms) -> dict:
    """The numbers of all arms, from their lines in the ledger, one per seed.

    Differences are taken seed by seed: between all arms if they are few, else to the first.
    """
    result = {
        "seeds": len(next(iter(arms.values()))),
        "arms": {},
        "differences in avg@12": {},
    }
    averages = {}
    for name, lines in arms.items():
        numbers = {metric: [line["test"][metric] for line in lines] for metric in METRICS}
        result["arms"][name] = numbers | {"rollouts": lines[0]["curve"][-1]["rollouts"]}
        average = np.array(numbers["avg@12"])
        for other in averages if len(arms) <= 4 else list(averages)[:1]:
            difference = average - averages[other]
            result["differences in avg@12"][f"{name} - {other}"] = [
                difference.mean(), *confidence(difference)]
        averages[name] = average
    return result


def table(result: dict) -> str:
    """The summary in Markdown."""
    lines = ["| | Avg@12 | Maj@12 | Pass@12 | rollouts |", "|---|---|---|---|---|"]
    for name, arm in result["arms"].items():
        cells = [mean_and_spread(arm[metric]) for metric in METRICS]
        lines.append(f"| {name} | {' | '.join(cells)} | {arm['rollouts']:,} |")
    lines += [
        f"\n{result['seeds']} seeds, mean ± standard deviation; checkpoint chosen on validation",
        "problems, measured on test problems; intervals over seeds (Student's t).",
        "\n| difference in Avg@12 | mean | 95 % interval |",
        "|---|---|---|"]
    for name, (mean, low, high) in result["differences in avg@12"].items():
        lines.append(f"| {name} | {mean:+.1f} | {low:+.1f} to {high:+.1f} |")
    return "\n".join(lines) + "\n"


@command("sd.experiment", __doc__)
def main(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", choices=(*ARMS, "all"))
    parser.add_argument("--seeds", type=int, default=3, help="runs per arm (default: 3)")
    parser.add_argument("--out", type=Path, default=Path("experiments"),
                        help="folder of runs and tables (default: experiments)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1,
                        help="runs at a time, one thread each (default: one per core)")
    parser.add_argument("--fresh", action="store_true",
                        help="measure anew what sd/ledger.jsonl has already")
    args, extra = parser.parse_known_args()     # the rest goes to train.py
    if min(args.seeds, args.jobs) < 1:
        parser.error("--seeds and --jobs must be 1 or more")
    names = list(ARMS) if args.name == "all" else [args.name]
    arms = " ".join(arm for name in names for arm in ARMS[name])
    for word in extra:
        flag = word.split("=")[0]
        if flag in OWN or flag.startswith("--") and flag in arms.split():
            parser.error(f"{word} is the experiment's own; leave it out (--seeds says how many)")
    out = args.out.resolve()
    for name in names:
        jobs = {arm: [make_job(arm, seed, extra) for seed in range(args.seeds)]
                for arm in ARMS[name]}
        ledger = [] if args.fresh else list(read_rows(LEDGER))
        ledger += read_rows(out / "ledger.jsonl")
        measure(jobs, ledger, out, args.jobs)
        found = {arm: [job.find(ledger) for job in row] for arm, row in jobs.items()}
        publish(name, jobs, found, out)


def publish(name: str, jobs: dict[str, list[Job]], arms: Arms, out: Path) -> None:
    """Writes and prints an experiment's table, and its figures."""
    if name == "rate":
        content = horizon.rate_table(arms)
    elif name == "horizon":
        content = horizon.horizon_table(arms)
        write_atomic(out / name / "figure.svg", horizon.figure(arms))
        write_atomic(out / name / "curves.svg", horizon.curves(arms))
    elif name in ("contexts", "gap"):
        known = {}
        print(f"{name}: measures {len(jobs)} contexts first", flush=True)
        for arm, (job, *_) in jobs.items():
            known[arm] = gap.before(job.config, read_problems(problems_of(job, out) / "val.jsonl"))
        content = gap.gap_table(known, arms)
        if name == "contexts":
            content = table(summary(arms)) + "\n" + content
        write_atomic(out / name / "figure.svg", gap.figure(known, arms))
    else:
        content = table(summary(arms))
        if name == "long":
            content += "\n" + horizon.decline(arms)
            write_atomic(out / name / "figure.svg", horizon.long_curves(arms))
    write_atomic(out / name / "table.md", content)
    print(f"{name}\n{content}\nwritten: {out}/{name}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
