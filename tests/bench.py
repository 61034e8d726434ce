"""Speed and peak memory by part, and how near each comes to what this machine can do.

    python -m tests.bench [--model FOLDER] [--peer transformers|trl]

    machine       copy bandwidth and rate of matrix products: the last column is a share of these
    generation    prefill, then token by token; at the least, each token reads weights and cache once
    grpo ref critique    a step by part; the least is two floating-point operations per weight and token
    loss          token-level loss alone, vocabulary 151,936; `dense` is the obvious form, all logits at once

Each part runs in a fresh process, so that its peak memory is its own, and in turns with the peer's, on
the same tokens. Sampled never end early here, so both sides do the same work. The fastest repetition
counts.

Simplified: the critic is the model itself, and its critiques are not used: the self-teacher is shown
random words of the same length. What a step costs does not depend on what the words say.
"""
import argparse
import importlib.util
import json
import resource
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import torch

from sd import UserError, command, conditions, losses
from sd.conditions import CHUNK, Teacher, accumulate
from sd.config import Config
from sd.llm.checkpoint import load, read_config, write_atomic
from sd.llm.compile import check_compile, compiled
from sd.llm.lora import TARGETS, add_lora
from sd.llm.sampling import sample, uniforms
from sd.problems import EMBEDDED, Problem
from sd.rollouts import Rollout
from sd.steps import parse
from tests.peers import Clock, generation_times, transformers_generation, trl_step, words

VOCABULARY, LOSS_TOKENS = 151_936, 2048
COPIED = 2 ** 26            # numbers to copy
SIDE = 2048                 # rows of the square matrices to multiply
PARTS = ("machine", "generation", "grpo", "ref", "critique", "loss", "loss dense")
PEERS = {"transformers": {"generation": "transformers generation"},
         "trl": {"grpo": "trl grpo", "ref": "trl ref"}}
NEVER = (-1,)               # an EOS that no model samples


def projection_weights(model) -> int:
    """How many weights the attention and MLP projections have."""
    named = model.named_modules()
    return sum(module.weight.numel() for name, module in named if name.split(".")[-1] in TARGETS)


def machine(args, device, _) -> dict:
    return limits(args.torch_dtype, device, COPIED, SIDE)


def limits(dtype, device, copied: int, side: int) -> dict:
    """Bytes per second (read and written), floating-point operations per second in `dtype`."""
    a = torch.rand(copied, device=device)
    b = torch.empty_like(a)
    x = torch.randn(side, side, device=device).to(dtype)
    copies, products = [], []
    for _ in range(5):
        clock = Clock()
        with clock("copy"):
            b.copy_(a)
        with clock("product"):
            x @ x
        copies.append(clock["copy"])
        products.append(clock["product"])
    return {"copy GB/s": 8 * copied / min(copies) / 1e9,
            "GFLOP/s": 2 * side ** 3 / min(products) / 1e9}


def generation(args, device, _) -> dict:
    model, tokenizer = load(args.model, args.torch_dtype, device)
    return generate(args, model, words(tokenizer, args.batch, args.prompt, 0))


def generate(args, model, prompts: list[list[int]], repeat: int = 1) -> dict:
    """Prefill and decoding, medians of `repeat` times."""
    shape = model.config

    def draw(new):
        sample(model, prompts, NEVER, new, 1.0, 1, uniforms(args.batch, new, 0), args.compile)
    times = generation_times(args, draw, repeat)
    projections = projection_weights(model)
    weights = projections + shape.vocab_size * shape.hidden_size
    slots = args.prompt + args.tokens / 2       # on average
    cache = (2 * shape.num_hidden_layers * args.batch * slots
             * shape.num_key_value_heads * shape.head_dim)
    read = (weights + cache) * args.torch_dtype.itemsize
    return times | {"flop": {"prefill": 2 * projections * args.batch * args.prompt},
                    "bytes": {"decode": read * (args.tokens - 1)}}


