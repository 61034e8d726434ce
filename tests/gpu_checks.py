"""What tests.gpu checks, and on which models: each check returns a sentence and numbers, or raises.

Every check compares two ways to compute the same, with a tolerance for another order of summation. Random
weights are enough for that, and need no download.
"""
import io
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from unittest.mock import patch

import torch
from safetensors.torch import load_file

import sd.config
import sd.llm.compile
import train
from sd import losses
from sd.conditions import Teacher, accumulate, completion_hidden
from sd.config import Config
from sd.llm.compile import compiled
from sd.llm.lora import add_lora
from sd.llm.model import ModelConfig, Transformer
from sd.llm.sampling import Sampled, pad, sample, uniforms
from sd.problems import EMBEDDED
from sd.run.runs import RunFolder
from tests.bench import NEVER, limits, made_up
from tests.plan import GIB

QWEN3_1_7B = ModelConfig(
    vocab_size=151_936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16,
    num_key_value_heads=8, head_dim=128, rms_norm_eps=1e-6, rope_theta=1e6, max_position_embeddings=40_960,
    tie_word_embeddings=True, qk_norm=True)
QWEN3_0_6B = replace(QWEN3_1_7B, hidden_size=1024, intermediate_size=3072)
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
# Of log-probabilities that two kernels give. In float32, TF32 would miss it by a factor of ten.
CLOSE = {FLOAT32: 2e-4, BFLOAT16: 0.3}
TESTS = [f"tests/test_{name}.py" for name in ("losses", "model", "sampling", "lora", "conditions", "compile")]


class Skipped(Exception):
    """Why a part was not run."""


@dataclass
class Lab:
    """The device and the sizes of all parts; lengths are in tokens."""
    device: torch.device
    deadline: float
    small: ModelConfig = QWEN3_0_6B
    large: ModelConfig = QWEN3_1_7B
    long: int = 2048            # as many as a rollout of the paper
    tokens: int = 128
    prompt: int = 64
    few: int = 16               # what the CPU can follow
    copied: int = 2 ** 28       # numbers
    side: int = 8192            # of square matrices
    repeats: int = 3
    paper: dict = field(default_factory=dict)           # other options than --preset paper's
    tests: list[str] = field(default_factory=lambda: TESTS)

    def model(self, shape: ModelConfig, dtype: torch.dtype) -> Transformer:
        """Random weights that keep the variance, so that logits have one of about 1."""
        torch.manual_seed(0)
        with torch.device("meta"):
            model = Transformer(shape).to(dtype)
        model.to_empty(device=self.device)
        model.lm_head.weight = model.model.embed_tokens.weight          # to_empty makes two of them
        with torch.no_grad():
            for p in model.parameters():
                p.normal_(std=p.size(-1) ** -0.5) if p.dim() > 1 else p.fill_(1)
        return model.requires_grad_()

    def prompts(self, rows: int, tokens: int, seed: int = 0) -> list[list[int]]:
        rng = random.Random(seed)
        return [rng.choices(range(1, self.small.vocab_size), k=tokens) for _ in range(rows)]

    @property
    def free(self) -> float:
        """GiB of the card; a CPU is not asked."""
        return torch.cuda.mem_get_info()[0] / GIB if self.device.type == "cuda" else math.inf

    def need(self, gib: float) -> None:
        if self.free < gib:
            raise Skipped(f"needs {gib:.1f} GiB, {self.free:.1f} are free")

    def options(self, **more) -> Namespace:
        """What tests.bench reads from its command line."""
        return Namespace(**dict(batch=8, prompt=self.prompt, tokens=self.tokens, torch_dtype=BFLOAT16,
                                lora_rank=64, micro_batch=8, teacher="base", compile=False) | more)

    @cached_property
    def limits(self) -> dict:
        """What this card copies and multiplies at most."""
        return limits(BFLOAT16, self.device, self.copied, self.side)

    def peaks(self) -> tuple[int, int]:
        """Bytes that tensors took at once since the last call, and the allocator; a CPU does not say."""
        if self.device.type != "cuda":
            return 0, 0
        most = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        torch.cuda.reset_peak_memory_stats()
        return most


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """|one - other| / |other|."""
    one, other = one.detach().cpu().double(), other.detach().cpu().double()
    return ((one - other).norm() / other.norm()).item()


