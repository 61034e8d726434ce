"""What a configuration needs, before anything is loaded: memory per device by part, and the whole run's work.

Sizes follow from config.json alone. Only one phase of a step is live at a time, so the peak is what always
stays plus the largest phase. Assumed: prompts of PROMPT tokens, contexts and solutions as long as a rollout,
and rollouts that run to --max-new-tokens. Simplified: what an allocator wastes is not counted, so leave a
tenth free; on a CPU, glibc has been seen to keep a third more.
"""
import os
from pathlib import Path

import torch

from sd.llm.checkpoint import read_config
from sd.llm.compile import PACK_TOKENS, PACK_WEIGHTS
from sd.conditions import CHUNK
from sd.config import PROMPT, SCRIBE, Config
from sd.llm.lora import TARGETS
from sd.llm.model import ModelConfig, Transformer
from sd.problems import EMBEDDED, embedded, read_problems

ALIVE = {"forward": 7, "reverse": 7, "jsd": 13, "sampled": 5, "grpo": 3}    # float32 tensors of logits' size
SMALLER = {"phase: sampling, key/value cache": "lower --sample-batch",
           "phase: the critic's key/value cache": "lower --sample-batch or --critic-tokens",
           "phase: training, activations and logits": "lower --micro-batch or use --recompute",
           "phase: the teacher's forward pass": "lower --micro-batch",
           "phase: step and checkpoint": "it depends on the model and --lora-rank alone"}
GIB = 2 ** 30
CARDS = {"24 GB with 165 TFLOP/s, 1.0 TB/s": (165e12, 1.0e12),
         "80 GB with 990 TFLOP/s, 3.35 TB/s": (990e12, 3.35e12)}
# assumed, not measured: the share of a card's rates that is reached; seconds to launch a layer, uncompiled
REACHED, LAUNCHES = 0.4, 70 * 6e-6
# bytes of Python and PyTorch, whose builds for CUDA are larger; of the CUDA context
RUNTIME = {"cpu": (0.65 if torch.backends.cuda.is_built() else 0.31) * GIB, "cuda": 0.7 * GIB}


def parameters(shape: ModelConfig) -> tuple[int, int, int]:
    """How many weights: all, those of the attention and MLP projections, and those of a rank-1 adapter."""
    with torch.device("meta"):
        model = Transformer(shape)
    adapted = [module for name, module in model.named_modules() if name.split(".")[-1] in TARGETS]
    return (sum(p.numel() for p in model.parameters()), sum(m.weight.numel() for m in adapted),
            sum(m.in_features + m.out_features for m in adapted))


def activations(shape: ModelConfig, tokens: int, size: int, rank: int,
                recompute: bool) -> tuple[float, float]:
    """Bytes that a forward pass of `tokens` keeps for its backward pass, and that the latter needs besides.

    A layer keeps, per token: each norm's input in float32 and its output (also before the norm's weight, if
    that is trained), q, k, v as the attention reads them and q, k before their norm, the attention's output,
    and the MLP's gate, silu, up and product.
    """
    C, HD = shape.hidden_size, shape.num_attention_heads * shape.head_dim
    KD, inner = shape.num_key_value_heads * shape.head_dim, shape.intermediate_size
    outputs = size if rank else 2 * size
    layer = 2 * C * (4 + outputs) + (2 * HD + 2 * KD + 4 * inner + 7 * rank) * size
    if shape.qk_norm:
        layer += (HD + KD) * (4 + outputs - size)
    if recompute:
        return tokens * shape.num_hidden_layers * C * size, tokens * (layer + 2 * inner * size)
    return tokens * shape.num_hidden_layers * layer, tokens * 2 * inner * size


def sampling(shape: ModelConfig, rows: int, prompt: int, new: int, size: int, cpu: bool) -> float:
    """Bytes to sample `rows` rollouts: cache, packed weights, and the larger of prefill and decoding."""
    total, projections, _ = parameters(shape)
    packs = cpu and new >= PACK_TOKENS and total >= PACK_WEIGHTS                    # as sd/compile.py does
    packed = (projections + shape.vocab_size * shape.hidden_size) * size if packs else 0
    cache = (2 * rows * (prompt + new) * shape.num_hidden_layers *
             shape.num_key_value_heads * shape.head_dim * size)
    copied = cache / (2 * shape.num_hidden_layers)       # when finished rows are dropped, one layer at a time
    draw = rows * shape.vocab_size * (size + 4 + 8 + 8)  # logits, probabilities; these and sums in float64
    return cache + packed + max(copied, forward(shape, rows * prompt, size), draw)


