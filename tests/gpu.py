"""Checks a GPU against the CPU and measures it: one table, and with --json all numbers.

    python -m tests.gpu [--json FILE] [--parts decode,loss]
    python -m tests.gpu --device cpu --tiny         the same code on small shapes, without a GPU

    loss        the compiled loss against the plain one; Triton must stay out
    logits      whole sequences and greedy tokens against the CPU
    decode      CUDA graphs against the same steps without, and against scores of whole sequences
    step        losses and gradients of each condition with LoRA: recomputed, compiled, and on the CPU
    train.py    each condition through the command itself; a run that was stopped and resumed
    speed       eager against compiled, medians, as shares of what this card copies and multiplies
    memory      a step of --preset paper, phase by phase, beside what tests.plan says
    tests       those of the suite that need no GPU, in the time that is left

No download is needed: the models are random, in the shapes of Qwen3-0.6B and Qwen3-1.7B. A part that fails
does not stop the others; the exit status is 1 if one failed. What does not fit into the memory, or into
--minutes, is skipped and says so. tests/gpu_checks.py has the checks, with their tolerances.
"""
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from shutil import which
from statistics import median
from unittest.mock import patch

import torch

from sd import UserError, command
from sd.conditions import Teacher, accumulate
from sd.config import PRESETS, Config
from sd.llm.checkpoint import write_atomic, write_json
from sd.llm.compile import compiled
from sd.llm.lora import add_lora, plain_weights
from sd.llm.model import ModelConfig
from sd.llm.sampling import sample
from tests.bench import NEVER, generate, made_up, projection_weights, step_flop, step_times
from tests.cpu_graphs import cpu_graphs
from tests.gpu_checks import (BFLOAT16, FLOAT32, QWEN3_1_7B, Lab, Skipped, check_command, check_decode,
                              check_logits, check_loss, check_resume, check_step, check_tests)
from tests.plan import GIB, PROMPT, SCRIBE, needs

TOY = replace(QWEN3_1_7B, vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
              num_attention_heads=4, num_key_value_heads=2, head_dim=8)
TINY = dict(small=TOY, large=TOY, long=32, tokens=4, prompt=5, few=4, copied=2 ** 16, side=64, repeats=1,
            paper=dict(max_new_tokens=4, critic_tokens=8, sample_batch=4, lora_rank=4),
            tests=["tests/test_metrics.py"])
CONDITIONS = ("grpo", "ref", "critique")


@dataclass
class Row:
    part: str
    status: str
    seconds: float
    detail: str
    numbers: dict = field(default_factory=dict)


@contextmanager
def captures():
    """While it is open, counts how often something is captured as a CUDA graph: a list with one number."""
    count, make = [0], torch.cuda.make_graphed_callables

    def counting(*arguments):
        count[0] += 1
        return make(*arguments)
    with patch.object(torch.cuda, "make_graphed_callables", counting):
        yield count


def measure_decode(lab: Lab, batch: int):
    lab.need(6 + 0.06 * batch)
    model, numbers, said = lab.model(lab.large, BFLOAT16), {}, []
    for name in ("eager", "compiled"):
        args = lab.options(batch=batch, compile=name == "compiled")
        with captures() as count:
            times = generate(args, model, lab.prompts(batch, lab.prompt), lab.repeats)
        speed = times["decode tokens/s"]
        share = times["bytes"]["decode"] / times["seconds"]["decode"] / 1e9 / lab.limits["copy GB/s"]
        numbers[name] = {"tokens/s": speed, "of bandwidth": share, "captures": count[0]}
        said.append(f"{name} {speed:,.0f} tokens/s ({share:.0%} of bandwidth)")
    return ", ".join(said), numbers


