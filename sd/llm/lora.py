"""LoRA by hand (Hu et al. 2021): y = W x + alpha/r B A x on every attention and MLP projection, W frozen.

A and B are float32 over a base of any type: updates of 5e-6 vanish in bfloat16, whose spacing near 0.02 is
1.2e-4. B starts as 0, so an adapter that is new, or switched off, is the initial policy bit for bit: the
paper's self-teacher.
"""
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from sd.llm.checkpoint import atomic, write_atomic
from sd.llm.model import Transformer

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoRALinear(nn.Module):
    """A frozen nn.Linear and its adapter; `weight` and `bias` keep their names in the checkpoint."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, source: torch.Generator):
        super().__init__()
        self.weight, self.bias = base.weight.requires_grad_(False), base.bias
        if base.bias is not None:
            base.bias.requires_grad_(False)
        bound = 1 / math.sqrt(base.in_features)         # PEFT's: kaiming_uniform with a = sqrt(5)
        down = torch.empty(rank, base.in_features).uniform_(-bound, bound, generator=source)
        self.lora_A = nn.Parameter(down.to(base.weight.device))                 # (r, in), float32
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank,
                                               device=base.weight.device))      # (out, r), float32
        self.scale, self.on = alpha / rank, True

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        return y + self.adapter(x) if self.on else y

    def adapter(self, x: Tensor) -> Tensor:
        return self.scale * F.linear(F.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))

    def merged(self) -> Tensor:
        """W + alpha/r B A in float32: in bfloat16 most weights would round back to what they were."""
        return self.weight.float() + self.scale * self.lora_B @ self.lora_A


def add_lora(model: Transformer, rank: int, alpha: float, seed: int) -> None:
    """Freezes the model and puts an adapter on each projection; the only parameters that train afterwards."""
    model.requires_grad_(False)
    source = torch.Generator().manual_seed(seed)
    for block in model.model.layers:
        for part in (block.self_attn, block.mlp):
            for name in TARGETS:
                if hasattr(part, name):
                    setattr(part, name, LoRALinear(getattr(part, name), rank, alpha, source))


def switch(model: Transformer, on: bool) -> None:
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.on = on


def plain_weights(model: Transformer) -> dict[str, Tensor]:
    """Every parameter under its checkpoint name, adapters merged into the weights they adapt."""
    merged = {f"{name}.weight": module.merged()
              for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    return {name: merged.get(name, p.detach())
            for name, p in model.named_parameters() if ".lora_" not in name}


def save_adapter(folder: Path, model: Transformer, base: str) -> None:
    """Writes FOLDER/adapter/ as PEFT reads it; nothing if there is no adapter.

    In a folder of its own: beside merged weights transformers would put it on top of them, a second time.
    """
    adapted = [module for module in model.modules() if isinstance(module, LoRALinear)]
    if not adapted:
        return
    rank, folder = adapted[0].lora_A.size(0), folder / "adapter"
    write_atomic(folder / "adapter_config.json", json.dumps({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": rank,
        "lora_alpha": adapted[0].scale * rank, "lora_dropout": 0.0, "bias": "none",
        "target_modules": list(TARGETS), "inference_mode": True}, indent=1) + "\n")
    tensors = {f"base_model.model.{name}.weight": p.detach().cpu().contiguous()
               for name, p in model.named_parameters() if ".lora_" in name}
    with atomic(folder / "adapter_model.safetensors") as temporary:
        save_file(tensors, temporary, {"format": "pt"})
