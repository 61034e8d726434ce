"""The memory that a configuration needs per device, from config.json alone: nothing is loaded.

    python -m tests.plan --preset paper --cond critique --model Qwen3-1.7B --device cuda --gib 24

It takes the options of train.py. Only one phase of a step is live at a time: the peak is what always
stays plus the largest phase. Assumed: prompts of PROMPT tokens, contexts and solutions as long as a
rollout, rollouts of --max-new-tokens, and evaluations that fill --sample-batch. The teacher's pass
needs less than the student's. With --compile on CUDA, all CUDA graphs stay that compile.py keeps.
test_plan.py compares with what runs on a CPU took; nobody has compared it with a GPU, as tests.gpu
does on one.

Simplified: left out are what an allocator wastes (leave a tenth free), weights that are packed on a
CPU, and the gradient of the output projection while it is added to the others.
"""
import os
import sys
from pathlib import Path

import torch

from sd import command
from sd.conditions import CHUNK
from sd.config import Config, parse_config
from sd.llm.checkpoint import read_config
from sd.llm.compile import GRAPHS, ROWS
from sd.llm.lora import add_lora
from sd.llm.model import ModelConfig, Transformer
from sd.problems import EMBEDDED

GIB = 2 ** 30
PROMPT, SCRIBE = 256, 500       # tokens of a problem with its instruction; of the critic's rules
# float32 tensors of the logits' size that are alive at once
ALIVE = {"forward": 7, "reverse": 7, "jsd": 13, "sampled": 5, "grpo": 3}
RUNTIME = {"cpu": 0.31 * GIB, "cuda": 0.7 * GIB}        # Python and PyTorch; the CUDA context
SEGMENT = 20 * 2 ** 20      # the allocator's least for a graph's logits
# cuBLAS's, on each of the 32 streams that PyTorch captures on in turn: on a Hopper; elsewhere 8 MiB
WORKSPACES = 32 * 32 * 2 ** 20


def count(shape: ModelConfig, rank: int = 0) -> tuple[int, int]:
    """How many weights a model has, and how many are trained: all of them, or its adapter's."""
    with torch.device("meta"):          # shapes without memory
        model = Transformer(shape)
        total = sum(p.numel() for p in model.parameters())
        if rank:
            add_lora(model, rank, 1.0, 0)
    return total, sum(p.numel() for p in model.parameters() if p.requires_grad)


def sampling(shape: ModelConfig, rows: int, prompt: int, new: int, size: int) -> float:
    """Bytes: the cache, and the largest of copying a layer of it, prefill, and a draw."""
    layer = 2 * rows * (prompt + new) * shape.num_key_value_heads * shape.head_dim * size
    prefill = 3 * rows * prompt * (shape.hidden_size + shape.intermediate_size) * size
    draw = rows * shape.vocab_size * (size + 20)        # logits; probabilities and sums in float64
    return layer * shape.num_hidden_layers + max(layer / 2, prefill, draw)


def layer_bytes(shape: ModelConfig, size: int, rank: int) -> int:
    """What a layer keeps of a token for the backward pass: each norm's input in float32 and its
    output (before the norm's weight too, if that is trained), q, k and v as attention reads them,
    q and k before their norm, the attention's output, and four of the MLP."""
    heads = (shape.num_attention_heads + shape.num_key_value_heads) * shape.head_dim
    norm = 4 + (size if rank else 2 * size)
    kept = 2 * shape.hidden_size * norm + heads * (norm - size) * shape.qk_norm
    return kept + (2 * heads + 4 * shape.intermediate_size + 7 * rank) * size


def step_graphs(shape: ModelConfig, rows: int, size: int) -> float:
    """Bytes of a model's captured decode steps: each keeps its logits, and works beside them."""
    beside = 4 * rows * (shape.hidden_size + shape.intermediate_size) * size
    return GRAPHS * (max(SEGMENT, rows * shape.vocab_size * size) + beside)


