"""Batched sampling with a key/value cache: prompts in, token ids and their log-probabilities out.

Prompts are padded on the right, like everything here: a row's next token goes to its own position, over the
pads of its prompt, and slots beyond a row's position are masked, so no pad is ever seen. A prompt that is
sampled several times (a GRPO group, Avg@k) is prefilled once. Rows that reached EOS are dropped from the
batch now and then, so a short rollout does not wait for a long one at full cost. Only temperature shapes the
distribution: top-p and top-k would bias the log-probabilities that the loss relies on.

All randomness is one uniform number per rollout and token, drawn beforehand from a seed. So a rollout does
not depend on which others share its batch, on the number of processes, or on the device, but for rounding (in
bfloat16 that is coarse: some rollouts in a hundred then part ways); a resumed run needs no generator state.
"""
import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sd.llm.compile import decoder, prepared
from sd.llm.model import Cache, Transformer

CHECK_EVERY = 8     # tokens between two looks at which rows are finished: each look waits for the device


@dataclass
class Rollouts:
    """N completions, right-padded to T tokens; row i continues prompt i // group."""
    ids: Tensor         # (N, T)
    lengths: Tensor     # (N) tokens, EOS included
    logprobs: Tensor    # (N, T) at the sampling temperature, float32, 0 on the padding
    truncated: Tensor   # (N) bool: ran out of tokens without EOS

    def completions(self) -> list[list[int]]:
        return [row[:n] for row, n in zip(self.ids.tolist(), self.lengths.tolist())]


def pad(sequences: list[list[int]], device: torch.device) -> Tensor:
    """Right-pads with 0 to (N, longest). The lengths, never the pad id, say what is real."""
    width = max(map(len, sequences))
    return torch.tensor([s + [0] * (width - len(s)) for s in sequences], device=device)


def uniforms(rows: int, tokens: int, seed: int, *purpose) -> Tensor:
    """Uniform in [0, 1): (rows, tokens) in float64 on the CPU, an independent stream per (seed, purpose)."""
    bits = random.Random(" ".join(map(str, (seed, *purpose)))).getrandbits(63)
    return torch.rand(rows, tokens, generator=torch.Generator().manual_seed(bits), dtype=torch.float64)


def draw(logits: Tensor, temperature: float, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Samples from softmax(logits / temperature) (N, V): ids (N) and log-probabilities (N). 0 means greedy.

    By the inverse of the cumulative distribution at `uniform` (N), without a host round trip. In float64: in
    float32 the sum over a large vocabulary rounds away what its rare tokens have.
    """
    probs = F.softmax(logits.float() / (temperature or 1.0), dim=-1)                        # (N, V)
    if temperature == 0:
        ids = probs.argmax(-1)
    else:
        cumulative = probs.cumsum(-1, dtype=torch.float64)                                  # (N, V)
        at = uniform.unsqueeze(-1) * cumulative[:, -1:]
        ids = torch.searchsorted(cumulative, at, right=True).squeeze(-1)                    # (N)
        ids = ids.clamp(max=logits.size(-1) - 1)  # only NaN logits get there; the caller sees it in logprobs
    return ids, probs.gather(-1, ids.unsqueeze(-1)).squeeze(-1).log()


@torch.inference_mode()
def sample(model: Transformer, prompts: list[list[int]], eos: int | tuple[int, ...], max_new_tokens: int,
           temperature: float = 1.0, group: int = 1, noise: Tensor | None = None,
           compile: bool = False) -> Rollouts:
    """Samples `group` completions of each prompt, up to and including EOS or `max_new_tokens` tokens.

    `noise` (prompts * group, max_new_tokens) are numbers from `uniforms`; None draws fresh ones.
    """
    device = model.lm_head.weight.device
    lengths = torch.tensor([len(p) for p in prompts], device=device)                        # (P)
    cache = Cache(model.config, len(prompts), int(lengths.max()) + max_new_tokens, model.lm_head.weight)
    model = prepared(model, len(prompts) * group, max_new_tokens)
    hidden = model.hidden(pad(prompts, device), cache)                                      # (P, longest, C)
    logits = model.lm_head(hidden[torch.arange(len(prompts), device=device), lengths - 1])  # (P, V)

    group_rows = torch.arange(len(prompts), device=device).repeat_interleave(group)         # (N)
    if group > 1:
        cache.select(group_rows)
    logits, positions = logits[group_rows], lengths[group_rows]
    longest, N = max(map(len, prompts)), len(group_rows)
    out = Rollouts(torch.zeros(N, max_new_tokens, dtype=torch.long, device=device),
                   torch.zeros(N, dtype=torch.long, device=device),
                   torch.zeros(N, max_new_tokens, device=device),
                   torch.ones(N, dtype=torch.bool, device=device))
    noise = (torch.rand(N, max_new_tokens, dtype=torch.float64) if noise is None else noise).to(device)
    step = decoder(model, cache, compile)
    ends = torch.tensor(eos, device=device)         # one id or several
    rows = torch.arange(N, device=device)           # which rollout a row of the shrinking batch belongs to
    going = torch.ones(N, dtype=torch.bool, device=device)
    for t in range(max_new_tokens):
        ids, logprobs = draw(logits, temperature, noise[rows, t])           # (rows), (rows)
        out.ids[rows, t] = ids * going          # a finished row samples on until it is dropped: write pads
        out.logprobs[rows, t] = logprobs * going
        out.lengths[rows] += going
        going = going & ~torch.isin(ids, ends)
        out.truncated[rows] = going
        if t == max_new_tokens - 1:
            break
        if (t + 1) % CHECK_EVERY == 0:
            keep = going.nonzero().squeeze(-1)
            if len(keep) == 0:
                break
            # copying the cache pays only if enough rows go; to compiled code a single row is a special case
            if len(keep) <= 0.75 * len(rows) and (len(keep) > 1 or not compile):
                cache.select(keep)
                rows, going, ids, positions = rows[keep], going[keep], ids[keep], positions[keep]
        logits = step(ids, positions, longest + t + 1)
        positions = positions + 1
    width = int(out.lengths.max())
    return Rollouts(out.ids[:, :width], out.lengths, out.logprobs[:, :width], out.truncated)


def sample_in_parts(model: Transformer, prompts: list[list[int]], eos: int | tuple[int, ...],
                    max_new_tokens: int, temperature: float, group: int, noise: Tensor, rows: int,
                    compile: bool = False) -> Rollouts:
    """`sample`, at most `rows` rollouts at once (at least a group): bounds the cache, changes no rollout."""
    step = max(1, rows // group)
    parts = [sample(model, prompts[at:at + step], eos, max_new_tokens, temperature, group,
                    noise[at * group:(at + step) * group], compile)
             for at in range(0, len(prompts), step)]
    width = max(part.ids.size(1) for part in parts)
    wide = lambda tensors: torch.cat([F.pad(t, (0, width - t.size(1))) for t in tensors])
    return Rollouts(wide([p.ids for p in parts]), torch.cat([p.lengths for p in parts]),
                    wide([p.logprobs for p in parts]), torch.cat([p.truncated for p in parts]))
