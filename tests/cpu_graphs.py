"""CUDA graphs that a CPU records and replays, so that the path of --compile runs without a GPU."""
import weakref
from contextlib import ExitStack, contextmanager, nullcontext
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import sd.llm.compile

WAITING = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)


class CpuGraph:
    """A CUDA graph on a CPU: it records operations with their tensors, and replays these at these addresses."""

    def __init__(self):
        self.calls = []

    def replay(self):
        for function, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(function(*args, **kwargs))):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Capturing(TorchDispatchMode):
    """torch.cuda.graph"""

    def __init__(self, graph, pool):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function not in WAITING
        out = function(*args, **(kwargs or {}))
        bare = lambda t: t.detach() if isinstance(t, torch.Tensor) else t
        self.graph.calls.append(tree_map(bare, (function, args, kwargs or {}, out)))
        return out


@contextmanager
def cpu_graphs():
    """While it is open, the path of CUDA on a CPU; yields weak references to all graphs that are captured."""
    made, backend = [], sd.llm.compile.cuda_graphs

    def graph():
        made.append(weakref.ref(one := CpuGraph()))
        return one

    def as_on_cuda(trace, examples):
        with FakeTensorMode():
            return backend(trace, [torch.empty(x.shape, dtype=x.dtype, device="cuda")
                                   if isinstance(x, torch.Tensor) else x for x in examples])
    with ExitStack() as stack:
        for owner, name, stand_in in ((sd.llm.compile, "cuda_graphs", as_on_cuda),
                                      (torch.cuda, "CUDAGraph", graph),
                                      (torch.cuda, "graph", Capturing),
                                      (torch.cuda.graphs, "graph_pool_handle", lambda: (0, 0)),
                                      (torch.cuda, "synchronize", lambda: None),
                                      (torch.cuda, "Stream", lambda: None),
                                      (torch.cuda, "stream", lambda stream: nullcontext())):
            stack.enter_context(patch.object(owner, name, stand_in))
        yield made
