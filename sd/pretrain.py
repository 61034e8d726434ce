"""Makes the embedded solver and its problems: `python -m sd.pretrain` (about 20 minutes on 2 cores).

The solver plays the part of the paper's pretrained language model: it must solve some problems alone and be
able to use a context that it is shown. Half of each batch has no context (and mistakes on the hard pairs,
`times_table.belief`), a quarter has a reference solution, a quarter a critique. Three things make the
contexts worth reading:
- their values are arbitrary for hard pairs and a third of the easy ones: only copying the context is right;
- 40 % of the traces have slips (wrong values or misread factors, which are not targets) and go on
  consistently: a self-teacher is asked about the student's own prefix, errors included, and must stay sane;
- a third of the traces under a reference follow it, in its order and in words, as a language model that has
  just read one does; the others keep the solver's own order and notation, since a teacher must be able to use
  a reference whose path the trace does not follow.
"""
import json
import math
import random
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

from sd import command, steps
from sd.task import times_table as tt
from sd.llm.checkpoint import load, read_config, save_model, write_atomic
from sd.config import Config
from sd.metrics import evaluate
from sd.llm.model import Transformer
from sd.problems import Problem, read_problems
from sd.llm.sampling import pad
from sd.llm.tokenizer import CONTROL, Tokenizer

WORDS = 0.2                             # share of the solver's traces that are in words and interleaved
SLIP = 0.4                              # share of context examples with wrong products in the trace
MISREAD = 0.3                           # share of these with a misread factor, not a wrong value
SPLITS = {"train": 282, "val": 100, "test": 200}
FOLLOW = 1 / 3                          # share of traces under a reference that follow its order, in words
STEPS, BATCH, LR = 12, 96, 2e-3         # step numbers with a tag; examples per training step; learning rate
CONFIG = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "num_hidden_layers": 4,
          "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "rms_norm_eps": 1e-6,
          "rope_theta": 10000.0, "max_position_embeddings": 512, "tie_word_embeddings": False,
          "attention_bias": False, "hidden_act": "silu", "torch_dtype": "float32"}


def build_tokenizer(path: Path) -> Tokenizer:
    """A fixed list of pieces, matched longest first; all else is unknown. Digits are single tokens, so that
    addition is learned as an algorithm; one tag token closes a step and opens the next."""
    tags = [f"<step_{k}> " for k in range(1, STEPS + 1)] + ["<answer> ", " </answer>"]
    for k in range(1, STEPS + 1):
        tags += [f" </step_{k}>\n<step_{k + 1}> ", f" </step_{k}>\n<answer> ", f" </step_{k}>"]
    words = [" times ", " is ", " plus ", " gives ",
             "first ", ", then ", " multiplied by ", " makes ", ", so ", "correct"]
    pieces = tags + words + [" + ", "*", "+", "=", " ", "\n", *"0123456789"]
    pattern = "|".join(sorted(pieces, key=len, reverse=True)).replace("*", r"\*").replace("+", r"\+") + "|."
    fast = FastTokenizer(models.WordLevel({t: i for i, t in enumerate(CONTROL + pieces)}, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    fast.decoder = decoders.Fuse()
    fast.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL])
    write_atomic(path, fast.to_str())
    return Tokenizer(path)


def random_pairs(rng: random.Random) -> list[tt.Pair]:
    return [rng.choice([(a, b), (b, a)]) for a, b in rng.sample(tt.PAIRS, 3)]


def written(equations: list[tt.Equation]) -> str:
    return steps.render(list(map(str, equations)), str(equations[-1].value))


def example(kind: str | None, rng: random.Random,
            tokenizer: Tokenizer) -> tuple[list[int], list[int], list[bool]]:
    """One training example: prompt ids, completion ids (with EOS), and which completion ids are targets."""
    pairs = order = random_pairs(rng)
    words, problem = rng.random() < WORDS, tt.write_problem(pairs)
    if kind is None:
        equations = tt.derive(tt.State(list(pairs)), words, words, lambda pair: tt.belief(pair, rng))
        ids = tokenizer.encode(written(equations)) + [tokenizer.eos[0]]
        return tokenizer.student_prompt(problem), ids, [True] * len(ids)

    given = {pair: (rng.randint(4, 144) if tt.key(pair) in tt.HARD or rng.random() < 1 / 3 else
                    pair[0] * pair[1]) for pair in pairs}
    if kind == "ref":
        author = tt.author_order(pairs, rng, same=0.25)
        context = tt.reference_text(author, [given[pair] for pair in author])
        if rng.random() < FOLLOW:
            order, words = author, True
    else:
        context = written(tt.derive(tt.State(list(pairs)), words, words, given.get))
    slips = set(rng.sample(pairs, rng.choice([1, 1, 2, 3]))) if rng.random() < SLIP else set()
    taken, values, masked = [], dict(given), {}         # products as in the trace; masked: slips in them
    for pair in order:
        if pair in slips and rng.random() < MISREAD:    # a factor misread: the value is true of what was read
            pair = (rng.randint(tt.LOW, tt.HIGH), pair[1])
            values[pair] = pair[0] * pair[1]
            masked[pair] = ("operand", "value") if tt.key(pair) in tt.HARD else ("operand",)
        elif pair in slips:
            values[pair], masked[pair] = rng.choice(tt.usual_mistakes(tt.key(pair))), ("value",)
        taken.append(pair)
    equations = tt.derive(tt.State(taken), words, words, values.get)
    text = written(equations)
    encoding = tokenizer.fast.encode(text, add_special_tokens=False)
    target = [True] * (len(encoding.ids) + 1)
    for step, equation in zip(steps.parse(text).steps, equations):
        begin = text.index(step.text, step.start)
        end = begin + len(step.text)
        spans = {"operand": (begin, begin + len(str(equation.left))),
                 "value": (end - len(str(equation.value)), end)}
        for part in masked.get((equation.left, equation.right), ()) if equation.product else ():
            for i, (start, _) in enumerate(encoding.offsets):
                target[i] &= not spans[part][0] <= start < spans[part][1]
    return tokenizer.teacher_prompt(problem, kind, context), encoding.ids + [tokenizer.eos[0]], target


