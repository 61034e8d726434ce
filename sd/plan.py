"""What a configuration needs, before anything is loaded: memory per device by part, and the work of a step.

Sizes follow from config.json alone. Of the three phases of a step (sampling, training, writing a checkpoint) only one is
alive at a time, so the peak is what always stays plus the largest of them. Prompts are assumed to have PROMPT tokens and
rollouts to run to --max-new-tokens. Simplified: what an allocator wastes is not in it, so leave a tenth free.
"""
import os
from pathlib import Path

import torch

from sd.checkpoint import EMBEDDED, read_config
from sd.conditions import CHUNK
from sd.config import Config
from sd.lora import TARGETS
from sd.model import ModelConfig, Transformer

PROMPT = 256            # tokens; a teacher's prompt also holds a context as long as a rollout
ALIVE = 6               # float32 tensors of logits' size in a divergence and its backward pass
GIB = 2 ** 30
RUNTIME = {"cpu": 0.35 * GIB, "cuda": 0.7 * GIB}    # Python, PyTorch, and the CUDA context


def parameters(shape: ModelConfig) -> tuple[int, int]:
    """(all weights, weights of the attention and MLP projections)."""
    with torch.device("meta"):
        model = Transformer(shape)
    adapted = sum(p.numel() for name, p in model.named_parameters() if name.split(".")[-2] in TARGETS)
    return sum(p.numel() for p in model.parameters()), adapted


def activations(shape: ModelConfig, tokens: int, size: int, rank: int, recompute: bool) -> float:
    """Bytes that the forward pass of one micro-batch of `tokens` keeps for its backward pass, and the largest layer's own.

    A layer keeps, per token: each norm's input in float32 and its output (before its weight too, if that trains), q, k, v as
    the attention reads them and q, k before their norm, the attention's output, and the MLP's gate, silu, up and product.
    """
    C, HD = shape.hidden_size, shape.num_attention_heads * shape.head_dim
    KD, inner = shape.num_key_value_heads * shape.head_dim, shape.intermediate_size
    outputs = size if rank else 2 * size
    layer = 2 * C * (4 + outputs) + (2 * HD + 2 * KD + 4 * inner + 7 * rank) * size
    if shape.qk_norm:
        layer += (HD + KD) * (4 + outputs - size)
    if recompute:
        return tokens * (shape.num_hidden_layers * C * size + layer + 2 * inner * size)
    return tokens * (shape.num_hidden_layers * layer + 2 * inner * size)


def needs(config: Config, ranks: int = 1) -> dict[str, float]:
    """Bytes per device, by part; the parts that are named "phase: …" exclude one another."""
    shape = read_config(Path(config.model or EMBEDDED))
    total, adapted = parameters(shape)
    size = 2 if config.dtype == "bfloat16" else 4
    layers, V, C = shape.num_hidden_layers, shape.vocab_size, shape.hidden_size
    with torch.device("meta"):
        block = Transformer(shape).model.layers[0]
    per_layer = sum(m.in_features + m.out_features for part in (block.self_attn, block.mlp)
                    for name, m in part.named_children() if name in TARGETS)
    trained = config.lora_rank * layers * per_layer if config.lora_rank else total
    distilled = config.cond != "grpo"
    out = {"weights": total * size, "runtime": RUNTIME[config.torch_device.type]}
    if config.lora_rank:
        out["adapter"] = trained * 4
    if distilled and config.teacher != "live" or config.critic == "self" and config.cond == "critique":
        out["self-teacher"] = 4 * trained           # what is frozen is shared
    if config.cond == "critique" and not (config.critic in ("symbolic", "self") or "://" in config.critic):
        out["critic"] = parameters(read_config(Path(config.critic)))[0] * size
    out["gradients"] = trained * 4
    out["AdamW's moments"] = trained * 8

    local = config.sample_batch if config.sample_batch < config.batch * config.rollouts_per_problem / ranks else \
        config.batch * config.rollouts_per_problem // ranks
    slots = PROMPT + config.max_new_tokens
    cache = 2 * layers * local * slots * shape.num_key_value_heads * shape.head_dim * size
    out["phase: sampling, key/value cache"] = cache + local * V * (size + 4 + 4 + 8)
    rows = min(config.micro_batch, local)
    tokens = rows * slots
    teacher_tokens = rows * (slots + config.max_new_tokens) if distilled else 0
    predicted = rows * config.max_new_tokens
    logits = ALIVE * 4 * min(max(CHUNK, V), predicted * V)
    kept = activations(shape, tokens, size, config.lora_rank, config.recompute)
    out["phase: training, activations and logits"] = kept + max(logits, 0) + 3 * predicted * C * size
    out["phase: the teacher's forward pass"] = teacher_tokens * (4 * C + 4 * shape.intermediate_size) * size
    out["phase: checkpoint"] = (adapted * size if config.lora_rank else 0) + trained * 12
    return out


def plan(config: Config, gib: float) -> str:
    """A table for people. Raises UserError if the model's config.json cannot be read."""
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    parts = needs(config, ranks)
    phases = {name: size for name, size in parts.items() if name.startswith("phase: ")}
    always = sum(parts.values()) - sum(phases.values())
    peak = always + max(phases.values())
    lines = [f"per device, with rollouts of {config.max_new_tokens} tokens and prompts of {PROMPT}:"]
    lines += [f"  {name:44s} {size / GIB:8.2f} GiB" for name, size in parts.items()]
    fits = "fits" if 1.1 * peak <= gib * GIB else "does not fit"
    lines += [f"  {'peak: what stays and the largest phase':44s} {peak / GIB:8.2f} GiB: {fits} {gib:g} GiB with a tenth to spare"]
    if fits != "fits":
        lines.append("lower --micro-batch or --sample-batch, use --recompute, or --dtype bfloat16 with --lora-rank")
    return "\n".join(lines)