def largest(differences) -> float:
    """Unlike max, it does not overlook a NaN."""
    return torch.tensor([0.0, *differences]).max().item()


def adapt(model: Transformer) -> None:
    """LoRA as after some training: a new adapter changes nothing."""
    add_lora(model, 8, 16.0, 0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("lora_B"):
                p.normal_(std=0.05)


def check_logits(lab: Lab, dtype: torch.dtype):
    """Whole sequences; and greedy decoding, whose tokens must also be the CPU's best but for rounding."""
    model = lab.model(lab.small, dtype)
    prompts = lab.prompts(2, 2 * lab.few)
    drawn = sample(model, prompts, NEVER, lab.few, 0.0)
    ids = pad([p + c for p, c in zip(prompts, drawn.completions())], lab.device)
    with torch.no_grad():
        here = model(ids).cpu()                                             # (2, T, V)
        there = model.cpu()(ids.cpu())
        exact = there if dtype == FLOAT32 else model.float()(ids.cpu())
    error, rounding = distance(here, exact), distance(there, exact)
    before = there[:, 2 * lab.few - 1:-1].float()                           # (2, few, V)
    behind = before.amax(-1) - before.gather(-1, drawn.ids.cpu().unsqueeze(-1)).squeeze(-1)
    assert error < (1e-4 if dtype == FLOAT32 else 2 * rounding + 1e-6), (
        f"relative error of logits {error:.1e}, the CPU's own {rounding:.1e}")
    assert behind.max() < CLOSE[dtype], f"a greedy token is {behind.max():.2g} below the CPU's best logit"
    equal = (behind == 0).float().mean().item()
    return (f"logits within {error:.1e} of the CPU's in float32 (bfloat16 there: {rounding:.1e}), "
            f"greedy tokens {equal:.0%} equal", {"error": error, "cpu error": rounding, "equal": equal})


@torch.inference_mode()
def scores(model: Transformer, prompts: list[list[int]], drawn: Sampled) -> float:
    """The largest difference of log-probabilities from those of whole sequences, without a cache."""
    differences = []
    for prompt, completion, logprobs in zip(prompts, drawn.completions(), drawn.logprobs):
        hidden = completion_hidden(model, [prompt], [completion])           # (T, C)
        for at in range(0, len(hidden), 512):
            ids = torch.tensor(completion[at:at + 512], device=hidden.device)
            logits = model.lm_head(hidden[at:at + 512])
            scored = losses.of_token(losses.log_probs(logits, 1.0), ids)
            differences.append((scored - logprobs[at:at + len(ids)]).abs().max().item())
    return largest(differences)


def part_ways(one: Sampled, other: Sampled) -> tuple[list[int], float]:
    """Where rows begin to differ, and the largest difference of log-probabilities before that."""
    where, differences = [], []
    for a, b, p, q in zip(one.completions(), other.completions(), one.logprobs, other.logprobs):
        shared = min(len(a), len(b))
        at = next((t for t in range(shared) if a[t] != b[t]), shared)
        if at < shared:
            where.append(at)
        if at:
            differences.append((p[:at] - q[:at]).abs().max().item())
    return sorted(where), largest(differences)


def check_decode(lab: Lab, dtype: torch.dtype, tokens: int):
    """Rounding may make a row part ways; every token must have the log-probability that is said of it.

    In bfloat16 with an adapter.
    """
    lab.need(12)
    rows = 8
    model = lab.model(lab.small, dtype)
    if dtype == BFLOAT16:
        adapt(model)
    prompts = [p[i % 4:] for i, p in enumerate(lab.prompts(rows, lab.prompt))]

    def run(eos):
        return sample(model, prompts, eos, tokens, 1.0, 1, uniforms(rows, tokens, 0), compile=True)
    with patch.object(sd.llm.compile, "traced", lambda function: function):
        eager = run(NEVER)                      # the same steps, with as many slots
    captured = run(NEVER)
    # half of the rows end, one after another
    ends = tuple(eager.ids[row, tokens * (row + 1) // rows].item() for row in range(rows // 2))
    dropped = run(ends)
    apart, worst = part_ways(captured, eager)
    apart_dropped, worst_dropped = part_ways(dropped, captured)
    scored = largest(scores(model, prompts, drawn) for drawn in (captured, dropped))
    for name, error in (("eager", worst), ("all rows", worst_dropped), ("whole sequences", scored)):
        assert error < CLOSE[dtype], f"log-probabilities are {error:.2g} from those of {name}"
    assert dropped.lengths.min() < tokens, "no row has ended"
    return (f"{tokens} tokens: {rows - len(apart)} of {rows} rows equal eager's, {rows - len(apart_dropped)} as "
            f"rows drop; log-probabilities within {worst:.1e}, of whole sequences {scored:.1e}",
            {"part ways": apart, "as rows drop": apart_dropped, "eager": worst, "scored": scored})


def check_loss(lab: Lab, dtype: torch.dtype):
    """Values and gradients; one trace of each kind serves all numbers of rows."""
    earlier = bool(sys.modules.get("triton"))
    loss, errors = compiled(losses.token_loss), []
    rng = torch.Generator(lab.device).manual_seed(0)
    for kind in ("grpo", "forward", "reverse", "jsd", "sampled"):
        for rows in (5, 33, 110):
            shape = (2, rows, lab.small.vocab_size)
            logits, target = torch.randn(shape, generator=rng, device=lab.device).to(dtype)
            target = target[:, 0] if kind == "grpo" else target
            ids = torch.randint(shape[2], (rows,), generator=rng, device=lab.device)
            weight = torch.arange(1, rows + 1, device=lab.device)
            results = []
            stance = "fail_on_recompile" if rows > 5 else "default"
            with torch.compiler.set_stance(stance):
                for function in (loss, losses.token_loss):
                    leaf = logits.clone().requires_grad_()
                    value = function(kind, leaf, target, ids, 1.1, 0.3)
                    results.append((value, *torch.autograd.grad((value * weight).sum(), leaf)))
            errors += map(distance, *results)
    worst = largest(errors)
    assert worst < (1e-5 if dtype == FLOAT32 else 1e-2), f"relative difference {worst:.1e}"
    assert earlier or not sys.modules.get("triton"), "the compiled loss has imported Triton"
    triton = "was imported before" if earlier else "was not imported"
    return f"value and gradient within {worst:.1e} of eager; Triton {triton}", {"error": worst}


def check_step(lab: Lab, cond: str):
    """Recomputed, compiled and on the CPU, all in float32: loss and gradient are those of the plain way."""
    lab.need(8)
    model = lab.model(lab.small, FLOAT32)
    adapt(model)
    prompts, contexts, texts = (lab.prompts(4, lab.few, seed) for seed in range(3))
    rollouts = made_up(cond, prompts, contexts, texts)
    trained = [p for p in model.parameters() if p.requires_grad]

    def run(recompute=False, compile=False):
        model.recompute = recompute
        teacher = None if cond == "grpo" else Teacher("base", model, 0.0)
        config = Config(cond, temperature=1.1, micro_batch=2, compile=compile)
        loss = accumulate(model, teacher, rollouts, config, 4 * lab.few)
        gradient = torch.cat([p.grad.flatten().cpu() for p in trained])
        model.zero_grad()
        return torch.tensor(loss), gradient
    plain, errors = run(), {}
    for way in ("recompute", "compile"):
        errors[way] = largest(map(distance, run(**{way: True}), plain))
    model.cpu()
    errors["cpu"] = largest(map(distance, run(), plain))
    for way, error in errors.items():
        assert error < 1e-3, f"loss or gradient, {way}: relative difference {error:.1e}"
    said = ", ".join(f"{way} {error:.1e}" for way, error in errors.items())
    return f"loss and gradient, relative difference: {said}", errors


def run_train(lab: Lab, *options) -> tuple[int, str]:
    """train.py in this process; exit status and output."""
    out = io.StringIO()
    arguments = ["train.py", *map(str, options)]
    check = sd.config.check_compile if lab.device.type == "cuda" else lambda device: None
    with redirect_stdout(out), redirect_stderr(out), patch.object(sys, "argv", arguments), \
            patch.object(sd.config, "check_compile", check):
        return train.main(), out.getvalue()


def train_options(lab: Lab, folder: Path) -> list:
    """Four steps of the embedded solver with an adapter, on a few of its problems."""
    for split, count in (("train", 32), ("val", 4)):
        lines = (EMBEDDED / f"{split}.jsonl").read_text().splitlines(keepends=True)
        (folder / f"{split}.jsonl").write_text("".join(lines[:count]))
    return ["--data", folder / "train.jsonl", "--val", folder / "val.jsonl", "--device", lab.device,
            "--batch", 2, "--steps", 4, "--eval-every", 2, "--eval-samples", 2, "--group", 2,
            "--max-new-tokens", lab.few, "--lora-rank", 4]


def check_command(lab: Lab, cond: str):
    with tempfile.TemporaryDirectory() as base:
        options = train_options(lab, Path(base))
        status, said = run_train(lab, "--cond", cond, *options, "--dtype", "bfloat16", "--recompute",
                                 "--compile", "--out", f"{base}/run")
        assert status == 0, f"train.py ended with status {status}: {said.strip()[-300:]}"
    return "four steps in bfloat16, --recompute --compile", {}


def check_resume(lab: Lab):
    """A difference is forgiven only where two runs that nobody stopped differ, too."""
    def stop(run, step, numbers):
        stepped(run, step, numbers)
        if step == 2:
            signal.raise_signal(signal.SIGTERM)

    def final(name):
        return load_file(max(Path(base, name).glob("state-*.safetensors")))

    stepped = RunFolder.stepped
    with tempfile.TemporaryDirectory() as base:
        options = ["--cond", "critique", "--teacher", "ema", *train_options(lab, Path(base)), "--out"]
        statuses = [run_train(lab, *options, f"{base}/{name}")[0] for name in ("whole", "again")]
        with patch.object(RunFolder, "stepped", stop):
            statuses.append(run_train(lab, *options, f"{base}/stopped")[0])
        statuses.append(run_train(lab, "--resume", f"{base}/stopped")[0])
        assert statuses == [0, 0, 143, 0], f"train.py ended with status {statuses}"
        whole, again, resumed = map(final, ("whole", "again", "stopped"))
    noise, difference = (largest((run[name] - whole[name]).abs().max().item() for name in whole)
                         for run in (again, resumed))
    assert difference == 0 or noise > 0, f"differs by {difference:.1e}, two undisturbed runs do not"
    exact = "bit for bit" if difference == 0 else f"to {difference:.1e}, two undisturbed runs to {noise:.1e}"
    return f"a run that was stopped ends as one that was not, {exact}", {"resumed": difference, "again": noise}


def check_tests(lab: Lab):
    left = lab.deadline - time.time()
    if left < 10:
        raise Skipped("no time is left")
    try:
        result = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *lab.tests], capture_output=True, text=True,
                                cwd=Path(__file__).parents[1], timeout=left,
                                env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    except subprocess.TimeoutExpired:
        raise Skipped(f"not finished within the {left:.0f} s that were left") from None
    lines = result.stdout.strip().splitlines() or [result.stderr[-300:]]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    assert result.returncode == 0, "; ".join([*failed[:3], lines[-1]])
    return f"{lines[-1].strip('= ')} ({', '.join(Path(path).stem for path in lab.tests)})", {}
