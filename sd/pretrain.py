"""Makes a solver of the embedded task and problems that are hard for it.

    python -m sd.pretrain                       the embedded solver (40 minutes on 2 cores)
    python -m sd.pretrain --model SmolLM2-135M-Instruct --out warm      warms up a chat model

The corpus is in task/corpus.py: problems of 2 to 6 products in equal shares, 36 of 96 examples of a
step without a context, 34 with a reference solution, 26 with a critique. Matrices within the blocks
are trained by Muon, all other weights by AdamW. (After 150 steps on an earlier form of this corpus
the loss was 0.88; with AdamW alone it was 1.35.)

A chat model knows how to read and write. What it lacks are the step tags, and wrong beliefs that
training can mend. The warm-up teaches both with an adapter, which is merged: few examples, in
words, of two products, half of them without a context; an eighth as a critic, in its own prompt.
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
from torch.optim import AdamW, Muon

from sd import UserError, command
from sd.config import Config
from sd.llm.checkpoint import load, read_config, save_model, write_json
from sd.llm.lora import add_lora, plain_weights
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
AT_ONCE = 24                                                # of them, of similar lengths
CHAT_SPLITS = {"val": 32, "train": 96, "test": 64}
CHAT_KINDS = [[None, None, "ref", last] for last in ("critique", "scribe")]
CHAT_STEPS = 80
CHAT_PRODUCTS = 2
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "hidden_act": "silu",
}


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
    optimizers = [Muon(matrices, lr=0.02, weight_decay=0.01),
                  AdamW(others, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)]
    fit(model, tokenizer, optimizers, [KINDS], AT_ONCE, tt.LENGTHS, seed, steps)
    save_model(folder, dict(model.named_parameters()), folder, step=steps)


def warm_up(source: Path, folder: Path, seed: int, steps: int) -> None:
    """Teaches the chat model in `source` the task in words; the checkpoint goes to `folder`."""
    model, tokenizer = load(source, torch.bfloat16)
    tokenizer.chat("")              # raises UserError if it is no chat model
    add_lora(model, 32, 64.0, seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizers = [AdamW(parameters, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0)]
    fit(model, tokenizer, optimizers, CHAT_KINDS, 1, (CHAT_PRODUCTS,) * 2, seed, steps)
    save_model(folder, plain_weights(model), source, step=steps)


def fit(model: Transformer, tokenizer: Tokenizer, optimizers: list, kinds: list[list], at_once: int,
        lengths: tuple[int, int], seed: int, steps: int) -> None:
    """Each step learns from an example of each of the next list in `kinds`; cosine schedule."""
    rng = Random(seed)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def gradient(examples: list) -> tuple[Tensor, ...]:
        """Of the summed loss, after the loss itself."""
        ids, labels = collate(examples)
        logits = model(ids).flatten(0, 1).float()                               # (B * T, V)
        loss = F.cross_entropy(logits, labels.flatten(), reduction="sum")
        return loss.detach(), *torch.autograd.grad(loss, parameters)

    # one thread for each core scales better than operators that use several
    with ThreadPoolExecutor(os.cpu_count(), initializer=torch.set_num_threads,
                            initargs=(1,)) as pool:
        for step in range(steps):
            cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
            scale = min(1, 32 * (step + 1) / steps) * (0.01 + 0.99 * cosine)
            batch = [example(kind, rng.randint(*lengths), rng, tokenizer)
                     for kind in kinds[step % len(kinds)]]
            batch.sort(key=lambda e: -len(e[0]) - len(e[1]))        # the longest part begins
            parts = [batch[i:i + at_once] for i in range(0, len(batch), at_once)]
            count = sum(sum(target) for _, _, target in batch)
            loss, *gradients = map(sum, zip(*pool.map(gradient, parts)))
            for p, total in zip(parameters, gradients):
                p.grad = total / count
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = scale * optimizer.defaults["lr"]
                optimizer.step()
            if (step + 1) % max(1, steps // 64) == 0:
                print(f"step {step + 1}/{steps}  loss {loss / count:.4f}", flush=True)


def make_problems(folder: Path, model: Transformer, tokenizer: Tokenizer, products: int,
                  splits: dict[str, int] | None = None, samples: int = 16) -> None:
    """Writes a file per split: problems of so many products, each solved less than 5 times in 16.

    No two problems, within a split or across splits, have the same products in any order. The
    reference solution is an independent author's: always in other words; half of the time in the
    problem's own order, otherwise in a random one (a share fixed before any result was seen).
    """
    rng = Random(f"problems of {products}")
    found, seen = [], set()
    splits = splits or SPLITS
    wanted = sum(splits.values())
    while len(found) < wanted:
        candidates = []
        for _ in range(CANDIDATES):
            pairs = random_pairs(rng, products, tokenizer.chat_model)
            facts = frozenset(map(tt.key, pairs))
            if facts in seen:
                continue
            seen.add(facts)
            solution = tt.reference_text(tt.author_order(pairs, rng))
            answer = str(sum(map(math.prod, pairs)))
            problem = tt.write_problem(pairs, tokenizer.chat_model)
            candidates.append(Problem("", problem, answer, solution))
        if not candidates:
            raise UserError(f"only {len(found)} of all {len(seen)} problems of {products} products "
                            f"are hard for this model, {wanted} are wanted; more --steps teach it "
                            "its mistakes")
        scores = evaluate(model, tokenizer, candidates, samples, Config(seed=len(seen)))
        found += [problem for problem, avg in zip(candidates, scores.avg) if 16 * avg < 5]
    print(f"{products} products: {len(found)} of {len(seen)} problems are hard", flush=True)
    hard = iter(found)
    for split, count in splits.items():
        chosen = [replace(next(hard), id=f"{split}-{i}") for i in range(1, count + 1)]
        write_problems(folder / f"{split}.jsonl", chosen)


@command("sd.pretrain", __doc__)
def main(parser) -> None:
    parser.add_argument("--model", type=Path, help="warm up the chat model in this folder instead")
    parser.add_argument("--out", type=Path, default=Path("pretrained"),
                        help="folder to write (default: pretrained)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int,
                        help=f"optimiser steps (default: 3200, for a chat model {CHAT_STEPS})")
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"--out {args.out} exists already; choose another folder")
    if args.steps is not None and args.steps < 1:
        parser.error("--steps must be 1 or more")
    if args.model:
        warm_up(args.model, args.out, args.seed, args.steps or CHAT_STEPS)
        model, tokenizer = load(args.out, torch.bfloat16)
        make_problems(args.out, model, tokenizer, CHAT_PRODUCTS, CHAT_SPLITS, samples=2)
        measure(args.out, model, tokenizer, CHAT_PRODUCTS)
        return
    train_solver(args.out, args.seed, args.steps or 3200)
    model, tokenizer = load(args.out)
    make_problems(args.out, model, tokenizer, tt.PRODUCTS)
    for products in range(tt.LENGTHS[0], tt.LENGTHS[1] + 1):
        folder = args.out / str(products)
        make_problems(folder, model, tokenizer, products, {"val": SPLITS["val"]})
        measure(folder, model, tokenizer, products)


def measure(folder: Path, model: Transformer, tokenizer: Tokenizer, products: int) -> None:
    """Prints what the solver and its self-teacher get right on the folder's validation problems."""
    problems = read_problems(folder / "val.jsonl")
    scores = [evaluate(model, tokenizer, problems, 4, Config(), context).avg.mean()
              for context in (None, "ref", "critique")]
    print(f"{products} products, Avg@4: {scores[0]:.1%} alone, {scores[1]:.1%} with a reference, "
          f"{scores[2]:.1%} with a critique", flush=True)


if __name__ == "__main__":
    sys.exit(main())
