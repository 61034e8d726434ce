r"""Keeps the problems that are hard for a solver: at most 4 of 16 rollouts right (Avg@16 < 5/16).

    python -m sd.filter --model Qwen3-1.7B --data all.jsonl --out hard.jsonl \
        --samples 16 --max-correct 4
    python -m sd.filter --model CRITIC --data hard.jsonl --out kept.jsonl \
        --min-correct 1 --max-correct 16

Counts go to OUT.counts.jsonl as they come, one line per problem: a stopped run continues from
there, and another --max-correct needs no new rollouts. Random numbers are made per problem, so
neither order nor batch size changes a count. Data with several solutions to a problem repeats the
problem; its first copy is kept.
"""
import json
import sys
import time
from hashlib import sha256
from pathlib import Path

import torch

from sd import UserError, command
from sd.config import Config, open_solver, sampling_options
from sd.llm.checkpoint import append_rows, write_atomic
from sd.llm.sampling import uniforms
from sd.problems import EMBEDDED, Problem, read_problems, write_problems
from sd.prompts import student_prompt
from sd.rollouts import roll

SETTINGS = "model samples temperature max_new_tokens seed dtype".split()    # what counts depend on


def key(problem: Problem) -> str:
    """Identifies a problem by its text, since an edited problem may keep its id."""
    text = json.dumps([problem.problem, problem.answer])
    return sha256(text.encode()).hexdigest()[:16]


def read_counts(path: Path, settings: dict) -> dict[str, int]:
    """An earlier run's number of right rollouts by problem; begins the file if there is none.

    Its first line holds the settings. Raises UserError if they were others.
    """
    lines = [json.dumps(settings)]
    try:
        if path.exists():               # the last line is empty, or was half written when killed
            lines = path.read_text(encoding="utf-8").split("\n")[:-1]
        first, *rows = map(json.loads, lines)
        counts = {row["problem"]: int(row["correct"]) for row in rows}
    except (ValueError, KeyError, TypeError, RecursionError):
        first = None
    if first != settings:
        raise UserError(f"{path}: not the counts of an earlier run with {settings}; "
                        "remove it or choose another --out")
    write_atomic(path, "\n".join(lines) + "\n")
    return counts


def count(model, tokenizer, problems: list[Problem], samples: int, config: Config) -> list[int]:
    """How many of `samples` rollouts of each problem are right."""
    prompts = [student_prompt(tokenizer, p.problem) for p in problems]
    noise = torch.cat([uniforms(samples, config.max_new_tokens, config.seed, "filter", key(p))
                       for p in problems])                                      # (P * samples, T)
    rollouts = roll(model, tokenizer, problems, prompts, samples, config, noise)
    rewards = torch.tensor([rollout.reward for rollout in rollouts])            # (P * samples)
    return rewards.view(-1, samples).sum(1).int().tolist()


@command("sd.filter", __doc__)
def main(parser) -> None:
    parser.add_argument("--model", type=Path, default=EMBEDDED, help="folder of the solver")
    parser.add_argument("--data", type=Path, required=True, help="problems, JSONL")
    parser.add_argument("--out", type=Path, required=True, help="where the kept problems go, JSONL")
    sampling_options(parser, samples=16)
    parser.add_argument("--max-correct", type=int,
                        help="keep a problem with at most this many right rollouts "
                             "(default: a quarter of --samples)")
    parser.add_argument("--min-correct", type=int, default=0,
                        help="and at least this many; above 0, what a critic can solve")
    parser.add_argument("--enough", type=int, default=0, metavar="N",
                        help="stop when N problems are kept (default 0: try all)")
    args = parser.parse_args()
    if args.max_correct is None:
        args.max_correct = args.samples // 4
    if args.out.resolve() == args.data.resolve():
        parser.error("--out must not be --data")

    rows = read_problems(args.data)
    unique = {}
    for p in rows:
        unique.setdefault(key(p), p)
    problems = list(unique.values())
    model, tokenizer, config = open_solver(args.model, args)
    path = args.out.with_name(args.out.name + ".counts.jsonl")
    values = vars(config) | vars(args)
    counts = read_counts(path, {name: str(values[name]) for name in SETTINGS})
    print(f"{len(problems)} different problems of {len(rows)}; counts go to {path}, "
          "the same command, if stopped, goes on from there", flush=True)

    hard = []
    enough = args.enough or len(problems)
    known, start = len(counts), time.monotonic()
    per_call = max(1, config.sample_batch // args.samples)
    for at in range(0, len(problems), per_call):
        part = problems[at:at + per_call]
        new = [p for p in part if key(p) not in counts]
        if new:
            counted = count(model, tokenizer, new, args.samples, config)
            counts |= {key(p): correct for p, correct in zip(new, counted)}
            append_rows(path, [{"id": p.id, "problem": key(p), "correct": counts[key(p)]}
                               for p in new])
        hard += [p for p in part if args.min_correct <= counts[key(p)] <= args.max_correct]
        hard = hard[:enough]
        tried = at + len(part)
        total = min(len(problems), tried * enough / max(1, len(hard)))      # expected to be tried
        each = (time.monotonic() - start) / max(1, len(counts) - known)     # seconds
        print(f"{tried} of {len(problems)}  kept {len(hard)}  {each * (total - tried):.0f} s left",
              flush=True)
        if len(hard) == enough:
            break
    write_problems(args.out, hard)
    print(f"written: {args.out}, {len(hard)} of {len(problems)} problems, "
          f"with {args.min_correct} to {args.max_correct} right of {args.samples}")


if __name__ == "__main__":
    sys.exit(main())