def loss_graphs(shape: ModelConfig, tokens: int, alive: int, size: int) -> float:
    """Bytes of the captured losses, of ROWS rows and each larger power of two up to `tokens`: copies of both
    models' logits (grpo has one's) and a gradient, and the float32 tensors that are alive within."""
    rows = ROWS
    while rows < tokens:
        rows *= 2
    captured = 2 * rows - ROWS                  # ROWS + 2 ROWS + … + rows
    copies = 2 if alive == ALIVE["grpo"] else 3
    return captured * shape.vocab_size * (copies * size + 4 * alive)


def needs(config: Config, ranks: int = 1) -> tuple[dict[str, float], dict[str, float]]:
    """Bytes per device: of what stays, and of each phase of a step with a flag that lowers it."""
    shape = read_config(Path(config.model or EMBEDDED))
    rank, new, size = config.lora_rank, config.max_new_tokens, config.torch_dtype.itemsize
    total, trained = count(shape, rank)
    device = config.device.split(":")[0] or config.torch_device.type    # cuda need not be here
    stays = {"weights": total * size, "runtime": RUNTIME[device]}
    stays["gradients, moments, adapter"] = 16 * trained if rank else 12 * trained
    if config.cond != "grpo" and (config.teacher == "ema" or config.teacher == "base" and not rank):
        stays["self-teacher"] = 4 * trained                             # frozen weights are shared

    rows = max(config.sample_batch, config.rollouts_per_problem, config.eval_samples)
    graphs = WORKSPACES + step_graphs(shape, rows, size)
    phases = {"sampling (--sample-batch)": sampling(shape, rows, PROMPT, new, size)}
    rollouts = -(-config.batch // ranks) * config.rollouts_per_problem
    if config.cond == "critique" and config.critic != "symbolic" and "://" not in config.critic:
        critic = shape if config.critic == "self" else read_config(Path(config.critic))
        if config.critic != "self" or not rank and config.teacher != "base":
            stays["critic"] = count(critic)[0] * size
        read = SCRIBE + PROMPT + 2 * new
        rows = min(max(1, config.sample_batch // 4), rollouts)
        cache = sampling(critic, rows, read, config.critic_tokens, size)
        phases["critic (--critic-tokens)"] = cache
        graphs += step_graphs(critic, rows, size)

    rows, width = min(config.micro_batch, rollouts), shape.hidden_size * size
    kept, backward = layer_bytes(shape, size, rank), 2 * shape.intermediate_size * size
    if config.recompute:
        kept, backward = width, backward + kept
    alive = ALIVE["grpo" if config.cond == "grpo" else config.divergence]
    at_once = min(max(1, CHUNK // shape.vocab_size), rows * new)
    logits = at_once * shape.vocab_size
    if config.compile and device == "cuda":
        stays["CUDA graphs (--compile)"] = graphs + loss_graphs(shape, at_once, alive, size)
        logits *= 6 * size                      # both models' and a gradient, each padded, too
    else:
        logits *= 4 * alive
    tokens = rows * (PROMPT + new)
    kept *= tokens * shape.num_hidden_layers
    phases["training (--micro-batch)"] = kept + max(logits, backward * tokens)
    if device == "cuda":
        phases["optimiser"] = 4 * trained       # of all weights at once
    phases["saving"] = 4 * total                # merged weights
    if not rank:                                # the state, which goes from a GPU piece by piece
        phases["saving"] = 12 * trained if device == "cpu" else 0
    return stays, phases


def plan(config: Config, gib: float) -> str:
    """A table for people. Raises UserError if there is no readable config.json."""
    stays, phases = needs(config, int(os.environ.get("WORLD_SIZE", 1)))
    peak = sum(stays.values()) + max(phases.values())
    lines = [f"per device, with {config.max_new_tokens} new tokens after prompts of {PROMPT}:"]
    for name, size in (stays | phases | {"peak: all but the smaller phases": peak}).items():
        lines.append(f"  {name:32s} {size / GIB:8.2f} GiB")
    verdict = "fits" if 1.1 * peak <= gib * GIB else "does not fit"
    return "\n".join(lines) + f": {verdict} {gib:g} GiB, a tenth kept free"


@command("tests.plan", __doc__)
def main(parser) -> None:
    parser.add_argument("--gib", type=float, default=24.0,
                        help="the device's memory (default: 24)")
    config, args = parse_config(parser)
    print(plan(config, args.gib))


if __name__ == "__main__":
    sys.exit(main())
