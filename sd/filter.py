"""Keeps the problems that are hard for a solver: at most 4 of 16 rollouts right (the paper's Avg@16 < 5/16).

    python -m sd.problems filter --model Qwen3-1.7B --data all.jsonl --out hard.jsonl --samples 16 --max-correct 4

Counts go to OUT.counts.jsonl as they come, a line a problem: a run that was stopped goes on there, and another
--max-correct needs no new rollouts. Chance is made per problem, so neither order nor batch size changes a count.
"""
import argparse
import json
import os
import time
from dataclasses import asdict
from pathlib import Path

import torch

from sd import UserError, command
from sd.answers import equal, final_answer
from sd.checkpoint import EMBEDDED, load, write_atomic
from sd.config import Config, pick_device
from sd.problems import read_problems
from sd.sampling import sample, uniforms


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m sd.problems", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    command = parser.add_subparsers(dest="command", required=True).add_parser("filter", help="keep the hard problems")
    command.add_argument("--model", type=Path, default=EMBEDDED, help="checkpoint folder of the solver")
    command.add_argument("--data", type=Path, required=True, help="problems, JSONL")
    command.add_argument("--out", type=Path, required=True, help="the hard ones, JSONL")
    command.add_argument("--samples", type=int, default=16, help="rollouts per problem (default: 16)")
    command.add_argument("--max-correct", type=int, default=4, help="of these at most so many right (default: 4)")
    command.add_argument("--temperature", type=float, default=Config.temperature, help="(default: %(default)s)")
    command.add_argument("--max-new-tokens", type=int, default=2048, help="(default: 2048)")
    command.add_argument("--sample-batch", type=int, default=64, help="rollouts sampled at once (default: 64)")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--device", default="", help="cpu or cuda (default: cuda if there is one)")
    command.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()
    if min(args.samples, args.max_new_tokens, args.sample_batch) < 1 or not 0 < args.temperature < float("inf"):
        parser.error("--samples, --max-new-tokens, --sample-batch and --temperature must be above 0")
    return args


def known_counts(path: Path, settings: dict) -> dict[str, int]:
    """What an earlier run counted, a half-written last line aside. Raises UserError if it counted something else."""
    if not path.exists():
        return {}
    lines = path.read_text(encoding="utf-8").split("\n")
    try:
        first, rows = json.loads(lines[0]), [json.loads(line) for line in lines[1:-1]]
        counts = {row["id"]: row["correct"] for row in rows}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: not the counts of an earlier run; remove it or choose another --out") from None
    if first != settings:
        differ = [key for key in settings if not isinstance(first, dict) or first.get(key) != settings[key]]
        raise UserError(f"{path}: counted with another {', '.join(differ)}; remove it or choose another --out")
    with open(path, "rb+") as file:                         # a line that was being written when the run was killed
        file.truncate(len("\n".join(lines[:-1] + [""]).encode()))
    return counts


@command("sd.problems")
def main() -> None:
    args = parse_args()
    problems = read_problems(args.data)
    model, tokenizer, shape = load(args.model, getattr(torch, args.dtype), pick_device(args.device))
    settings = {name: str(getattr(args, name)) for name in ("model", "data", "samples", "temperature", "max_new_tokens", "seed")}
    path, start = args.out.with_name(args.out.name + ".counts.jsonl"), time.time()
    counts = known_counts(path, settings)
    if not counts:
        write_atomic(path, json.dumps(settings) + "\n")
    todo = [p for p in problems if p.id not in counts]
    per_call = max(1, args.sample_batch // args.samples)
    for at in range(0, len(todo), per_call):
        part = todo[at:at + per_call]
        prompts = [tokenizer.student_prompt(p.problem) for p in part]
        for p, prompt in zip(part, prompts):
            if len(prompt) + args.max_new_tokens > shape.max_position_embeddings:
                raise UserError(f"problem {p.id!r}: its prompt and --max-new-tokens do not fit the model's "
                                f"{shape.max_position_embeddings} tokens; remove it or lower that")
        noise = [uniforms(args.samples, args.max_new_tokens, args.seed, "filter", p.id) for p in part]
        out = sample(model, prompts, tokenizer.eos, args.max_new_tokens, args.temperature, args.samples, torch.cat(noise))
        texts, cut = map(tokenizer.decode, out.completions()), out.truncated.tolist()
        right = [equal(final_answer(text, c), part[i // args.samples].answer) for i, (text, c) in enumerate(zip(texts, cut))]
        with open(path, "a", encoding="utf-8") as file:
            for i, p in enumerate(part):
                counts[p.id] = sum(right[i * args.samples:(i + 1) * args.samples])
                file.write(json.dumps({"id": p.id, "correct": counts[p.id]}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        done, seconds = at + len(part), time.time() - start
        print(f"{len(counts)} of {len(problems)}  hard {sum(c <= args.max_correct for c in counts.values())}  "
              f"{seconds:.0f} s, {seconds / done * (len(todo) - done):.0f} s left", flush=True)
    hard = [p for p in problems if counts[p.id] <= args.max_correct]
    write_atomic(args.out, "".join(json.dumps(asdict(p)) + "\n" for p in hard))
    print(f"{args.out}: {len(hard)} of {len(problems)} problems, at most {args.max_correct} of {args.samples} right")
