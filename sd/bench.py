"""How fast, how large, how near to what this machine can do:  python -m sd.bench [--model FOLDER] [--peer transformers|trl]

    machine       copy bandwidth and matrix products: the limits that the last column is a share of
    generation    prefill, then one token after the other; reading weights and cache once per token is the least it can do
    grpo ref critique    a step split into its parts; two floating-point operations per weight and token are the least
    loss          the token-level loss alone with a vocabulary of 151,936; `dense` is the obvious form, all logits at once

Each part runs in a fresh process, as only so its peak memory is its own, and is repeated in turns with the peer's, on the
same tokens. Rollouts never end early here, so that all forms have the same work. The fastest repetition counts.

Simplified: the critic is the model itself, and its critiques are not read: the self-teacher is shown random words of the
same length. What a step costs does not depend on what the words say.
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
from sd.checkpoint import EMBEDDED, load, write_atomic
from sd.compile import fused
from sd.conditions import CHUNK, Feedback, Teacher, accumulate
from sd.config import Config, pick_device
from sd.lora import TARGETS, add_lora
from sd.peers import Clock, speeds, transformers_generation, trl_step, words
from sd.sampling import sample, uniforms

VOCABULARY, LOSS_TOKENS = 151_936, 2048
PARTS = ("machine", "generation", "grpo", "ref", "critique", "loss", "loss dense")
PEERS = {"transformers": {"generation": "transformers generation"},
         "trl": {"grpo": "trl grpo", "ref": "trl ref"}}
NEVER = (-1,)           # an EOS that no model draws


def projections(model) -> int:
    """Weights that every token is multiplied with, the output projection aside."""
    return sum(p.numel() for name, p in model.named_parameters() if name.split(".")[-2] in TARGETS)


def machine(args, device) -> dict:
    """Bytes moved per second (read and written), and floating-point operations per second in the model's dtype."""
    a = torch.rand(2 ** 26, device=device)
    b, clock = torch.empty_like(a), Clock(device)
    x = torch.randn(2048, 2048, device=device).to(args.torch_dtype)
    for i in range(5):
        with clock(f"copy {i}"):
            b.copy_(a)
        with clock(f"product {i}"):
            x @ x
    best = lambda kind: min(s for name, s in clock.seconds.items() if name.startswith(kind))
    return {"copy GB/s": 8 * a.numel() / best("copy") / 1e9, "GFLOP/s": 2 * 2048 ** 3 / best("product") / 1e9}


def generation(args, device) -> dict:
    model, tokenizer, shape = load(args.model, args.torch_dtype, device)
    prompts, clock = words(tokenizer, args.batch, args.prompt, 0), Clock(device)
    draw = lambda n: sample(model, prompts, NEVER, n, 1.0, 1, uniforms(args.batch, n, 0), args.compile)
    draw(args.tokens if args.compile else 2)            # what is set up once is not counted
    with clock("prefill"):                              # and the first token
        draw(1)
    with clock("all"):
        draw(args.tokens)
    size = args.torch_dtype.itemsize
    weights = (projections(model) + shape.vocab_size * shape.hidden_size) * size
    slots = args.prompt + args.tokens / 2               # on average
    cache = 2 * shape.num_hidden_layers * args.batch * slots * shape.num_key_value_heads * shape.head_dim * size
    return speeds(clock, args) | {"least bytes per token": weights + cache, "flop, prefill":
                                  2 * projections(model) * args.batch * args.prompt}