def at_once(config: Config, group: int) -> int:
    return max(1, config.sample_batch // group) * group         # as `sampling.sample_in_parts` has it


def forward(shape: ModelConfig, tokens: int, size: int) -> float:
    return 3 * tokens * (shape.hidden_size + shape.intermediate_size) * size        # of one layer


def needs(config: Config, ranks: int = 1) -> dict[str, float]:
    """Bytes per device, by part; the parts named "phase: …" are never live at the same time."""
    shape, new, group = (read_config(Path(config.model or EMBEDDED)), config.max_new_tokens,
                         config.rollouts_per_problem)
    total, adapted, per_rank = parameters(shape)
    device = config.device.split(":")[0] or config.torch_device.type  # --device cuda: planned without a GPU
    cpu, size, V, C = device == "cpu", config.torch_dtype.itemsize, shape.vocab_size, shape.hidden_size
    trained = config.lora_rank * per_rank if config.lora_rank else total
    critique, distilled = config.cond == "critique", config.cond != "grpo"
    whole = not config.lora_rank                # else the initial policy is the student with its adapter off
    copies = (distilled and (config.teacher == "ema" or whole and config.teacher == "base")) + (
        whole and critique and config.critic == "self" and config.teacher != "base")
    out = {"weights": total * size, "runtime": RUNTIME[device]}
    if config.lora_rank:
        out["adapter"] = trained * 4
    if copies:
        out["self-teacher"] = copies * trained * 4          # frozen weights are shared
    loads_a_critic = critique and not (config.critic in ("symbolic", "self") or "://" in config.critic)
    judge = read_config(Path(config.critic)) if loads_a_critic else shape
    if loads_a_critic:
        out["critic"] = parameters(judge)[0] * size
    out["gradients"] = trained * 4
    out["AdamW's moments"] = trained * 8

    rollouts = -(-config.batch // ranks) * group
    validated = (-(-len(read_problems(Path(config.val)) if config.val else embedded("val")) // ranks) *
                 config.eval_samples)
    rows = max(min(rollouts, at_once(config, group)), min(validated, at_once(config, config.eval_samples)))
    out["phase: sampling, key/value cache"] = sampling(shape, rows, PROMPT, new, size, cpu)
    if critique and (loads_a_critic or config.critic == "self"):
        read = min(SCRIBE + PROMPT + 2 * new, max(1, judge.max_position_embeddings - config.critic_tokens))
        out["phase: the critic's key/value cache"] = sampling(judge, min(config.critic_batch, rollouts), read,
                                                              config.critic_tokens, size, cpu)
    rows = min(config.micro_batch, rollouts)
    kept, passing = activations(shape, rows * (PROMPT + new), size, config.lora_rank, config.recompute)
    logits = 4 * V * min(max(1, CHUNK // V), rows * new)
    alive = ALIVE.get(config.divergence, 13) + bool(config.term_clamp) if distilled else ALIVE["grpo"]
    logits = max(alive * logits,
                 3 * logits + (0 if config.lora_rank else 4 * V * C))           # the projection's gradient
    if config.compile and not cpu:
        out["the compiled loss"], logits = logits, 0                           # CUDA graphs keep their memory
    out["phase: training, activations and logits"] = kept + max(logits, passing) + 4 * rows * new * C * size
    if distilled:
        out["phase: the teacher's forward pass"] = forward(shape, rows * (PROMPT + 2 * new), size)
    merged, state = (adapted * 4 if config.lora_rank else 0,
                     trained * 12 + (trained * 4 if config.teacher == "ema" else 0))
    step = trained * 4 * ((ranks > 1) + (not cpu))    # the sum over ranks; AdamW on CUDA: all at once
    out["phase: step and checkpoint"] = max(step, merged, state if cpu else 0)
    return out


def flops(shape: ModelConfig, prompt: int, new: int, passes: float, recomputed: int = 0) -> float:
    """Operations of a rollout's `passes` (1: a forward pass) and of the `recomputed` ones, through the layers
    alone, that --recompute adds. Only new tokens reach the output projection."""
    T, HD = prompt + new, shape.num_attention_heads * shape.head_dim
    attention = 2 * T * T * HD * shape.num_hidden_layers            # scores and values, half of them masked
    layers, head = 2 * parameters(shape)[1] * T + attention, 2 * shape.vocab_size * shape.hidden_size * new
    return (passes + recomputed) * layers + passes * head


def counts(config: Config) -> tuple[int, int]:
    """How many optimiser steps and validation problems."""
    problems, validation = (len(read_problems(Path(path)) if path else embedded(split))
                            for path, split in ((config.data, "train"), (config.val, "val")))
    steps = problems * config.epochs // config.batch
    return min(config.steps, steps) if config.steps else steps, validation


def work(config: Config, ranks: int = 1) -> dict[str, tuple[float, float, float]]:
    """Part -> FLOP, bytes read, layers launched in decoding; per device, with all rollouts of full length."""
    shape, new, group = (read_config(Path(config.model or EMBEDDED)), config.max_new_tokens,
                         config.rollouts_per_problem)
    steps, validation = counts(config)
    rollouts = steps * config.batch * group / ranks

    def sampled(of: ModelConfig, count: float, at_once: int, read: int,
                written: int) -> tuple[float, float, float]:
        rows, size = max(1, min(at_once, count)), config.torch_dtype.itemsize
        cache = 2 * of.num_hidden_layers * of.num_key_value_heads * of.head_dim * rows * (read + written / 2)
        tokens = count / rows * written                     # decoded in sequence
        weights = parameters(of)[1] + of.vocab_size * of.hidden_size
        return (count * flops(of, read, written, 1), tokens * (weights + cache) * size,
                tokens * of.num_hidden_layers)

    of_step = -(-config.batch // ranks) * group
    out = {"sampling": sampled(shape, rollouts, min(of_step, at_once(config, group)), PROMPT, new)}
    if config.cond == "critique" and not (config.critic == "symbolic" or "://" in config.critic):
        judge = shape if config.critic == "self" else read_config(Path(config.critic))
        out["critic"] = sampled(judge, rollouts, min(config.critic_batch, of_step), SCRIBE + PROMPT + 2 * new,
                                config.critic_tokens)
    if config.cond != "grpo":
        out["teacher"] = rollouts * flops(shape, PROMPT + new, new, 1), 0, 0
    passes = 2 if config.lora_rank else 3           # frozen weights need no gradient
    student = flops(shape, PROMPT, new, passes, config.recompute)
    out["student, forward and backward"] = rollouts * student, 0, 0
    k = config.eval_samples
    evaluated = (-(-steps // config.eval_every) + 1) * validation * k / ranks
    return out | {"evaluations": sampled(shape, evaluated, at_once(config, k), PROMPT, new)}


def peak(parts: dict[str, float]) -> float:
    """What always stays, plus the largest phase."""
    phases = [size for name, size in parts.items() if name.startswith("phase: ")]
    return sum(parts.values()) - sum(phases) + max(phases)


def plan(config: Config, gib: float = 0) -> str:
    """A table for people; `gib` 0: no verdict on the fit. Raises UserError without a readable config.json."""
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    parts, weights = needs(config, ranks), parameters(read_config(Path(config.model or EMBEDDED)))[0]
    lines = [f"{config.model or 'the embedded solver'}, {weights / 1e6:,.1f} million weights; per device, "
             f"with rollouts of {config.max_new_tokens} tokens and prompts of {PROMPT}:"]
    lines += [f"  {name:44s} {size / GIB:8.2f} GiB" for name, size in parts.items()]
    verdict = "fits" if 1.1 * peak(parts) <= gib * GIB else "does not fit"
    lines.append(f"  {'peak: what stays and the largest phase':44s} {peak(parts) / GIB:8.2f} GiB" +
                 (f": {verdict} {gib:g} GiB, a tenth kept free" if gib else ""))
    if verdict != "fits":
        largest = max((name for name in parts if name.startswith("phase: ")), key=parts.get)
        lines.append(f"the largest {largest}: {SMALLER[largest]}" +
                     ("" if config.lora_rank else "; or train an adapter, --lora-rank 64 --dtype bfloat16"))
    on_cuda = (config.device or config.torch_device.type).startswith("cuda")
    steps, validation = counts(config)
    lines.append(
        f"work per device in {steps} steps with {validation} validation problems, all rollouts of full length"
        + (f"; hours at {REACHED:.0%} of what two cards can do,\n{' / '.join(CARDS)}:" if on_cuda else ":"))
    parts = work(config, ranks)
    for name, of in [*((name, [part]) for name, part in parts.items()), ("all", list(parts.values()))]:
        launches = 0 if config.compile else LAUNCHES
        hours = [sum(max(f / rate / REACHED, b / speed / REACHED, n * launches) for f, b, n in of) / 3600
                 for rate, speed in CARDS.values()]
        lines.append(f"  {name:44s} {sum(f for f, _, _ in of) / 1e12:12,.1f} TFLOP" +
                     (" / ".join(f"{h:8.2f}" for h in hours) + " h" if on_cuda else ""))
    return "\n".join(lines)
