"""The one place that speeds things up without changing them: packed weights, captured decoding, a fused loss.

    device  without --compile                            with --compile, in addition
    cpu     sampling: a large model packed for oneDNN    decode step and loss: inductor's C++ (needs g++)
    cuda    unchanged                                    decode: a CUDA graph; loss: torch.compile, cudagraphs

Every number stays the same to rounding. Shapes that vary between calls are symbolic on a CPU, where compiling
is slow and symbolic shapes cost nothing at run time; on CUDA they are rounded up to a few sizes. Nothing is
compiled with Triton.

Simplified: torch's own "cudagraphs" backend treats no input as static: it would copy all weights at every
token and refuse a cache written in place. So the decode step is captured by hand, anew in each sampling call.
"""
import itertools
import math
import shutil
import sys
from collections.abc import Callable
from copy import copy
from functools import cache
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, library, nn

from sd import UserError
from sd.llm.lora import LoRALinear
from sd.llm.model import Cache, Transformer

SLOTS = 256             # a captured step reads cache slots up to the next multiple of this
PACK_TOKENS = 16        # with fewer, packing does not pay: it costs about as much as two decode steps
PACK_WEIGHTS = 2 ** 23  # a smaller model stays in the CPU's cache, packed or not

Step = Callable[[Tensor, Tensor, int], Tensor]      # ids (B), positions (B), slots in use -> logits (B, V)


def check_compile(device: torch.device) -> None:
    """Raises UserError if --compile cannot work here."""
    if device.type == "cpu" and not shutil.which("g++"):
        raise UserError("--compile needs a C++ compiler on a CPU, and there is no g++; "
                        "install one or leave it out")


def next_logits(model: Transformer, ids: Tensor, cache: Cache, positions: Tensor, slots: int) -> Tensor:
    """The decode step: each row's token (B), at its position (B) -> logits (B, V) of the next token."""
    return model.lm_head(model.hidden(ids.unsqueeze(-1), cache, positions, slots)[:, -1])


