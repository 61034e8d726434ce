"""Batched sampling with a key/value cache: prompts in, token ids and their log-probabilities out.

Prompts are padded on the right, like everything here. A row's next token goes to its own position,
over the pads of its prompt, and slots beyond a row's position are masked, so no pad is ever seen. A
prompt that is sampled several times (a GRPO group, Avg@k) is prefilled once. Every few tokens the
rows that have reached EOS are dropped, so that a few long rollouts do not cost as much as a batch.
Only temperature shapes the distribution: top-p and top-k would bias the log-probabilities that the
loss relies on.

All randomness is one uniform number per rollout and token, drawn beforehand from a seed. A rollout
therefore does not depend on the others in its batch, on the number of processes or on the device,
except for rounding. With a small vocabulary in float32 that is never seen. With 49,152 tokens, one
rollout in ten parts ways with itself in a batch of another size: rounding shifts the cumulative
distribution, and so the borders of all tokens. A resumed run needs no generator state.

Letters: P prompts, N = P * group rollouts, R rows of the shrinking batch, T = max_new_tokens, V
vocabulary.
"""
import random
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sd.llm.compile import decode_step, prepared
from sd.llm.model import Cache, Transformer

CHECK_EVERY = 8     # tokens until finished rows are looked for again, which waits for the device


class Sampled(NamedTuple):
    """N completions, padded on the right with 0; row i continues prompt i // group."""
    ids: Tensor         # (N, T)
    lengths: Tensor     # (N) tokens, EOS included
    logprobs: Tensor    # (N, T) at the sampling temperature, float32
    truncated: Tensor   # (N) bool: ran out of tokens without EOS

    def completions(self) -> list[list[int]]:
        return [row[:n] for row, n in zip(self.ids.tolist(), self.lengths.tolist())]


def pad(sequences: list[list[int]], device: torch.device) -> Tensor:
    """Right-pads with 0 to (N, longest). The lengths, never the pad id, say what is real."""
    width = max(map(len, sequences))
    return torch.tensor([s + [0] * (width - len(s)) for s in sequences], device=device)


def uniforms(rows: int, tokens: int, seed: int, *purpose) -> Tensor:
    """Uniform in [0, 1): (rows, tokens), float64, on the CPU; one stream per (seed, purpose)."""
    name = " ".join(map(str, (seed, *purpose)))
    bits = random.Random(name).getrandbits(63)
    generator = torch.Generator().manual_seed(bits)
    return torch.rand(rows, tokens, generator=generator, dtype=torch.float64)


def draw(logits: Tensor, temperature: float, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Samples from softmax(logits / temperature) (R, V): ids (R) and log-probabilities (R).

    It inverts the cumulative distribution at `uniform` (R), without waiting for the device. In
    float64: in float32 the sum over a large vocabulary would round its rare tokens away.
    Temperature 0 means greedy.
    """
    probs = F.softmax(logits.float() / (temperature or 1.0), dim=-1)        # (R, V)
    if temperature == 0:
        ids = probs.argmax(-1)
    else:
        cumulative = probs.cumsum(-1, dtype=torch.float64)                  # (R, V)
        target = uniform.unsqueeze(-1) * cumulative[:, -1:]                 # (R, 1)
        ids = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
        ids = ids.clamp(max=logits.size(-1) - 1)    # NaN gets there; logprobs will show it
    return ids, probs.gather(-1, ids.unsqueeze(-1)).squeeze(-1).log()


@torch.inference_mode()
def sample(model: Transformer, prompts: list[list[int]], eos: tuple[int, ...],
           max_new_tokens: int, temperature: float = 1.0, group: int = 1,
           noise: Tensor | None = None, compile: bool = False) -> Sampled:
    """Samples `group` completions of each prompt, up to and including EOS or T tokens.

    `noise` (N, T) are numbers from `uniforms`; None stands for those of seed 0.
    """
    N = len(prompts) * group
    if noise is None:
        noise = uniforms(N, max_new_tokens, 0)
    model = prepared(model, N, max_new_tokens)
    logits, positions, cache = prefill(model, prompts, group, max_new_tokens)
    noise = noise.to(logits.device)
    with torch.device(logits.device):
        out = Sampled(
            ids=torch.zeros(N, max_new_tokens, dtype=torch.long),
            lengths=torch.zeros(N, dtype=torch.long),
            logprobs=torch.zeros(N, max_new_tokens),
            truncated=torch.ones(N, dtype=torch.bool),
        )
        rows = torch.arange(N)              # (R) which rollout each row of the batch is
        ends = torch.tensor(eos)
    step = decode_step(model, cache, compile)
    slots = max(map(len, prompts))
    for t in range(max_new_tokens):
        ids, logprobs = draw(logits, temperature, noise[rows, t])
        going = out.truncated[rows]         # (R); a finished row samples on until it is dropped
        out.ids[rows, t] = ids * going
        out.logprobs[rows, t] = logprobs * going
        out.lengths[rows] += going
        going &= ~torch.isin(ids, ends)
        out.truncated[rows] = going
        if t == max_new_tokens - 1:
            break
        if (t + 1) % CHECK_EVERY == 0:
            keep = going.nonzero().squeeze(-1)
            if len(keep) == 0:
                break
            if len(keep) <= 0.75 * len(rows):   # copying the cache must save more than it costs
                cache.select(keep)
                rows, ids, positions = rows[keep], ids[keep], positions[keep]
                step = decode_step(model, cache, compile)
        slots += 1
        logits = step(ids, positions, slots)        # (R, V)
        positions += 1
    return out


def prefill(model: Transformer, prompts: list[list[int]], group: int,
            max_new_tokens: int) -> tuple[Tensor, Tensor, Cache]:
    """Reads each prompt once: the first token's logits (N, V) and position (N), the cache."""
    weight = model.model.embed_tokens.weight
    ids = pad(prompts, weight.device)                                       # (P, longest)
    lengths = torch.tensor([len(p) for p in prompts], device=ids.device)    # (P)
    cache = Cache(model.config, len(prompts), ids.size(1) + max_new_tokens, weight)
    hidden = model.hidden(ids, cache)                                       # (P, longest, C)
    each = torch.arange(len(prompts), device=ids.device)
    logits = model.lm_head(hidden[each, lengths - 1])                       # (P, V)
    repeated = each.repeat_interleave(group)                                # (N)
    if group > 1:
        cache.select(repeated)
    return logits[repeated], lengths[repeated], cache
