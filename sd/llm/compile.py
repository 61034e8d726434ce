"""Where things are sped up without changing them: packed weights, CUDA graphs, a fused loss.

    device  sampling, always                           with --compile, in addition
    cpu     adapters cast once, a large model packed   nothing, so it is refused
    cuda    adapters cast once                         decode: CUDA graphs; loss: torch.compile

Every number stays the same to rounding. The loss goes through torch.compile's "cudagraphs" backend,
so nothing is compiled with Triton.

Simplified: that backend treats no input as static. For the decode step it would copy all weights at
every token and refuse a cache that is written in place. So the decode step is captured by hand,
anew in each sampling call.
"""
import math
import sys
from collections.abc import Callable
from copy import deepcopy
from functools import cache, partial

import torch
from torch import Tensor, nn

from sd import UserError
from sd.llm.lora import LoRALinear
from sd.llm.model import Cache, Transformer

SLOTS = 256             # a captured step reads cache slots up to the next multiple of this
ROWS = 32               # the loss is compiled for this many rows, and for each larger power of two
PACK_TOKENS = 16        # with fewer it does not pay: packing costs about two decode steps
PACK_WEIGHTS = 2 ** 23  # a smaller model stays in the CPU's cache, packed or not


def check_compile(device: torch.device) -> None:
    """Raises UserError if --compile has nothing to offer on this device."""
    if device.type != "cuda":
        raise UserError("--compile is for CUDA alone; leave it out, "
                        "on a CPU a large model is packed for speed without an option")


def prepared(model: Transformer, rows: int, tokens: int) -> Transformer:
    """The model that samples `rows` rollouts of up to `tokens` tokens fastest.

    It is the model itself or a copy. The copy shares every tensor except packed weights and
    adapters of another dtype, which are stale once the weights change.
    """
    weight = model.lm_head.weight
    parameters = list(model.parameters())
    size = sum(p.numel() for p in parameters)
    packs = tokens >= PACK_TOKENS and size >= PACK_WEIGHTS and can_pack(weight)
    if not packs and all(p.dtype == weight.dtype for p in parameters):
        return model
    # adapters are cast once and not at every token; all other tensors are shared
    cast = {id(p): nn.Parameter(p.detach().to(weight.dtype)) for p in parameters}
    twin = deepcopy(model, cast)
    if packs:
        for part in list(twin.modules()):
            for name, layer in part.named_children():
                if isinstance(layer, (nn.Linear, LoRALinear)):
                    setattr(part, name, Packed(layer, rows))
    return twin


def can_pack(weight: Tensor) -> bool:
    if weight.is_cuda or not torch.backends.mkldnn.is_available():
        return False
    return weight.dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


class Packed(nn.Module):
    """A linear layer with its weight in oneDNN's own layout: decoding few rows takes half as long.

    An adapter is merged into a float32 weight. A narrower type would round it away, so there it
    stays apart.
    """

    def __init__(self, layer: nn.Linear | LoRALinear, rows: int):
        super().__init__()
        weight = layer.weight.detach()
        self.bias = layer.bias
        self.adapter = None
        if isinstance(layer, LoRALinear) and layer.on:
            if weight.dtype == torch.float32:
                weight = layer.merged().detach()
            else:
                self.adapter = layer.adapter
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, rows)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return y + self.adapter(x) if self.adapter else y


def next_logits(model: Transformer, cache: Cache, ids: Tensor, positions: Tensor,
                slots: int) -> Tensor:
    """The decode step: each row's token (R) at its position (R) -> the next one's logits (R, V)."""
    hidden = model.hidden(ids.unsqueeze(-1), cache, positions, slots)       # (R, 1, C)
    return model.lm_head(hidden[:, -1])


def decode_step(model: Transformer, cache: Cache, compile: bool) -> Callable[..., Tensor]:
    """`next_logits` as a function of (ids, positions, slots), while the cache keeps its rows."""
    if compile:
        return Captured(model, cache)
    return partial(next_logits, model, cache)


class Captured:
    """The decode step as CUDA graphs: one launch per token instead of hundreds.

    A graph replays the same kernels on the same addresses, so it is valid for one number of slots.
    All graphs share their memory: a step's logits have been read before the next is replayed.
    """

    def __init__(self, model: Transformer, cache: Cache):
        self.model = model
        self.cache = cache
        rows, _, self.slots, _ = cache.k[0].shape
        self.ids = torch.zeros(rows, dtype=torch.long, device=cache.k[0].device)
        self.positions = torch.zeros_like(self.ids)
        self.graphs = {}        # number of slots -> graph and its logits
        self.pool = None

    def __call__(self, ids: Tensor, positions: Tensor, slots: int) -> Tensor:
        self.ids.copy_(ids)
        self.positions.copy_(positions)
        slots = min(math.ceil(slots / SLOTS) * SLOTS, self.slots)
        if slots not in self.graphs:
            self.graphs[slots] = self.capture(slots)
        graph, logits = self.graphs[slots]
        graph.replay()
        return logits

    def capture(self, slots: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        step = partial(next_logits, self.model, self.cache, self.ids, self.positions, slots)
        step()      # initialises libraries; that a slot is written twice does no harm
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, self.pool):
            logits = step()
        self.pool = graph.pool()
        return graph, logits


@cache
def compiled(token_loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`losses.token_loss` as one CUDA graph per number of rows, for any number of tokens (m).

    Inputs are padded with zeros to a power of two, so that few sizes are compiled. The padding is
    removed from the result and carries no gradient.
    """
    sys.modules.setdefault("triton", None)      # makes `import triton` fail where it is installed
    torch._dynamo.config.recompile_limit = 128  # powers of two, for each kind
    fused = torch.compile(token_loss, backend="cudagraphs", fullgraph=True, dynamic=False)

    def padded(kind, logits, target, ids, temperature, beta):
        m = len(ids)
        extra = max(ROWS, 2 ** math.ceil(math.log2(m))) - m
        inputs = []
        for x in (logits, target, ids):
            zeros = x.new_zeros(extra, *x.shape[1:])
            inputs.append(torch.cat([x, zeros]))
        return fused(kind, *inputs, temperature, beta)[:m]
    return padded
