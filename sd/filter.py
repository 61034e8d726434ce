r"""Keeps the problems that are hard for a solver: at most 4 of 16 rollouts right (the paper's Avg@16 < 5/16).

    python -m sd.filter --model Qwen3-1.7B --data all.jsonl --out hard.jsonl \
        --samples 16 --max-correct 4
    python -m sd.filter --model CRITIC --data hard.jsonl --out kept.jsonl \
        --min-correct 1 --max-correct 16

Counts go to OUT.counts.jsonl as they come, one line per problem: a stopped run continues from there, and
another --max-correct needs no new rollouts. Random numbers are made per problem, so neither order nor batch
size changes a count.
"""
import argparse
import json
import os
import sys
import time
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

import torch

from sd import UserError, command
from sd.answers import equal, final_answer
from sd.llm.checkpoint import load, write_atomic
from sd.config import check_sampling, pick_device, sampling_options, sizes
from sd.problems import EMBEDDED, Problem, check_lengths, read_problems
from sd.llm.sampling import sample, uniforms


def parse_args(parser: argparse.ArgumentParser) -> argparse.Namespace:
    parser.add_argument("--model", type=Path, default=EMBEDDED, help="checkpoint folder of the solver")
    parser.add_argument("--data", type=Path, required=True, help="problems, JSONL")
    parser.add_argument("--out", type=Path, required=True, help="where the kept problems go, JSONL")
    sampling_options(parser, samples=16)
    parser.add_argument("--max-correct", type=int, help="keep a problem with at most this many right "
                        "rollouts (default: a quarter of --samples)")
    parser.add_argument("--min-correct", type=int, default=0,
                        help="and at least this many; above 0, what a critic can solve (default: 0)")
    parser.add_argument("--enough", type=int, default=0, metavar="N",
                        help="stop when N problems are kept (default 0: try all)")
    args = parser.parse_args()
    check_sampling(parser, args)
    args.max_correct = args.samples // 4 if args.max_correct is None else args.max_correct
    if not 0 <= args.min_correct <= args.max_correct:
        parser.error("--min-correct must be 0 or more and at most --max-correct")
    if args.out.resolve() == args.data.resolve():
        parser.error("--out must not be --data")
    return args


def known_counts(path: Path, settings: dict) -> dict[str, int]:
    """`key` of a problem -> its count in an earlier run, without a half-written last line. Raises
    UserError if that run had other settings."""
    if not path.exists():
        return {}
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        first, rows = json.loads(lines[0]), [json.loads(line) for line in lines[1:-1]]
        counts = {str(row["problem"]): int(row["correct"]) for row in rows}
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path}: not the counts of an earlier run; "
                        "remove it or choose another --out") from None
    if first != settings:
        differ = [key for key in settings if not isinstance(first, dict) or first.get(key) != settings[key]]
        raise UserError(f"{path}: was counted with a different {', '.join(differ)}; "
                        "remove it or choose another --out")
    os.truncate(path, len("\n".join(lines[:-1] + [""]).encode()))   # drop a line half written when killed
    return counts


def key(p: Problem) -> str:
    """Identifies a problem by its text, as an edited problem may keep its id."""
    return sha256(json.dumps([p.problem, p.answer]).encode()).hexdigest()[:16]


@command("sd.filter", __doc__)
def main(parser) -> None:
    args = parse_args(parser)
    rows = read_problems(args.data)
    problems = list({key(p): p for p in reversed(rows)}.values())[::-1]         # the first of its copies
    if len(problems) < len(rows):
        print(f"{len(rows) - len(problems)} of {len(rows)} are copies of others and left out", flush=True)
    model, tokenizer = load(args.model, getattr(torch, args.dtype), pick_device(args.device))
    args.max_new_tokens, args.sample_batch = sizes(args, tokenizer)
    counted = ("model", "data", "samples", "temperature", "max_new_tokens", "seed", "dtype")
    check_lengths(problems, [tokenizer.student_prompt(p.problem) for p in problems],
                  model.config.max_position_embeddings - args.max_new_tokens)
    settings = {name: str(getattr(args, name)) for name in counted}
    path, start = args.out.with_name(args.out.name + ".counts.jsonl"), time.time()
    counts = known_counts(path, settings)
    if not counts:
        write_atomic(path, json.dumps(settings) + "\n")
    print(f"counts go to {path}; the same command, if stopped, goes on from there", flush=True)
    todo, per_call = [p for p in problems if key(p) not in counts], max(1, args.sample_batch // args.samples)
    kept = lambda: [p for p in problems if args.min_correct <= counts.get(key(p), -1) <= args.max_correct]
    for at in range(0, len(todo), per_call):
        if args.enough and len(kept()) >= args.enough:
            break
        part = todo[at:at + per_call]
        prompts = [tokenizer.student_prompt(p.problem) for p in part]
        noise = [uniforms(args.samples, args.max_new_tokens, args.seed, "filter", p.id) for p in part]
        out = sample(model, prompts, tokenizer.eos, args.max_new_tokens, args.temperature, args.samples,
                     torch.cat(noise), args.compile)
        texts, cut = map(tokenizer.decode, out.completions()), out.truncated.tolist()
        answers = [final_answer(text, c) for text, c in zip(texts, cut)]
        with open(path, "a", encoding="utf-8") as file:
            for i, p in enumerate(part):
                counts[key(p)] = sum(equal(a, p.answer)
                                     for a in answers[i * args.samples:(i + 1) * args.samples])
                file.write(json.dumps({"id": p.id, "problem": key(p), "correct": counts[key(p)]}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        done, seconds = at + len(part), time.time() - start
        print(f"{len(problems) - len(todo) + done} of {len(problems)}  kept {len(kept())}"
              f"  {seconds:.0f} s, {seconds / done * (len(todo) - done):.0f} s left", flush=True)
    hard = kept()[:args.enough or None]
    write_atomic(args.out, "".join(json.dumps(asdict(p)) + "\n" for p in hard))
    print(f"written: {args.out}, {len(hard)} of {len(problems)} problems, "
          f"with {args.min_correct} to {args.max_correct} right of {args.samples}")


if __name__ == "__main__":
    sys.exit(main())
