"""Makes the embedded solver and its problems: `python -m sd.pretrain` (20 minutes on 2 cores).

The corpus is in task/corpus.py. Half of each batch has no context, a quarter has a reference
solution, a quarter a critique.
"""
import math
import sys
from dataclasses import replace
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor

from sd import command
from sd.config import Config
from sd.llm.checkpoint import load, read_config, save_model, write_json
from sd.llm.model import Transformer
from sd.llm.sampling import pad
from sd.llm.tokenizer import Tokenizer
from sd.metrics import evaluate
from sd.problems import Problem, read_problems, write_problems
from sd.task import times_table as tt
from sd.task.corpus import build_tokenizer, example, random_pairs

SPLITS = {"train": 282, "val": 100, "test": 200}
BATCHES = ([None] * 48, ["ref"] * 24 + ["critique"] * 24)     # contexts of a step's examples
LR = 2e-3
CONFIG = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "num_hidden_layers": 4,
          "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "rms_norm_eps": 1e-6,
          "rope_theta": 10000.0, "max_position_embeddings": 512, "tie_word_embeddings": False,
          "attention_bias": False, "hidden_act": "silu"}


def collate(examples: list) -> tuple[Tensor, Tensor]:
    """Right-padded ids (B, T), and labels (B, T): the next token if it is a target, else -100."""
    ids = pad([prompt + completion for prompt, completion, _ in examples], "cpu")
    labels = torch.full_like(ids, -100)
    for row, (prompt, completion, target) in enumerate(examples):
        wanted = torch.where(torch.tensor(target), torch.tensor(completion), -100)
        labels[row, len(prompt) - 1:len(prompt) + len(completion) - 1] = wanted
    return ids, labels


def train_solver(folder: Path, seed: int, steps: int, width: int) -> None:
    torch.manual_seed(seed)
    rng = Random(seed)
    tokenizer = build_tokenizer(folder / "tokenizer.json")
    config = CONFIG | {"hidden_size": width, "intermediate_size": 2 * width,
                       "vocab_size": tokenizer.vocab_size, "eos_token_id": tokenizer.eos[0]}
    write_json(folder / "config.json", config)
    model = Transformer(read_config(folder))
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.02)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(steps):
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        scale = min(1, (step + 1) / 100) * (0.01 + 0.99 * cosine)
        optimizer.param_groups[0]["lr"] = LR * scale
        loss, count = 0, 0
        for kinds in BATCHES:           # apart, since those with a context are longer
            ids, labels = collate([example(kind, rng, tokenizer) for kind in kinds])
            logits = model(ids).flatten(0, 1)                                   # (B * T, V)
            loss += F.cross_entropy(logits, labels.flatten(), reduction="sum")
            count += (labels >= 0).sum()
        optimizer.zero_grad()
        (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 49:
            print(f"step {step + 1}/{steps}  loss {loss / count:.4f}", flush=True)
    save_model(folder, dict(model.named_parameters()), folder, step=steps)


def make_problems(folder: Path, model: Transformer, tokenizer: Tokenizer, seed: int) -> None:
    """Writes train, val and test: sums of three products, each solved less than 5 times in 16.

    No two problems, within a split or across splits, have the same three products in any order. The
    reference solution is an independent author's: always in other words; half of the time in the
    problem's own order, otherwise in a random one (a share fixed before any result was seen).
    """
    rng = Random(f"{seed} problems")
    found, seen = [], set()
    wanted = sum(SPLITS.values())
    while len(found) < wanted:
        candidates = []
        for _ in range(100):
            pairs = random_pairs(rng)
            facts = frozenset(map(tt.key, pairs))
            if facts in seen:
                continue
            seen.add(facts)
            solution = tt.reference_text(tt.author_order(pairs, rng))
            answer = str(sum(map(math.prod, pairs)))
            candidates.append(Problem("", tt.write_problem(pairs), answer, solution))
        scores = evaluate(model, tokenizer, candidates, 16, Config(seed=len(seen)))
        found += [problem for problem, avg in zip(candidates, scores.avg) if 16 * avg < 5]
        print(f"{len(found)} of {wanted} hard problems, out of {len(seen)}", flush=True)
    hard = iter(found)
    for split, count in SPLITS.items():
        chosen = [replace(next(hard), id=f"{split}-{i}") for i in range(1, count + 1)]
        write_problems(folder / f"{split}.jsonl", chosen)


@command("sd.pretrain", __doc__)
def main(parser) -> None:
    parser.add_argument("--out", type=Path, default=Path("pretrained"),
                        help="folder to write (default: pretrained)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2400, help="optimiser steps")
    parser.add_argument("--width", type=int, default=128, help="hidden size (default: 128)")
    args = parser.parse_args()
    train_solver(args.out, args.seed, args.steps, args.width)
    model, tokenizer = load(args.out)
    make_problems(args.out, model, tokenizer, args.seed)
    problems = read_problems(args.out / "val.jsonl")
    for context in (None, "ref", "critique"):
        scores = evaluate(model, tokenizer, problems, 4, Config(seed=args.seed), context)
        print(f"validation problems, {context or 'no context':10s}  Avg@4 {scores.avg.mean():.1%}  "
              f"length {scores.length:.1f}  truncated {scores.truncated:.1%}")


if __name__ == "__main__":
    sys.exit(main())
