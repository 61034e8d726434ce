"""LoRA by hand (Hu et al. 2021): y = W x + alpha/r B A x on every attention and MLP projection.

W is frozen. A and B are float32 over a base of any type: updates of 5e-6 vanish in bfloat16, whose
spacing near 0.02 is 1.2e-4. B starts as 0, so an adapter that is new, or switched off, leaves the
initial model as it is, bit for bit.
"""
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd.llm.checkpoint import save_tensors, write_json
from sd.llm.model import Transformer

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoRALinear(nn.Module):
    """A linear layer and its adapter; `weight` and `bias` keep their names in the checkpoint."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, generator: torch.Generator):
        super().__init__()
        self.weight = base.weight
        self.bias = base.bias
        self.scale = alpha / rank
        self.on = True
        bound = 1 / math.sqrt(base.in_features)         # PEFT's: kaiming_uniform with a = sqrt(5)
        A = torch.empty(rank, base.in_features).uniform_(-bound, bound, generator=generator)
        B = torch.zeros(base.out_features, rank)
        self.lora_A = nn.Parameter(A.to(base.weight.device))        # (r, in), float32
        self.lora_B = nn.Parameter(B.to(base.weight.device))        # (out, r), float32

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        return y + self.adapter(x) if self.on else y

    def adapter(self, x: Tensor) -> Tensor:
        inner = F.linear(x, self.lora_A.to(x.dtype))                # (…, r)
        return self.scale * F.linear(inner, self.lora_B.to(x.dtype))

    def merged(self) -> Tensor:
        """W + alpha/r B A in float32: in bfloat16 most weights would round back to W."""
        return self.weight.float() + self.scale * self.lora_B @ self.lora_A


def add_lora(model: Transformer, rank: int, alpha: float, seed: int) -> None:
    """Freezes the model and puts an adapter on each projection; only adapters train afterwards."""
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for part in list(model.modules()):
        for name, linear in part.named_children():
            if name in TARGETS:
                setattr(part, name, LoRALinear(linear, rank, alpha, generator))


def switch_off(model: Transformer) -> None:
    """Takes every adapter out of the computation; its weights stay where they are."""
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.on = False


def plain_weights(model: Transformer) -> dict[str, Tensor]:
    """Every parameter under its checkpoint name, adapters merged into the weights they adapt."""
    weights = {name: p.detach() for name, p in model.named_parameters() if ".lora_" not in name}
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            weights[f"{name}.weight"] = module.merged().detach()
    return weights


def save_adapter(folder: Path, model: Transformer, base: str) -> None:
    """Writes FOLDER/adapter/ as PEFT reads it; nothing if there is no adapter.

    It has a folder of its own: beside the merged weights, transformers would add it to them again.
    """
    adapted = [module for module in model.modules() if isinstance(module, LoRALinear)]
    if not adapted:
        return
    folder = folder / "adapter"
    rank = adapted[0].lora_A.size(0)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": adapted[0].scale * rank,
        "target_modules": TARGETS,
    }
    write_json(folder / "adapter_config.json", config)
    tensors = {f"base_model.model.{name}.weight": p.detach().cpu()
               for name, p in model.named_parameters() if ".lora_" in name}
    save_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