def step(args, device, cond: str) -> dict:
    """The second of two steps as train.py takes them: by then AdamW's moments exist."""
    model, tokenizer = load(args.model, args.torch_dtype, device)
    group = args.batch if cond == "grpo" else 1
    prompts = words(tokenizer, args.batch // group, args.prompt, 0)
    contexts = words(tokenizer, args.batch, args.tokens, 1)
    seconds = step_times(args, model, cond, prompts, contexts, 2)[-1]
    return {"seconds": seconds,
            "flop": step_flop(args, model.config, projection_weights(model), distilled=cond != "grpo")}


def step_times(args, model, cond: str, prompts, contexts, steps: int) -> list[Clock]:
    """Several steps as train.py takes them, each by part; `prompts` are one for all rollouts in grpo."""
    if args.lora_rank:
        add_lora(model, args.lora_rank, 2.0 * args.lora_rank, 0)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, weight_decay=0.0)
    config = Config(cond=cond, temperature=1.0, micro_batch=args.micro_batch, compile=args.compile)
    teacher = None if cond == "grpo" else Teacher(args.teacher, model, 0.95)
    group = args.batch // len(prompts)
    noise = uniforms(args.batch, args.tokens, 0)
    completion_hidden = conditions.completion_hidden

    def timed(*inputs):
        with clock("student forward" if torch.is_grad_enabled() else "teacher"):
            return completion_hidden(*inputs)
    clocks = []
    for _ in range(steps):
        clock = Clock()
        with clock("sample"):
            out = sample(model, prompts, NEVER, args.tokens, 1.0, group, noise, args.compile)
        if cond == "critique":
            with clock("critic"):               # it reads problem, trace and solution
                read = [p + c + p for p, c in zip(prompts, contexts)]
                sample(teacher.model, read, NEVER, args.tokens, 0.0, compile=args.compile)
        repeated = [prompt for prompt in prompts for _ in range(group)]
        rollouts = made_up(cond, repeated, contexts, out.completions())
        with clock("loss and backward"), patch.object(conditions, "completion_hidden", timed):
            accumulate(model, teacher, rollouts, config, args.batch * args.tokens)
        with clock("optimiser"):
            optimizer.step()
            optimizer.zero_grad()
            if teacher:
                teacher.update(model)
        clock["loss and backward"] -= clock["student forward"] + clock["teacher"]
        clocks.append(clock)
    return clocks


def made_up(cond: str, prompts, contexts, completions) -> list[Rollout]:
    """Rollouts of these tokens, with an advantage or a teacher's prompt that mean nothing."""
    rollouts = []
    for i, (prompt, context, completion) in enumerate(zip(prompts, contexts, completions)):
        rollout = Rollout(Problem("", "", ""), prompt, completion, torch.zeros(0), truncated=True,
                          trace=parse(""), answer=None, reward=0.0)
        if cond == "grpo":
            rollout.advantage = (-1.0) ** i
        else:
            rollout.teacher_prompt = prompt + context
        rollouts.append(rollout)
    return rollouts


def step_flop(args, shape, projections: int, distilled: bool) -> dict:
    """Two operations per weight and token forward, twice that backward (once for frozen weights)."""
    back = 1 if args.lora_rank else 2
    forward = 2 * projections * args.batch * (args.prompt + args.tokens)
    head = 2 * shape.vocab_size * shape.hidden_size * args.batch * args.tokens
    flop = {"student forward": forward,
            "loss and backward": back * forward + (1 + back + distilled) * head}
    if distilled:
        flop["teacher"] = 2 * projections * args.batch * (args.prompt + 2 * args.tokens)
    return flop


def loss_alone(args, device, kind: str) -> dict:
    """Forward and backward of output projection and forward KL, from hidden states to gradients."""
    C = args.hidden
    weight = (torch.randn(VOCABULARY, C, device=device) * C ** -0.5).requires_grad_()
    student, teacher = torch.randn(2, LOSS_TOKENS, C, device=device)
    ids = torch.randint(VOCABULARY, (LOSS_TOKENS,), device=device)
    token_loss = losses.token_loss
    chunk = CHUNK // VOCABULARY
    if kind == "dense":
        chunk = LOSS_TOKENS
    elif args.compile:
        token_loss = compiled(token_loss)
    for rows in (8, LOSS_TOKENS):               # the first warms up
        clock = Clock()
        with clock("loss"):
            leaf = student[:rows].clone().requires_grad_()
            for at in range(0, rows, chunk):
                part = slice(at, min(at + chunk, rows))
                target = teacher[part] @ weight.detach().T
                token_loss("forward", leaf[part] @ weight.T, target, ids[part], 1.0, 0.5).sum().backward()
    return {"seconds": clock, "flop": {"loss": 4 * 2 * VOCABULARY * C * LOSS_TOKENS}}


FORMS = {"machine": machine, "generation": generation, "loss": loss_alone,
         "transformers": transformers_generation, "trl": trl_step}


