"""Speed and peak memory by part, and how near each comes to what this machine can do.

    python -m tests.bench [--model FOLDER] [--peer transformers|trl]

    machine       copy bandwidth and rate of matrix products: the last column is a share of these limits
    generation    prefill, then token by token; the least is to read weights and cache once per token
    grpo ref critique    a step, part by part; the least is two floating-point operations per weight and token
    loss          token-level loss alone, vocabulary 151,936; `dense` is the obvious form, all logits at once

Each part runs in a fresh process, so that its peak memory is its own, and in turns with the peer's, on the
same tokens. Rollouts never end early here, so both sides do the same work. The fastest repetition counts.

Simplified: the critic is the model itself, and its critiques are not used: the self-teacher is shown random
words of the same length. What a step costs does not depend on what the words say.
"""
import argparse
import importlib.util
import json
import resource
import subprocess
import sys
from pathlib import Path

import torch

from sd import UserError, command, conditions, losses
from sd.llm.checkpoint import load, read_config, write_atomic
from sd.llm.compile import fused
from sd.conditions import CHUNK, Feedback, Teacher, accumulate
from sd.config import Config, pick_device
from sd.llm.lora import add_lora
from tests.peers import Clock, generation_times, transformers_generation, trl_step, words
from sd.run.plan import parameters
from sd.llm.sampling import sample, uniforms
from sd.problems import EMBEDDED

VOCABULARY, LOSS_TOKENS = 151_936, 2048
COPIED, SIDE = 2 ** 26, 2048           # numbers to copy; rows of the square matrices to multiply
PARTS = ("machine", "generation", "grpo", "ref", "critique", "loss", "loss dense")
PEERS = {"transformers": {"generation": "transformers generation"},
         "trl": {"grpo": "trl grpo", "ref": "trl ref"}}
NEVER = (-1,)           # an EOS that no model samples


def machine(args, device, _) -> dict:
    """Bytes per second (read and written), floating-point operations per second in the model's dtype."""
    a, x = torch.rand(COPIED, device=device), torch.randn(SIDE, SIDE, device=device).to(args.torch_dtype)
    b, clock = torch.empty_like(a), Clock()
    for i in range(5):
        with clock(f"copy {i}"):
            b.copy_(a)
        with clock(f"product {i}"):
            x @ x
    best = lambda kind: min(s for name, s in clock.items() if name.startswith(kind))
    return {"copy GB/s": 8 * a.numel() / best("copy") / 1e9, "GFLOP/s": 2 * SIDE ** 3 / best("product") / 1e9}


def generation(args, device, _) -> dict:
    model, tokenizer = load(args.model, args.torch_dtype, device)
    shape = model.config
    prompts, size = words(tokenizer, args.batch, args.prompt, 0), args.torch_dtype.itemsize
    times = generation_times(args, lambda new: sample(
        model, prompts, NEVER, new, 1.0, 1, uniforms(args.batch, new, 0), args.compile))
    projections, slots = parameters(shape)[1], args.prompt + args.tokens / 2                    # on average
    weights = (projections + shape.vocab_size * shape.hidden_size) * size
    cache = (2 * shape.num_hidden_layers * args.batch * slots *
             shape.num_key_value_heads * shape.head_dim * size)
    return times | {"flop": {"prefill": 2 * projections * args.batch * args.prompt},
                    "bytes": {"decode": (weights + cache) * (args.tokens - 1)}}


