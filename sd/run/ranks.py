"""More than one process: `torchrun --nproc-per-node N train.py …` splits a batch over N ranks.

Plain data parallelism over collective operations, no wrapper around the model: every rank holds the
same weights, samples and scores its share of the problems, gradients are summed, and every rank
takes the same step. Random numbers are made per rollout (`sampling.uniforms`), so N ranks train on
the same rollouts as one process would, but for rounding (see sampling.py). Only rank 0 writes files
and progress. Without torchrun all of this does nothing. Rows travel between ranks as JSON: no
pickle.
"""
import json
import os
from datetime import timedelta

import torch
import torch.distributed as dist

from sd import UserError

MEET = timedelta(minutes=2)     # all ranks begin within it, or their launcher is gone
WAIT = timedelta(hours=2)       # a rank may wait for another's longest rollouts, or its critic


class RankLost(UserError):
    """Another process of this run has ended; that one says why."""


class Ranks:
    def __init__(self, device: torch.device):
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        if self.world > 1:
            # small tensors stay on the CPU for gloo, which notices at once when a rank ends
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            self._run(dist.init_process_group, backend, timeout=MEET)
            self.group = dist.new_group(backend=backend, timeout=WAIT)

    def share(self, count: int) -> slice:
        """This rank's part of `count` items, in order; the parts' sizes differ by at most one."""
        return slice(self.rank * count // self.world, (self.rank + 1) * count // self.world)

    def total(self, number: float) -> float:
        """The sum over all ranks, in float64."""
        if self.world == 1:
            return number
        tensor = torch.tensor(number, dtype=torch.float64)
        self._run(dist.all_reduce, tensor, group=self.group)
        return tensor.item()

    def gather(self, rows: list) -> list:
        """All ranks' lists, joined in rank order, on every rank."""
        if self.world == 1:
            return rows
        mine = torch.tensor(list(json.dumps(rows).encode()), dtype=torch.uint8)
        joined = []
        for rank in range(self.world):
            size = self.total(len(mine) if rank == self.rank else 0)
            data = mine if rank == self.rank else mine.new_empty(int(size))
            self._run(dist.broadcast, data, rank, group=self.group)
            joined += json.loads(bytes(data.tolist()))
        return joined

    def sum_gradients(self, parameters: list[torch.nn.Parameter]) -> None:
        """Sums all ranks' gradients in place; if none has any, they stay None: AdamW then idles."""
        if self.world == 1 or not self.total(sum(p.grad is not None for p in parameters)):
            return
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            self._run(dist.all_reduce, p.grad, group=self.group)

    def close(self) -> None:
        if self.world > 1:
            dist.destroy_process_group()

    def _run(self, operation, *arguments, **options) -> None:
        try:
            operation(*arguments, **options)
        except RuntimeError as error:       # the only type that gloo and NCCL raise
            raise RankLost(f"another process of this run has ended ({str(error)[:200]})") from None
