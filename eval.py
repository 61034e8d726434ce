"""Measures checkpoints on test problems: Avg@k, Maj@k, Pass@k with 95 % intervals over problems.

    python eval.py                      the embedded solver before training
    python eval.py runs/ref-seed0/best  after
    python eval.py runs/ref-seed*/best  several seeds: each, then mean and standard deviation
    python eval.py --context critique   the self-teacher, shown a critique of a rollout of its own
    python eval.py Qwen3-1.7B --test test.jsonl
"""
import argparse
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

from sd import UserError, command
from sd.config import open_solver, read_run_config, sampling_options
from sd.llm.checkpoint import read_config, write_json
from sd.metrics import evaluate
from sd.problems import EMBEDDED, check_solutions, read_problems

METRICS = ("avg", "maj", "pass")


def measure(folder: Path, args: argparse.Namespace) -> dict:
    """Evaluates one checkpoint and prints what it found."""
    start = time.monotonic()
    model, tokenizer, config = open_solver(folder, args)
    problems = read_problems(args.test)
    if args.context == "ref":
        check_solutions(problems, "--context ref")
    scores = evaluate(model, tokenizer, problems, args.samples, config, context=args.context)
    result = {"folder": str(folder), "test": str(args.test), "context": args.context,
              "seed": config.seed, "temperature": config.temperature, **scores.summary(),
              "seconds": round(time.monotonic() - start, 1)}
    who = f"self-teacher with {args.context}" if args.context else "student"
    print(f"{folder} ({who}): {len(problems)} {args.test.stem} problems, {args.samples} samples "
          f"each, {result['seconds']} s")
    for name in METRICS:
        key = f"{name}@{args.samples}"
        m = result[key]
        print(f"  {key.capitalize():8s} {m['mean']:6.2f}   "
              f"95 % interval {m['low']:6.2f} to {m['high']:6.2f}")
    print(f"  mean length {result['mean_length']:.1f} tokens, "
          f"truncated {result['truncated']:.1f} %", flush=True)
    return result


def of_one_setting(folders: list[Path]) -> bool:
    """Whether several checkpoints are the same one of runs that differ in their seeds alone."""
    try:
        runs = [read_run_config(folder.resolve().parent / "config.json") for folder in folders]
    except UserError:
        return False
    settings = {(replace(run, seed=0, out=""), folder.resolve().name)
                for run, folder in zip(runs, folders)}
    return 1 < len({run.seed for run in runs}) == len(runs) and len(settings) == 1


@command("eval.py", __doc__)
def main(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="*", type=Path, default=[EMBEDDED], metavar="FOLDER",
                        help="checkpoints (default: the embedded solver)")
    parser.add_argument("--test", type=Path, default=EMBEDDED / "test.jsonl",
                        help="problems, JSONL (default: the embedded test problems)")
    parser.add_argument("--context", choices=("ref", "critique"), help="measure the self-teacher "
                        "with this context, a reference solution or a symbolic critique")
    sampling_options(parser, samples=12)
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    args = parser.parse_args()
    for folder in args.folders:
        read_config(folder)                     # a wrong one is told before the others are measured
    results = [measure(folder, args) for folder in args.folders]
    if of_one_setting(args.folders):
        print(f"mean ± standard deviation over {len(results)} checkpoints")
        for name in METRICS:
            key = f"{name}@{args.samples}"
            means = [r[key]["mean"] for r in results]
            mean, spread = statistics.mean(means), statistics.stdev(means)
            print(f"  {key.capitalize():8s} {mean:6.2f} ± {spread:.2f}")
    if args.json:
        write_json(args.json, results if len(results) > 1 else results[0])
        print(f"written: {args.json}")


if __name__ == "__main__":
    sys.exit(main())
