"""Makes the embedded solver and its problems: `python -m sd.pretrain` (40 minutes on 2 cores).

The corpus is in task/corpus.py: problems of 2 to 6 products in equal shares, 36 of 96 examples of a
step without a context, 34 with a reference solution, 26 with a critique. Matrices within the blocks
are trained by Muon, all other weights by AdamW. (After 150 steps on an earlier form of this corpus
the loss was 0.88; with AdamW alone it was 1.35.)
"""
import math
import os
import sys
from concurrent.futures import ThreadPoolExecutor
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

SPLITS = {"val": 100, "train": 282, "test": 200}
CANDIDATES = 100                                            # problems tried at once
KINDS = [None] * 36 + ["ref"] * 34 + ["critique"] * 26      # contexts of a step's examples
PARTS = 4                                                   # of a step, by length
LR = {"Muon": 0.02, "AdamW": 2e-3}
CONFIG = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 128,
          "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
          "num_key_value_heads": 2, "head_dim": 32, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
          "max_position_embeddings": 512, "tie_word_embeddings": False, "attention_bias": False,
          "hidden_act": "silu"}


def collate(examples: list) -> tuple[Tensor, Tensor]:
    """Right-padded ids (B, T), and labels (B, T): the next token if it is a target, else -100."""
    ids = pad([prompt + completion for prompt, completion, _ in examples], "cpu")
    labels = torch.full_like(ids, -100)
    for row, (prompt, completion, target) in enumerate(examples):
        wanted = torch.where(torch.tensor(target), torch.tensor(completion), -100)
        labels[row, len(prompt) - 1:len(prompt) + len(completion) - 1] = wanted
    return ids, labels


def train_solver(folder: Path, seed: int, steps: int) -> None:
    torch.manual_seed(seed)
    rng = Random(seed)
    tokenizer = build_tokenizer(folder / "tokenizer.json")
    config = CONFIG | {"vocab_size": tokenizer.vocab_size, "eos_token_id": tokenizer.eos[0]}
    write_json(folder / "config.json", config)
    model = Transformer(read_config(folder))
    parameters = list(model.parameters())
    for p in parameters:
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.02)
    matrices = [p for p in model.model.layers.parameters() if p.dim() > 1]
    others = [p for p in parameters if all(p is not matrix for matrix in matrices)]
    optimizers = [torch.optim.Muon(matrices, weight_decay=0.01),
                  torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.01)]

    def gradient(examples: list) -> tuple[Tensor, ...]:
        """Of the summed loss, after the loss itself."""
        ids, labels = collate(examples)
        logits = model(ids).flatten(0, 1)                                       # (B * T, V)
        loss = F.cross_entropy(logits, labels.flatten(), reduction="sum")
        return loss.detach(), *torch.autograd.grad(loss, parameters)

    # one thread for each core scales better than operators that use several
    with ThreadPoolExecutor(os.cpu_count(), initializer=torch.set_num_threads,
                            initargs=(1,)) as pool:
        for step in range(steps):
            cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
            scale = min(1, (step + 1) / 100) * (0.01 + 0.99 * cosine)
            batch = [example(kind, rng.randint(*tt.LENGTHS), rng, tokenizer) for kind in KINDS]
            batch.sort(key=lambda e: -len(e[0]) - len(e[1]))        # the longest part begins
            size = len(batch) // PARTS
            parts = [batch[i * size:(i + 1) * size] for i in range(PARTS)]
            count = sum(sum(target) for _, _, target in batch)
            loss, *gradients = map(sum, zip(*pool.map(gradient, parts)))
            for p, total in zip(parameters, gradients):
                p.grad = total / count
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = scale * LR[type(optimizer).__name__]
                optimizer.step()
            if step % 50 == 49:
                print(f"step {step + 1}/{steps}  loss {loss / count:.4f}", flush=True)
    save_model(folder, dict(model.named_parameters()), folder, step=steps)


def make_problems(folder: Path, model: Transformer, tokenizer: Tokenizer, products: int,
                  splits: tuple[str, ...] = tuple(SPLITS)) -> None:
    """Writes a file per split: problems of so many products, each solved less than 5 times in 16.

    No two problems, within a split or across splits, have the same products in any order. The
    reference solution is an independent author's: always in other words; half of the time in the
    problem's own order, otherwise in a random one (a share fixed before any result was seen).
    """
    rng = Random(f"problems of {products}")
    found, seen = [], set()
    wanted = sum(SPLITS[split] for split in splits)
    while len(found) < wanted:
        candidates = []
        for _ in range(CANDIDATES):
            pairs = random_pairs(rng, products)
            facts = frozenset(map(tt.key, pairs))
            if facts in seen:
                continue
            seen.add(facts)
            solution = tt.reference_text(tt.author_order(pairs, rng))
            answer = str(sum(map(math.prod, pairs)))
            candidates.append(Problem("", tt.write_problem(pairs), answer, solution))
        scores = evaluate(model, tokenizer, candidates, 16, Config(seed=len(seen)))
        found += [problem for problem, avg in zip(candidates, scores.avg) if 16 * avg < 5]
    print(f"{products} products: {len(found)} of {len(seen)} problems are hard", flush=True)
    hard = iter(found)
    for split in splits:
        chosen = [replace(next(hard), id=f"{split}-{i}") for i in range(1, SPLITS[split] + 1)]
        write_problems(folder / f"{split}.jsonl", chosen)


@command("sd.pretrain", __doc__)
def main(parser) -> None:
    parser.add_argument("--out", type=Path, default=Path("pretrained"),
                        help="folder to write (default: pretrained)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=3200, help="optimiser steps")
    args = parser.parse_args()
    train_solver(args.out, args.seed, args.steps)
    model, tokenizer = load(args.out)
    make_problems(args.out, model, tokenizer, tt.PRODUCTS)
    print("Avg@4 on hard validation problems: no context, with a reference, with a critique")
    for products in range(tt.LENGTHS[0], tt.LENGTHS[1] + 1):
        make_problems(args.out / str(products), model, tokenizer, products, ("val",))
        problems = read_problems(args.out / f"{products}/val.jsonl")
        scores = [evaluate(model, tokenizer, problems, 4, Config(), context).avg.mean()
                  for context in (None, "ref", "critique")]
        print(f"{products} products  " + "".join(f"{score:8.1%}" for score in scores), flush=True)


if __name__ == "__main__":
    sys.exit(main())
