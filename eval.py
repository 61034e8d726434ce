"""Measures a checkpoint on test problems: Avg@k, Maj@k, Pass@k with 95 % bootstrap intervals over problems.

    python eval.py                      the embedded solver before training
    python eval.py runs/ref-seed0/best  after
    python eval.py runs/ref-seed*/best  several seeds: each, then mean and standard deviation over them
    python eval.py --context critique   the self-teacher: the same solver, shown a critique of its own rollout
    python eval.py Qwen3-1.7B --test test.jsonl
"""
import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

from sd import UserError, command
from sd.llm.checkpoint import load, read_config, write_atomic
from sd.config import check_sampling, pick_device, sampling_options, sizes
from sd.metrics import evaluate
from sd.problems import EMBEDDED, embedded, read_problems


def parse_args(parser: argparse.ArgumentParser) -> argparse.Namespace:
    parser.add_argument("folders", nargs="*", type=Path, default=[EMBEDDED], metavar="FOLDER",
                        help="checkpoints (default: the embedded solver)")
    parser.add_argument("--test", type=Path, metavar="FILE",
                        help="problems, JSONL (default: the embedded ones)")
    parser.add_argument("--split", choices=("train", "val", "test"), default="test",
                        help="which of the embedded problems")
    parser.add_argument("--context", choices=("ref", "critique"), help="measure the self-teacher with this "
                        "context, a reference solution or a symbolic critique")
    sampling_options(parser, samples=12)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to FILE")
    args = parser.parse_args()
    check_sampling(parser, args)
    if args.json and args.json.is_dir():
        parser.error(f"--json {args.json} is a folder; name a file")
    if args.test and args.split != "test":
        parser.error("--split names embedded problems, so it does not go with --test")
    return args


def measure(folder: Path, args: argparse.Namespace) -> dict:
    """Evaluates one checkpoint and prints what it found."""
    start = time.time()
    model, tokenizer = load(folder, getattr(torch, args.dtype), pick_device(args.device))
    problems = read_problems(args.test) if args.test else embedded(args.split)
    if args.context == "ref" and (without := sum(not p.solution for p in problems)):
        raise UserError(f"--context ref: {without} of {len(problems)} problems have no solution to show")
    tokens, rows = sizes(args, tokenizer)
    result = evaluate(model, tokenizer, problems, args.samples, args.temperature, tokens, args.seed,
                      args.context, rows=rows, compile=args.compile).summary()
    data = str(args.test or args.split)
    result = {"folder": str(folder), "split": data, "context": args.context, "seed": args.seed,
              "temperature": args.temperature, **result, "seconds": round(time.time() - start, 1)}
    who = f"self-teacher with {args.context}" if args.context else "student"
    print(f"{folder} ({who}): {result['problems']} {data} problems, {args.samples} samples each, "
          f"{result['seconds']} s")
    for name in metric_names(args.samples):
        m = result[name]
        print(f"  {name.capitalize():8s} {m['mean']:6.2f}   "
              f"95 % interval {m['low']:6.2f} to {m['high']:6.2f}")
    print(f"  mean length {result['mean_length']:.1f} tokens, truncated {result['truncated']:.1f} %",
          flush=True)
    return result


def metric_names(samples: int) -> list[str]:
    return [f"{name}@{samples}" for name in ("avg", "maj", "pass")]


@command("eval.py", __doc__)
def main(parser) -> None:
    args = parse_args(parser)
    for folder in args.folders:
        read_config(folder)                     # a wrong one is told before the others are measured
    results = [measure(folder, args) for folder in args.folders]
    if len(results) > 1:
        print(f"mean ± standard deviation over {len(results)} checkpoints")
        for name in metric_names(args.samples):
            means = [r[name]["mean"] for r in results]
            print(f"  {name.capitalize():8s} {statistics.mean(means):6.2f} ± {statistics.stdev(means):.2f}")
    if args.json:
        write_atomic(args.json, json.dumps(results if len(results) > 1 else results[0], indent=1) + "\n")
        print(f"written: {args.json}")


if __name__ == "__main__":
    sys.exit(main())