def measure_step(lab: Lab, cond: str):
    lab.need(16)
    numbers, said = {}, []
    for name in ("eager", "compiled"):
        model = lab.model(lab.large, BFLOAT16)
        args = lab.options(compile=name == "compiled")
        prompts = lab.prompts(1 if cond == "grpo" else args.batch, args.prompt)
        contexts = lab.prompts(args.batch, args.tokens, 1)
        with captures() as count:
            clocks = step_times(args, model, cond, prompts, contexts, 1 + lab.repeats)[1:]
        parts = {part: median(clock[part] for clock in clocks) for part in clocks[0]}
        flop = step_flop(args, model.config, projection_weights(model), cond != "grpo")
        shares = {part: flop[part] / parts[part] / 1e9 / lab.limits["GFLOP/s"] for part in flop}
        numbers[name] = {"seconds": parts, "of the matrix rate": shares, "captures": count[0]}
        split = ", ".join(f"{part} {1000 * seconds:.0f}" + (f" ({shares[part]:.0%})" if part in shares else "")
                          for part, seconds in parts.items())
        said.append(f"{name} {1000 * sum(parts.values()):.0f} ms: {split}")
        del model
    return "; ".join(said), numbers


def config_json(shape: ModelConfig) -> dict:
    """A Qwen3's, with the names of a checkpoint."""
    entries = asdict(shape)
    entries.pop("unrotated")
    return entries | {"model_type": "qwen3", "attention_bias": False}


