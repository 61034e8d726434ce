"""More than one process: `torchrun --nproc-per-node N train.py …` splits a batch's rollouts over N ranks.

Plain data parallelism over collective operations, no wrapper around the model: every rank holds the same
weights, samples and scores its share of the problems, gradients are summed, and every rank takes the same
step. Since random numbers are made per rollout (`sampling.uniforms`), N ranks train on the same rollouts as
one process would. Rank 0 alone writes and prints. Without torchrun all of this does nothing. Rows travel
between ranks as JSON: no pickle.
"""
import json
import os
from datetime import timedelta

import torch
import torch.distributed as dist

WAIT = timedelta(hours=2)           # a rank may wait for another's longest rollouts, or for its critic


class Lost(Exception):
    """Another rank has ended, and prints the reason itself."""


class Ranks:
    def __init__(self, device: torch.device):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = device
        if self.world > 1:
            # small tensors stay on the CPU, for gloo: it notices at once when a rank ends, NCCL does not
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=WAIT)

    def share(self, count: int) -> slice:
        """This rank's part of `count` items, in order; the parts' sizes differ by at most one."""
        return slice(self.rank * count // self.world, (self.rank + 1) * count // self.world)

    def total(self, number: float) -> float:
        if self.world == 1:
            return number
        tensor = torch.tensor(number, dtype=torch.float64)
        self._all(dist.all_reduce, tensor)
        return tensor.item()

    def gather(self, rows: list) -> list:
        """All ranks' lists, joined in rank order, on every rank."""
        if self.world == 1:
            return rows
        data = torch.tensor(list(json.dumps(rows).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.long) for _ in range(self.world)]
        self._all(dist.all_gather, sizes, torch.tensor([len(data)]))
        padded = data.new_zeros(int(max(sizes)))
        padded[:len(data)] = data
        parts = [torch.empty_like(padded) for _ in sizes]
        self._all(dist.all_gather, parts, padded)
        return [row for part, size in zip(parts, sizes)
                for row in json.loads(bytes(part[:int(size)].tolist()))]

    def sum_gradients(self, parameters: list[torch.nn.Parameter]) -> None:
        """Sums all ranks' gradients in one buffer. If no rank has any, all stay None: AdamW does nothing."""
        if self.world == 1 or not self.total(sum(p.grad is not None for p in parameters)):
            return
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        flat = torch.cat([p.grad.flatten() for p in parameters])
        self._all(dist.all_reduce, flat)
        for p, grad in zip(parameters, flat.split([p.numel() for p in parameters])):
            p.grad.copy_(grad.view_as(p))

    def first_to_tell(self, message: str) -> bool:
        """Whether no rank has reported this yet: an error that all of them find is printed once."""
        try:
            return self.world == 1 or dist.distributed_c10d._get_default_store().add(message, 1) == 1
        except RuntimeError:                # the rank that holds the store has ended
            return True

    def _all(self, operation, *tensors) -> None:
        try:
            operation(*tensors)
        except RuntimeError as error:       # the only type that gloo and NCCL raise
            raise Lost(f"another process of this run has ended ({str(error)[:200]})") from None

    def close(self) -> None:
        if self.world > 1:
            dist.destroy_process_group()
