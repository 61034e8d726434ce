"""Where things are sped up without changing them: packed weights, CUDA graphs.

    device  sampling, always                           with --compile, in addition
    cpu     adapters cast once, a large model packed   nothing, so it is refused
    cuda    adapters cast once                         the decode step and the loss as CUDA graphs

Every number stays the same to rounding. torch.compile traces the decode step and the loss, each as
a whole and for all sizes at once, and a backend of our own captures what was traced. PyTorch's
"cudagraphs" backend would copy all weights at every token and refuse a cache that is written in
place. Nothing is compiled with Triton.
"""
import gc
import sys
from collections.abc import Callable
from copy import deepcopy
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from sd import UserError
from sd.llm.lora import LoRALinear
from sd.llm.model import Cache, Transformer

SLOTS = 256             # a captured step reads cache slots up to the next multiple of this
GRAPHS = 8              # kept of each traced function; then all are dropped
ROWS = 32               # the loss is captured for this many rows, and for each larger power of two
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
    if not compile:
        return partial(next_logits, model, cache)
    step = partial(traced(next_logits), model, cache)
    most = cache.k[0].size(2)
    return lambda ids, positions, slots: step(ids, positions, min(slots + -slots % SLOTS, most))


@cache
def compiled(token_loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`losses.token_loss` as CUDA graphs, one per number of rows, for any number of tokens (m).

    Inputs are padded with zeros to a power of two, so that few sizes are captured. The padding is
    removed from the result and carries no gradient.
    """
    loss = traced(token_loss)

    def padded(kind, logits, target, ids, temperature, beta):
        m = len(ids)
        extra = max(ROWS, 2 ** (m - 1).bit_length()) - m
        inputs = []
        for x in (logits, target, ids):
            others = (0, 0) * (x.dim() - 1)
            inputs.append(F.pad(x, others + (0, extra)))
        return loss(kind, *inputs, temperature, beta)[:m]
    return padded


def traced(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function` through torch.compile: one trace without a break serves all sizes above 1."""
    sys.modules.setdefault("triton", None)      # makes `import triton` fail where it is installed
    # else a number such as RMSNorm's epsilon is an input: a tensor on the CPU
    torch._dynamo.config.specialize_float = True
    # else sizes that happen to be equal in the first call have to stay equal
    torch.fx.experimental._config.use_duck_shape = False
    return torch.compile(function, backend=cuda_graphs, fullgraph=True, dynamic=True)


def cuda_graphs(trace: GraphModule, examples: list) -> Callable[..., tuple[Tensor]]:
    """Our backend of torch.compile: CUDA graphs of what was traced, or without CUDA just that.

    A CUDA graph is one launch instead of hundreds, with its backward pass one more. It replays the
    same kernels on the same addresses, so there is one per size. While sampling it reads weights
    and cache where they are, and only ids and positions are copied in; once the weights or the
    cache have moved, another is captured. For the loss every tensor is copied.
    """
    if not any(isinstance(x, Tensor) and x.is_cuda for x in examples):
        return trace.forward
    copied = [i for i, x in enumerate(examples)
              if isinstance(x, Tensor) and (torch.is_grad_enabled() or not x.is_floating_point())]
    graphs = {}         # sizes and addresses -> a graph, as a function of what is copied

    def replay(*inputs):
        key = tuple(x.data_ptr() if isinstance(x, Tensor) else x
                    for i, x in enumerate(inputs) if i not in copied)
        new = [inputs[i] for i in copied]
        if key not in graphs:
            def function(*tensors):
                values = dict(enumerate(inputs)) | dict(zip(copied, tensors))
                return trace(*values.values())

            if len(graphs) == GRAPHS:
                graphs.clear()
                gc.collect()        # PyTorch keeps each in a circle of references
            buffers = tuple(x.detach().clone().requires_grad_(x.requires_grad) for x in new)
            graphs[key] = torch.cuda.make_graphed_callables(function, buffers)
        return graphs[key](*new)
    return replay