def step(args, device, cond: str) -> dict:
    """The second of two steps as train.py takes them: by then AdamW's moments exist."""
    model, tokenizer = load(args.model, args.torch_dtype, device)
    shape = model.config
    if args.lora_rank:
        add_lora(model, args.lora_rank, 2.0 * args.lora_rank, 0)
    config = Config(cond=cond, temperature=1.0, micro_batch=args.micro_batch, compile=args.compile)
    distilled, tokens = cond != "grpo", args.batch * args.tokens
    teacher = Teacher(args.teacher if distilled else "live", model, 0.95)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6,
                                  weight_decay=0.0)
    group = 1 if distilled else args.batch
    prompts = words(tokenizer, args.batch // group, args.prompt, 0)
    told = Feedback(advantages=[(-1.0) ** i for i in range(args.batch)])
    if distilled:
        told = Feedback(teacher_prompts=[
            p + c for p, c in zip(prompts, words(tokenizer, args.batch, args.tokens, 1))])
    noise, inner = uniforms(args.batch, args.tokens, 0), conditions.completion_hidden

    def timed(*of):
        with clock("student forward" if torch.is_grad_enabled() else "teacher"):
            return inner(*of)
    conditions.completion_hidden = timed
    for _ in range(2):
        clock = Clock()
        with clock("sample"):
            rollouts = sample(model, prompts, NEVER, args.tokens, 1.0, group, noise, args.compile)
        if cond == "critique":
            with clock("critic"), torch.no_grad():      # it reads problem, trace and solution
                sample(teacher.model, [t + p for t, p in zip(told.teacher_prompts, prompts)], NEVER,
                       args.tokens, 0.0)
        with clock("loss and backward"):
            accumulate(model, teacher, [p for p in prompts for _ in range(group)], rollouts.completions(),
                       told, config, tokens)
        with clock("optimiser"):
            optimizer.step()
            optimizer.zero_grad()
            teacher.update(model)
    conditions.completion_hidden = inner
    clock["loss and backward"] -= clock["student forward"] + clock["teacher"]
    a_token, head = 2 * parameters(shape)[1], 2 * shape.vocab_size * shape.hidden_size * tokens
    # back: frozen weights need no gradient
    forward, back = a_token * args.batch * (args.prompt + args.tokens), 1 if args.lora_rank else 2
    flop = {"student forward": forward, "loss and backward": back * forward + (1 + back + distilled) * head}
    if distilled:
        flop["teacher"] = a_token * args.batch * (args.prompt + 2 * args.tokens)
    return {"seconds": clock, "flop": flop}


def loss_alone(args, device, kind: str) -> dict:
    """Forward and backward of output projection and default divergence, from hidden states to gradients."""
    C = args.hidden
    weight = (torch.randn(VOCABULARY, C, device=device) * C ** -0.5).requires_grad_()
    student, taught = torch.randn(2, LOSS_TOKENS, C, device=device)
    ids = torch.randint(VOCABULARY, (LOSS_TOKENS,), device=device)
    per_token, chunk = (losses.of_logits("forward", 0.5, 1.0),
                        LOSS_TOKENS if kind == "dense" else CHUNK // VOCABULARY)
    if args.compile and kind != "dense":
        per_token = fused(per_token, device.type)
    for rows in (8, LOSS_TOKENS):                       # the first warms up
        clock = Clock()
        with clock("loss"):
            top = student[:rows].clone().requires_grad_()
            for mine, other, y in zip(*(of[:rows].split(chunk) for of in (top, taught, ids))):
                per_token(mine @ weight.T, other @ weight.detach().T, y).sum().backward()
    return {"seconds": clock, "flop": {"loss": 4 * 2 * VOCABULARY * C * LOSS_TOKENS}}


def measure(args, name: str) -> dict:
    """One part, in this process."""
    device = pick_device(args.device)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    first, kind = name.split()[0], name.split()[-1]
    forms = {"machine": machine, "generation": generation, "loss": loss_alone,
             "transformers": transformers_generation, "trl": trl_step}
    out = forms.get(first, step)(args, device, kind)
    if "seconds" in out:
        total = sum(out["seconds"].values())
        out |= {"total": total,
                "tokens/s": (LOSS_TOKENS if first == "loss" else args.batch * args.tokens) / total}
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return out | {"peak bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else resident}


def in_a_process(args, name: str) -> dict:
    """`measure` in a fresh process. Raises UserError with its last line of stderr if it fails."""
    command = [sys.executable, "-m", "tests.bench", *args.given, "--part", name]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise UserError(
            f"{name}: {(result.stderr.strip().splitlines() or ['ended without a word'])[-1][:300]}")
    return json.loads(result.stdout.strip().splitlines()[-1])


def table(results: dict) -> str:
    """One line per part and split; the share is of copy bandwidth for decoding, else of the matrix rate."""
    limit, lines = results["machine"], [
        f"{'':34s}{'seconds':>9s}{'tokens/s':>10s}{'peak GB':>9s}{'of limit':>10s}"]
    for name, r in list(results.items())[1:]:
        lines.append(f"{name:34s}{r['total']:9.2f}{r['tokens/s']:10.1f}{r['peak bytes'] / 1e9:9.2f}")
        for part, seconds in r["seconds"].items():
            speed = f"{r['decode tokens/s']:.1f}" if part == "decode" else ""
            flop, moved = r.get("flop", {}).get(part, 0), r.get("bytes", {}).get(part, 0)
            share = (flop / limit["GFLOP/s"] + moved / limit["copy GB/s"]) / 1e9 / seconds
            lines.append(f"  {part:32s}{seconds:9.2f}{speed:>10s}{'':9s}" +
                         (f"{share:9.0%}" if share else ""))
    return "\n".join([f"copies {limit['copy GB/s']:.1f} GB/s, "
                      f"matrix products {limit['GFLOP/s']:.0f} GFLOP/s"] + lines)


@command("tests.bench", __doc__)
def main(parser, argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
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
    parser.add_argument("--compile", action="store_true", help="compile our side, as in train.py")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.given, args.torch_dtype = argv, getattr(torch, args.dtype)
    if min(args.batch, args.prompt, args.tokens - 1, args.micro_batch, args.hidden, args.threads,
           args.repeat) < 1:
        parser.error("numbers must be 1 or more, --tokens 2 or more")
    if unknown := set(args.parts.split(",")) - set(PARTS):
        parser.error(f"--parts has no {unknown.pop()!r}; choose from {', '.join(PARTS)}")
    if args.part:
        print(json.dumps(measure(args, args.part)))
        return
    read_config(Path(args.model))               # a wrong folder is told before anything is measured
    if args.peer and not importlib.util.find_spec(args.peer):
        raise UserError(f"--peer {args.peer} is not installed here; pip install {args.peer}, or leave it out")
    names = ["machine"] + [n for n in PARTS[1:] if n in args.parts.split(",")]
    names = [both for n in names for both in (n, PEERS.get(args.peer, {}).get(n)) if both]
    results: dict[str, dict] = {}
    for name in names * args.repeat:
        print(f"… {name}", file=sys.stderr)
        new, time_of = in_a_process(args, name), lambda r: r.get("total") or -r["copy GB/s"]
        if name not in results or time_of(new) < time_of(results[name]):
            results[name] = new
    print(table(results))
    if args.json:
        write_atomic(args.json, json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