def collate(examples: list) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids (B, T), and labels (B, T): the next token where it is a target, -100 elsewhere."""
    ids = pad([prompt + completion for prompt, completion, _ in examples], "cpu")
    labels = torch.full_like(ids, -100)
    for row, (prompt, completion, target) in enumerate(examples):
        wanted = torch.where(torch.tensor(target), torch.tensor(completion), -100)
        labels[row, len(prompt) - 1:len(prompt) + len(completion) - 1] = wanted
    return ids, labels


def train_solver(folder: Path, seed: int, steps_total: int, width: int) -> None:
    torch.manual_seed(seed)
    rng, tokenizer = random.Random(seed), build_tokenizer(folder / "tokenizer.json")
    config = CONFIG | {"hidden_size": width, "intermediate_size": 2 * width,
                       "vocab_size": tokenizer.vocab_size, "eos_token_id": tokenizer.eos[0]}
    write_atomic(folder / "config.json", json.dumps(config, indent=1) + "\n")
    model = Transformer(read_config(folder))
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.02)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.98), weight_decay=0.01)
    start = time.time()
    for step in range(steps_total):
        scale = min(1, (step + 1) / 100) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps_total)))
        optimizer.param_groups[0]["lr"] = LR * scale
        losses, counts = [], []
        for kinds in [None] * (BATCH // 2), ["ref"] * (BATCH // 4) + ["critique"] * (BATCH // 4):
            ids, labels = collate([example(kind, rng, tokenizer) for kind in kinds])        # (B, T), (B, T)
            losses.append(F.cross_entropy(model(ids).flatten(0, 1), labels.flatten(), reduction="sum"))
            counts.append((labels >= 0).sum())
        optimizer.zero_grad()
        (sum(losses) / sum(counts)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 49:
            seconds = time.time() - start
            print(f"step {step + 1}/{steps_total}  loss without context {losses[0] / counts[0]:.4f}  with "
                  f"{losses[1] / counts[1]:.4f}  {seconds:.0f} s, "
                  f"{seconds / (step + 1) * (steps_total - step - 1):.0f} s left", flush=True)
    save_model(folder, dict(model.named_parameters()), folder, step=steps_total)


def make_problems(folder: Path, model: Transformer, tokenizer: Tokenizer, seed: int) -> None:
    """Writes train, val and test: new sums of three products, which the solver solves < 5 times in 16.

    No two problems, within a split or across splits, have the same three products in any order. The reference
    solution is an independent author's: always in other words; half of the time in the problem's own order,
    otherwise in a random one (a share fixed before any result was seen).
    """
    rng, wanted, found, seen = random.Random(f"{seed} problems"), sum(SPLITS.values()), [], set()
    while len(found) < wanted:
        candidates = []
        for _ in range(100):
            pairs = random_pairs(rng)
            facts = frozenset(map(tt.key, pairs))
            if facts in seen:
                continue
            seen.add(facts)
            author = tt.author_order(pairs, rng)
            candidates.append(Problem("", tt.write_problem(pairs), str(sum(a * b for a, b in pairs)),
                                      tt.reference_text(author, [a * b for a, b in author])))
        scores = evaluate(model, tokenizer, candidates, 16, Config.temperature,
                          Config.max_new_tokens, len(seen))
        found += [problem for problem, avg in zip(candidates, scores.avg) if 16 * avg < 5]
        print(f"{len(found)} of {wanted} hard problems, out of {len(seen)}", flush=True)
    for split, count in SPLITS.items():
        rows = [asdict(replace(problem, id=f"{split}-{i + 1}")) for i, problem in enumerate(found[:count])]
        write_atomic(folder / f"{split}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        found = found[count:]


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
    for context in (None, "ref", "critique"):
        scores = evaluate(model, tokenizer, read_problems(args.out / "val.jsonl"), 4, Config.temperature,
                          Config.max_new_tokens, args.seed, context)
        print(f"validation problems, {context or 'no context':10s}  Avg@4 {100 * scores.avg.mean():5.1f}  "
              f"length {scores.lengths.mean():.1f}  truncated {scores.truncated.mean():.1%}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