def measure_memory(lab: Lab, compile: bool):
    """The phases of a step of --preset paper with the critic `self`, each beside what tests.plan says."""
    config = replace(Config("critique", **PRESETS["paper"]), device=lab.device.type, compile=compile, **lab.paper)
    with tempfile.TemporaryDirectory() as folder:
        write_json(Path(folder, "config.json"), config_json(lab.large))
        stays, phases = needs(replace(config, model=folder))
    held = sum(stays.values()) - stays["runtime"]
    lab.need((1.05 * (held + max(phases.values()))) / GIB)
    model = lab.model(lab.large, BFLOAT16)
    add_lora(model, config.lora_rank, config.lora_alpha, 0)
    model.recompute = config.recompute
    teacher, trained = Teacher("base", model, 0.0), [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.lr, weight_decay=0.0)
    new, rows = config.max_new_tokens, config.sample_batch
    at_once = tuple(range(lab.large.vocab_size))        # ends that come after the first tokens

    def training():
        texts = [lab.prompts(config.micro_batch, tokens, i) for i, tokens in enumerate((PROMPT, new, new))]
        accumulate(model, teacher, made_up("critique", *texts), config, config.micro_batch * new)
        optimizer.step()
        optimizer.zero_grad()

    def draw(policy, rows, prompt, tokens, eos):
        sample(policy, lab.prompts(rows, prompt), eos, tokens, 1.1, compile=compile)
    training()                                          # the moments exist from now on
    peaks, reserved = {}, 0.0
    for name, phase in {
            # all rows to the end, for as many CUDA graphs as there can be
            "sampling (--sample-batch)": lambda: draw(model, rows, PROMPT, new, NEVER if compile else at_once),
            "critic (--critic-tokens)": lambda: draw(teacher.model, max(1, rows // 4), SCRIBE + PROMPT + 2 * new,
                                                     config.critic_tokens, at_once),
            "training (--micro-batch)": training,
            "saving": lambda: plain_weights(model)}.items():
        lab.peaks()                                     # from here on
        phase()
        peaks[name], taken = lab.peaks()
        reserved = max(reserved, taken)
    said = ", ".join(f"{name.split()[0]} {peaks[name] / GIB:.2f} ({(held + phases[name]) / GIB:.2f})"
                     for name in peaks)
    return (f"GiB at once, in brackets as planned: {said}; {reserved / GIB:.2f} reserved",
            {"peaks": peaks, "plan": stays | phases, "reserved": reserved})


PARTS = {
    # first: later parts make an optimiser, with which PyTorch imports Triton where it is installed
    "loss float32": partial(check_loss, dtype=FLOAT32),
    "loss bfloat16": partial(check_loss, dtype=BFLOAT16),
    "logits float32": partial(check_logits, dtype=FLOAT32),
    "logits bfloat16": partial(check_logits, dtype=BFLOAT16),
    "decode float32": lambda lab: check_decode(lab, FLOAT32, lab.long),
    "decode bfloat16": lambda lab: check_decode(lab, BFLOAT16, lab.long // 4),
    **{f"step {cond}": partial(check_step, cond=cond) for cond in CONDITIONS},
    **{f"train.py {cond}": partial(check_command, cond=cond) for cond in CONDITIONS},
    "train.py --resume": check_resume,
    "speed machine": lambda lab: ("copies {copy GB/s:,.0f} GB/s, bfloat16 products {GFLOP/s:,.0f} GFLOP/s".format(
        **lab.limits), lab.limits),
    **{f"speed decode {batch}": partial(measure_decode, batch=batch) for batch in (1, 32, 128)},
    **{f"speed step {cond}": partial(measure_step, cond=cond) for cond in CONDITIONS},
    "memory eager": partial(measure_memory, compile=False),
    "memory compiled": partial(measure_memory, compile=True),
    "tests": check_tests,
}


def free(traces: bool) -> None:
    """Gives back what went before; with `traces`, also those of torch.compile and all CUDA graphs."""
    if traces and "torch._dynamo" in sys.modules:       # whose import may be the first one of Triton
        torch._dynamo.reset()
        compiled.cache_clear()
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def run_part(lab: Lab, part: str, fresh: bool) -> Row:
    """Whatever goes wrong in a part is the part's result; a `fresh` one traces anew."""
    begin, numbers = time.time(), {}
    try:
        free(traces=fresh)
        if begin > lab.deadline:
            raise Skipped("no time is left")
        detail, numbers = PARTS[part](lab)
        status = "passed"
    except Skipped as reason:
        status, detail = "skipped", str(reason)
    except (Exception, SystemExit) as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        status = "FAILED"
        detail = f"{type(error).__name__}: {str(error)[:400]} ({Path(at.filename).name}:{at.lineno})"
    return Row(part, status, round(time.time() - begin, 1), " ".join(detail.split()), numbers)


def card(device: torch.device) -> dict:
    """What the numbers were measured on."""
    about = {"card": platform.processor() or platform.machine(), "PyTorch": torch.__version__,
             "CUDA": torch.version.cuda, "Python": platform.python_version(), "CPU cores": os.cpu_count(),
             "date": datetime.now(timezone.utc).isoformat(timespec="minutes")}
    if device.type == "cuda":
        free_bytes, total = torch.cuda.mem_get_info()
        about |= {"card": torch.cuda.get_device_name(), "GiB": total / GIB, "GiB free": free_bytes / GIB}
    if which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        about["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0]
    return about


def open_lab(args) -> Lab:
    """Raises UserError if the device is not there."""
    device = Config(device=args.device).torch_device
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.enable_cudnn_sdp(False)     # as sd.llm.checkpoint.load does
        torch.set_float32_matmul_precision("highest")   # some containers begin with TF32
    elif not args.tiny:
        raise UserError("a CPU takes hours for this; add --tiny, or give --device cuda")
    deadline = time.time() + 60 * args.minutes
    return Lab(device, deadline, **TINY if args.tiny else {})


@command("tests.gpu", __doc__)
def main(parser) -> None:
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu (default: cuda)")
    parser.add_argument("--tiny", action="store_true", help="small shapes, which say nothing of speed")
    parser.add_argument("--minutes", type=float, default=6.0, help="no part begins later (default: 6)")
    parser.add_argument("--parts", default="", help="words, with commas: only parts that have one in their name")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    args = parser.parse_args()
    lab, rows = open_lab(args), []
    about = card(lab.device)
    print(", ".join(f"{name} {value:.1f}" if isinstance(value, float) else f"{name} {value}"
                    for name, value in about.items()), flush=True)
    chosen = [part for part in PARTS if any(word in part for word in args.parts.split(","))]
    if not chosen:
        parser.error(f"--parts {args.parts}: there are {', '.join(PARTS)}")
    with cpu_graphs() if lab.device.type == "cpu" else nullcontext():
        for part in chosen:
            kind = part.split()[0]              # of these, several parts may share a trace
            same = kind in ("train.py", "speed") and rows and rows[-1].part.startswith(kind)
            rows.append(run_part(lab, part, fresh=not same))
            print("{part:20s}{status:8s}{seconds:6.1f} s  {detail}".format(**vars(rows[-1])), flush=True)
            if args.json:                   # now: a later part may end the process
                content = {**about, "rows": [asdict(row) for row in rows]}
                write_atomic(args.json, json.dumps(content, indent=1) + "\n")
    counts = [f"{sum(row.status == status for row in rows)} {status}" for status in ("passed", "FAILED", "skipped")]
    print(", ".join(counts))
    if any(row.status == "FAILED" for row in rows):
        parser.exit(1)


if __name__ == "__main__":
    sys.exit(main())