def step(args, device, cond: str) -> dict:
    """The second of two steps as train.py makes them: AdamW's moments are there by then."""
    model, tokenizer, shape = load(args.model, args.torch_dtype, device)
    if args.lora_rank:
        add_lora(model, args.lora_rank, 2.0 * args.lora_rank, 0)
    config = Config(cond=cond, temperature=1.0, micro_batch=args.micro_batch, compile=args.compile)
    teacher = Teacher(args.teacher if cond != "grpo" else "live", model, 0.95)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6, weight_decay=0.0)
    group = args.batch if cond == "grpo" else 1
    prompts = words(tokenizer, args.batch // group, args.prompt, 0)
    told = Feedback(advantages=[1.0, -1.0] * (args.batch // 2) + [1.0] * (args.batch % 2))
    if cond != "grpo":
        told = Feedback(teacher_prompts=[p + c for p, c in zip(prompts, words(tokenizer, args.batch, args.tokens, 1))])
    inner = conditions.completion_hidden
    for _ in range(2):
        clock = Clock(device)
        with clock("sample"):
            rollouts = sample(model, prompts, NEVER, args.tokens, 1.0, group, uniforms(args.batch, args.tokens, 0), args.compile)
        if cond == "critique":
            with clock("critic"), torch.no_grad():      # it reads problem, trace and solution
                sample(teacher.model, [t + p for t, p in zip(told.teacher_prompts, prompts)], NEVER, args.tokens, 0.0)

        def timed(of, *rest):
            with clock("student forward" if torch.is_grad_enabled() else "teacher"):
                return inner(of, *rest)
        conditions.completion_hidden = timed
        with clock("loss and backward"):
            accumulate(model, teacher, [p for p in prompts for _ in range(group)], rollouts.completions(), told, config,
                       args.batch * args.tokens)
        conditions.completion_hidden = inner
        with clock("optimiser"):
            optimizer.step()
            optimizer.zero_grad()
            teacher.update(model)
    seconds = clock.seconds
    seconds["loss and backward"] -= seconds["student forward"] + seconds.get("teacher", 0)
    length = args.prompt + args.tokens
    forward = 2 * projections(model) * args.batch * length
    head = 2 * shape.vocab_size * shape.hidden_size * args.batch * args.tokens
    flop = {"student forward": forward, "loss and backward": 2 * forward + 3 * head + (head if cond != "grpo" else 0)}
    if cond != "grpo":
        flop["teacher"] = 2 * projections(model) * args.batch * (length + args.tokens)
    return {"seconds": seconds, "total": sum(seconds.values()), "tokens/s": args.batch * args.tokens / sum(seconds.values()),
            "flop": flop}


def loss_alone(args, device, dense: bool) -> dict:
    """Forward and backward of the default divergence from hidden states to their gradient, output projection included."""
    C, clock = args.hidden, Clock(device)
    weight = (torch.randn(VOCABULARY, C, device=device) * C ** -0.5).requires_grad_()
    student, taught = torch.randn(2, LOSS_TOKENS, C, device=device)
    ids = torch.randint(VOCABULARY, (LOSS_TOKENS,), device=device)
    per_token, chunk = losses.of_logits("forward", 0.5, 1.0), LOSS_TOKENS if dense else CHUNK // VOCABULARY
    if args.compile and not dense:
        per_token = fused(per_token, device.type)
    for rows in (8, LOSS_TOKENS):                       # the first to warm up
        clock.seconds.clear()
        with clock("loss"):
            top = student[:rows].clone().requires_grad_()
            for part in (slice(at, min(at + chunk, rows)) for at in range(0, rows, chunk)):
                other = taught[part] @ weight.detach().T
                per_token(top[part] @ weight.T, other, ids[part]).sum().backward()
                del other
    return {"seconds": clock.seconds, "total": clock.seconds["loss"], "tokens/s": LOSS_TOKENS / clock.seconds["loss"],
            "flop": {"loss": 4 * 2 * VOCABULARY * C * LOSS_TOKENS}}


def measure(args, name: str) -> dict:
    """One part, in this process."""
    device = pick_device(args.device)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    kind = name.split()[-1]
    if name in ("machine", "generation"):
        out = {"machine": machine, "generation": generation}[name](args, device)
    elif name.startswith("loss"):
        out = loss_alone(args, device, kind == "dense")
    elif name.startswith("transformers"):
        out = transformers_generation(args, device)
    else:
        out = (trl_step if name.startswith("trl") else step)(args, device, kind)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return out | {"peak bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else resident}


def in_a_process(args, name: str) -> dict:
    """`measure` in a fresh process. Raises UserError with its last line if it fails."""
    command = [sys.executable, "-m", "sd.bench", *args.given, "--part", name]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise UserError(f"{name}: {(result.stderr.strip().splitlines() or ['ended without a word'])[-1][:300]}")
    return json.loads(result.stdout.strip().splitlines()[-1])


def table(results: dict) -> str:
    """One line per part and split; the share is of the copy bandwidth for decoding, of the matrix rate for the rest."""
    limit, lines = results["machine"], [f"{'':34s}{'seconds':>9s}{'tokens/s':>10s}{'peak GB':>9s}{'of limit':>10s}"]
    for name, r in results.items():
        if "seconds" not in r:
            continue
        total = sum(r["seconds"].values())
        lines.append(f"{name:34s}{total:9.2f}{r['tokens/s']:10.1f}{r['peak bytes'] / 1e9:9.2f}")
        for part, seconds in r["seconds"].items():
            share, speed = r.get("flop", {}).get(part, r.get(f"flop, {part}", 0)) / seconds / limit["GFLOP/s"] / 1e9, ""
            if part == "decode":
                speed = f"{r['decode tokens/s']:10.1f}"
                share = r.get("least bytes per token", 0) * r["steps"] / seconds / limit["copy GB/s"] / 1e9
            lines.append(f"  {part:32s}{seconds:9.2f}{speed:>10s}{'':9s}" + (f"{share:9.0%}" if share else ""))
    return "\n".join([f"copies {limit['copy GB/s']:.1f} GB/s, matrix products {limit['GFLOP/s']:.0f} GFLOP/s"] + lines)


@command("sd.bench")
def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--model", default=str(EMBEDDED), help="checkpoint folder (default: the embedded solver)")
    parser.add_argument("--peer", choices=tuple(PEERS), help="measure this library beside, in turns, if it is installed")
    parser.add_argument("--parts", default=",".join(PARTS), help="which ones (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="rollouts (default: 8)")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt (default: 64)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a rollout (default: 64)")
    parser.add_argument("--micro-batch", type=int, default=2, help="rollouts scored at once (default: 2)")
    parser.add_argument("--hidden", type=int, default=256, help="hidden size of the loss alone (default: 256)")
    parser.add_argument("--lora-rank", type=int, default=0, help="train an adapter (default 0: all weights)")
    parser.add_argument("--teacher", choices=("base", "live", "ema"), default="base")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="", help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of a CPU (default: all)")
    parser.add_argument("--repeat", type=int, default=2, help="the fastest of so many counts (default: 2)")
    parser.add_argument("--compile", action="store_true", help="as in train.py")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.given, args.torch_dtype = argv, getattr(torch, args.dtype)
    if min(args.batch, args.prompt, args.tokens - 1, args.micro_batch, args.hidden, args.threads, args.repeat) < 1:
        parser.error("numbers must be 1 or more, --tokens 2 or more")
    if unknown := set(args.parts.split(",")) - set(PARTS):
        parser.error(f"--parts has no {unknown.pop()!r}; choose from {', '.join(PARTS)}")
    if args.part:
        print(json.dumps(measure(args, args.part)))
        return
    if args.peer and not importlib.util.find_spec(args.peer):
        raise UserError(f"--peer {args.peer} is not installed here; pip install {args.peer}, or leave it out")
    names = ["machine"] + [n for n in PARTS[1:] if n in args.parts.split(",")]
    names = [both for n in names for both in (n, PEERS.get(args.peer, {}).get(n)) if both]
    results: dict[str, dict] = {}
    for _ in range(args.repeat):
        for name in names:
            print(f"… {name}", file=sys.stderr)
            new = in_a_process(args, name)
            time_of = lambda r: -r["copy GB/s"] if name == "machine" else sum(r["seconds"].values())
            if name not in results or time_of(new) < time_of(results[name]):
                results[name] = new | {"steps": args.tokens - 1}
    print(table(results))
    if args.json:
        write_atomic(args.json, json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