def prepared(model: Transformer, rows: int, tokens: int) -> Transformer:
    """The model, with weights laid out to sample `rows` rollouts of up to `tokens` tokens fastest."""
    weight, fast = model.lm_head.weight, narrowed(model)
    pays = tokens >= PACK_TOKENS and sum(p.numel() for p in model.parameters()) >= PACK_WEIGHTS
    works = not weight.is_cuda and torch.backends.mkldnn.is_available() and (
        weight.dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return packed(fast, rows) if pays and works else fast


def decoder(model: Transformer, cache: Cache, compile: bool) -> Step:
    """`next_logits` of one sampling call, as fast as this device allows."""
    if compile and cache.k[0].is_cuda:
        return Captured(model, cache)
    NUMBERED.update((part.number, part.weight) for part in model.modules() if isinstance(part, Packed))
    step = inductor(next_logits) if compile else next_logits
    return lambda ids, positions, slots: step(model, ids, cache, positions, slots)


def narrowed(model: Transformer) -> Transformer:
    """A copy that shares all but its adapters, which take the weights' dtype: cast once, not per token."""
    kind = model.lm_head.weight.dtype

    def cast(module: nn.Module) -> nn.Module | None:
        if not isinstance(module, LoRALinear):
            return None
        module = copy(module)
        module._parameters = {name: p if p is None else nn.Parameter(p.detach().to(kind), requires_grad=False)
                              for name, p in module._parameters.items()}
        return module
    return model if all(p.dtype == kind for p in model.parameters()) else with_replaced(model, cast)


def with_replaced(module: nn.Module, replacement: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    """A copy of a module tree, sharing every tensor, with `replacement(part)` for each part, unless None."""
    twin = copy(module)
    twin._modules = {name: replacement(part) or with_replaced(part, replacement)
                     for name, part in module._modules.items()}
    return twin


class Packed(nn.Module):
    """An nn.Linear whose weight is in oneDNN's own layout: a decode step with few rows takes half as long.

    torch.compile cannot handle such a tensor: compiled code refers to it by number, the same in every call.
    """

    def __init__(self, linear: nn.Linear | LoRALinear, rows: int, number: int):
        super().__init__()
        weight, adapted = linear.weight.detach(), isinstance(linear, LoRALinear) and linear.on
        merges = adapted and weight.dtype == torch.float32      # a narrower type would round the adapter away
        self.adapter = linear.adapter if adapted and not merges else None
        weight = linear.merged().detach() if merges else weight
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        self.number, self.out, self.bias = number, weight.size(0), linear.bias

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            y = torch.ops.sd.numbered_linear(x, self.number, self.out, self.bias)
        else:
            y = packed_linear(x, self.weight, self.bias)
        return y if self.adapter is None else y + self.adapter(x)


def packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


NUMBERED: WeakValueDictionary[int, Tensor] = WeakValueDictionary()      # the current sampling call's weights
OPERATORS = library.Library("sd", "DEF")
OPERATORS.define("numbered_linear(Tensor x, int number, int out, Tensor? bias) -> Tensor")
OPERATORS.impl("numbered_linear",
               lambda x, number, out, bias: packed_linear(x, NUMBERED[number], bias), "CPU")
library.register_fake("sd::numbered_linear", lambda x, number, out, bias: x.new_empty(*x.shape[:-1], out))


def packed(model: Transformer, rows: int) -> Transformer:
    """A copy that shares all but the packed weights with the model; stale after the next optimiser step."""
    numbers = itertools.count()
    return with_replaced(model, lambda part: Packed(part, rows, next(numbers))
                   if isinstance(part, (nn.Linear, LoRALinear)) else None)


class Captured:
    """The decode step as CUDA graphs: one launch per token instead of hundreds.

    A graph replays the same kernels on the same addresses, so it is valid for one number of rows and slots.
    """

    def __init__(self, model: Transformer, cache: Cache):
        self.model, self.cache, self.rows, self.graphs = model, cache, 0, {}

    def __call__(self, ids: Tensor, positions: Tensor, slots: int) -> Tensor:
        slots = min(-(-slots // SLOTS) * SLOTS, self.cache.k[0].size(2))
        if len(ids) != self.rows:               # finished rows were dropped: the cache has moved
            self.rows, self.graphs, self.ids, self.positions = len(ids), {}, ids.clone(), positions.clone()
        self.ids.copy_(ids)
        self.positions.copy_(positions)
        if slots not in self.graphs:
            self.graphs[slots] = self.capture(slots)
        graph, logits = self.graphs[slots]
        graph.replay()
        return logits

    def capture(self, slots: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """Runs the step once beforehand, to initialise libraries; writing its slot twice does no harm.

        All graphs share their memory: a step's logits have been read before the next is replayed.
        """
        next_logits(self.model, self.ids, self.cache, self.positions, slots)
        graph, before = torch.cuda.CUDAGraph(), [graph.pool() for graph, _ in self.graphs.values()]
        with torch.cuda.graph(graph, pool=before[0] if before else None):
            logits = next_logits(self.model, self.ids, self.cache, self.positions, slots)
        return graph, logits


@cache
def inductor(function: Callable) -> Callable:
    """torch.compile for a CPU, once for all shapes."""
    sys.modules.setdefault("triton", None)      # makes `import triton` fail, so that inductor cannot use it
    return torch.compile(function, backend="inductor", fullgraph=True, dynamic=True)


@cache
def fused(loss: Callable[[Tensor, Tensor, Tensor], Tensor],
          device: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A per-token loss with its passes over (m, V) fused into one: inputs of m rows each -> (m).

    On CUDA each number of rows is compiled separately, so it is rounded up to a power of two, at least 32; on
    a CPU only a single row would be a case of its own.
    """
    if device == "cpu":
        return padded(inductor(loss), lambda rows: max(rows, 2))
    sys.modules.setdefault("triton", None)
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)  # the powers of two
    return padded(torch.compile(loss, backend="cudagraphs", fullgraph=True, dynamic=False),
                  lambda rows: max(32, 2 ** math.ceil(math.log2(rows))))


def padded(loss: Callable[..., Tensor], size: Callable[[int], int]) -> Callable[..., Tensor]:
    """`loss` on inputs padded to `size(rows)` rows; the padding carries no gradient."""
    def rounded_up(*inputs: Tensor) -> Tensor:
        rows = len(inputs[0])
        extra = size(rows) - rows
        wide = [F.pad(x, (0, 0) * (x.dim() - 1) + (0, extra)) for x in inputs]
        return loss(*wide)[:rows]
    return rounded_up