def measure(args, name: str) -> dict:
    """One part, in this process."""
    device = Config(device=args.device).torch_device
    if args.compile:
        check_compile(device)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    first, kind = name.split()[0], name.split()[-1]
    out = FORMS.get(first, step)(args, device, kind)
    if "seconds" in out:
        out["total"] = sum(out["seconds"].values())
        tokens = LOSS_TOKENS if first == "loss" else args.batch * args.tokens
        out["tokens/s"] = tokens / out["total"]
    if device.type == "cuda":
        out["peak bytes"] = torch.cuda.max_memory_allocated()
    else:
        out["peak bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return out


def in_a_process(args, name: str) -> dict:
    """`measure` in a fresh process. Raises UserError with its last line of stderr if it fails."""
    command_line = [sys.executable, "-m", "tests.bench", *args.given, "--part", name]
    result = subprocess.run(command_line, capture_output=True, text=True)
    if result.returncode:
        lines = result.stderr.strip().splitlines() or ["ended without a word"]
        raise UserError(f"{name}: {lines[-1][:300]}")
    return json.loads(result.stdout.strip().splitlines()[-1])


def faster(new: dict, old: dict) -> bool:
    if "total" in new:
        return new["total"] < old["total"]
    return new["copy GB/s"] > old["copy GB/s"]


def table(results: dict) -> str:
    """One line per part and split; the share is of copy bandwidth for decoding, else of the matrix rate."""
    limit = results["machine"]
    lines = [f"copies {limit['copy GB/s']:.1f} GB/s, matrix products {limit['GFLOP/s']:.0f} GFLOP/s",
             f"{'':34s}{'seconds':>9s}{'tokens/s':>10s}{'peak GB':>9s}{'of limit':>10s}"]
    for name, r in results.items():
        if name == "machine":
            continue
        lines.append(f"{name:34s}{r['total']:9.2f}{r['tokens/s']:10.1f}{r['peak bytes'] / 1e9:9.2f}")
        for part, seconds in r["seconds"].items():
            speed = f"{r['decode tokens/s']:.1f}" if part == "decode" else ""
            flop = r.get("flop", {}).get(part, 0)
            moved = r.get("bytes", {}).get(part, 0)
            share = (flop / limit["GFLOP/s"] + moved / limit["copy GB/s"]) / 1e9 / seconds
            shown = f"{share:9.0%}" if share else ""
            lines.append(f"  {part:32s}{seconds:9.2f}{speed:>10s}{'':9s}{shown}")
    return "\n".join(lines)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=str(EMBEDDED),
                        help="checkpoint folder (default: the embedded solver)")
    parser.add_argument("--peer", choices=tuple(PEERS),
                        help="also measure this library, alternating with ours, if it is installed")
    parser.add_argument("--parts", default=",".join(PARTS), help="what to measure (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="rollouts (default: 8)")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt (default: 64)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a rollout (default: 64)")
    parser.add_argument("--micro-batch", type=int, default=2, help="rollouts scored at once (default: 2)")
    parser.add_argument("--hidden", type=int, default=256,
                        help="hidden size of the loss alone (default: 256)")
    parser.add_argument("--lora-rank", type=int, default=0, help="train an adapter (default 0: all weights)")
    parser.add_argument("--teacher", choices=("base", "live", "ema"), default="base")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="", help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(),
                        help="CPU threads (default: all)")
    parser.add_argument("--repeat", type=int, default=2, help="repetitions; the fastest counts (default: 2)")
    parser.add_argument("--compile", action="store_true", help="on CUDA: our side as with train.py --compile")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    parser.add_argument("--part", help=argparse.SUPPRESS)


@command("tests.bench", __doc__)
def main(parser) -> None:
    add_options(parser)
    args = parser.parse_args()
    args.given = sys.argv[1:]
    args.torch_dtype = getattr(torch, args.dtype)
    if min(args.batch, args.prompt, args.tokens - 1, args.micro_batch, args.hidden, args.threads,
           args.repeat) < 1:
        parser.error("numbers must be 1 or more, --tokens 2 or more")
    wanted = args.parts.split(",")
    if not set(wanted) <= set(PARTS):
        parser.error(f"--parts must be of {', '.join(PARTS)}")
    if args.part:
        print(json.dumps(measure(args, args.part)))
        return
    read_config(Path(args.model))               # a wrong folder is reported before anything is measured
    if args.peer and not importlib.util.find_spec(args.peer):
        raise UserError(f"--peer {args.peer} is not installed here; pip install {args.peer}, or leave it out")
    peer = PEERS.get(args.peer, {})
    names = ["machine"]
    for name in PARTS[1:]:
        if name in wanted:
            names.append(name)
            if name in peer:
                names.append(peer[name])
    results: dict[str, dict] = {}
    for name in names * args.repeat:
        print(f"… {name}", file=sys.stderr)
        new = in_a_process(args, name)
        if name not in results or faster(new, results[name]):
            results[name] = new
    print(table(results))
    if args.json:
        write_atomic(args.json, json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
