"""Batched sampling with a key/value cache: prompts in, token ids and their log-probabilities out.

Prompts are padded on the right, like everything here: a row's next token goes to its own position, over the pads of its
prompt, and slots beyond a row's position are masked, so no pad is ever seen. A prompt that is sampled several times (a
GRPO group, Avg@k) is prefilled once. Rows that reached EOS are dropped from the batch now and then, so a short rollout
does not wait for a long one at full cost. Only temperature shapes the distribution: top-p and top-k would bias the
log-probabilities that the loss relies on.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sd.model import Cache, Transformer

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


def draw(logits: Tensor, temperature: float, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Samples from softmax(logits / temperature) (N, V): ids (N) and their log-probabilities (N). 0 means greedy.

    Exponential races: argmax_v p_v / E_v with E_v = -log(uniform) ~ Exp(1) is a categorical draw, without a host round
    trip. The uniform is below 1, so no E_v is 0 (a 0 would let any token win, however improbable).
    """
    logprobs = F.log_softmax(logits.float() / (temperature or 1.0), dim=-1)                 # (N, V)
    if temperature == 0:
        ids = logprobs.argmax(-1)
    else:
        race = torch.rand(logprobs.shape, generator=generator, device=logits.device).log_().neg_()
        ids = (logprobs - race.log_()).argmax(-1)                                           # (N)
    return ids, logprobs.gather(-1, ids.unsqueeze(-1)).squeeze(-1)


@torch.no_grad()
def sample(model: Transformer, prompts: list[list[int]], eos: int, max_new_tokens: int, temperature: float = 1.0,
           group: int = 1, generator: torch.Generator | None = None) -> Rollouts:
    """Samples `group` completions of each prompt, up to and including EOS or `max_new_tokens` tokens."""
    device = model.lm_head.weight.device
    lengths = torch.tensor([len(p) for p in prompts], device=device)                        # (P)
    cache = Cache(model.config, len(prompts), int(lengths.max()) + max_new_tokens, model.lm_head.weight)
    hidden = model.hidden(pad(prompts, device), cache)                                      # (P, longest, C)
    logits = model.lm_head(hidden[torch.arange(len(prompts), device=device), lengths - 1])  # (P, V)

    group_rows = torch.arange(len(prompts), device=device).repeat_interleave(group)         # (N)
    cache.rows(group_rows)
    logits, positions = logits[group_rows], lengths[group_rows]
    longest, N = max(map(len, prompts)), len(group_rows)
    out = Rollouts(torch.zeros(N, max_new_tokens, dtype=torch.long, device=device),
                   torch.zeros(N, dtype=torch.long, device=device), torch.zeros(N, max_new_tokens, device=device),
                   torch.ones(N, dtype=torch.bool, device=device))
    rows = torch.arange(N, device=device)           # which rollout a row of the shrinking batch belongs to
    going = torch.ones(N, dtype=torch.bool, device=device)
    for t in range(max_new_tokens):
        ids, logprobs = draw(logits, temperature, generator)                                # (rows), (rows)
        out.ids[rows, t] = ids * going              # a finished row samples on until it is dropped: write pads
        out.logprobs[rows, t] = logprobs * going
        out.lengths[rows] += going
        going = going & (ids != eos)
        out.truncated[rows] = going
        if t % CHECK_EVERY == CHECK_EVERY - 1 or t == max_new_tokens - 1:
            keep = going.nonzero().squeeze(-1)
            if len(keep) == 0 or t == max_new_tokens - 1:
                break
            if len(keep) <= 0.75 * len(rows):       # copying the cache pays only if enough rows go
                cache.rows(keep)
                rows, going, ids, positions = rows[keep], going[keep], ids[keep], positions[keep]
        logits = model.lm_head(model.hidden(ids.unsqueeze(-1), cache, positions, longest + t + 1)[:, -1])
        positions = positions + 1
    width = int(out.lengths.max())
    return Rollouts(out.ids[:, :width], out.lengths, out.logprobs[:, :width], out.truncated)
