"""A decoder-only transformer for Qwen3, Qwen2 and Llama checkpoints, parameter names as in the checkpoint.

Read it top to bottom: RMSNorm, rotary positions, grouped-query attention with a key/value cache, SwiGLU, the
block, the model. Simplified on purpose: one attention path (PyTorch's scaled_dot_product_attention), no
dropout, no attention bias on the output projection, full attention in every layer.

With `recompute` a block keeps only its input for the backward pass and computes the rest again there
(activation checkpointing): a third more work, and the memory of one layer instead of all.

Padding is on the right everywhere. A token then never sees a pad (causal mask), positions count from 0 in
every row, and no mask has to be built for scoring: a pad id can never be mistaken for EOS.

Letters: B rows, T tokens, S slots, H query and K key/value heads, D head size, C hidden size, V vocabulary.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's: long wavelengths are stretched by `factor`, short ones kept, in between a mixture."""
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: float


@dataclass(frozen=True)
class ModelConfig:
    """The sizes a checkpoint's config.json gives, under its names."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool = False
    qk_norm: bool = False       # Qwen3: RMSNorm on each head's queries and keys
    qkv_bias: bool = False      # Qwen2: bias on the q, k, v projections
    rope_scaling: RopeScaling | None = None


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight; the mean in float32, as the checkpoints were trained."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


def rotary_tables(positions: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """cos and sin (…, T, D) of position * theta^(-2i/D), in float32, to multiply (B, H, T, D) with.

    So `positions` is (T), the same for all rows, or (B, 1, T).
    """
    steps = torch.arange(0, config.head_dim, 2, device=positions.device).float() / config.head_dim
    frequency = config.rope_theta ** -steps                                                 # (D/2)
    if (scaling := config.rope_scaling) is not None:
        turns = scaling.original_max_position_embeddings * frequency / (2 * math.pi)    # in that context
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = keep * frequency + (1 - keep) * frequency / scaling.factor
    angle = positions.unsqueeze(-1).float() * frequency                                     # (…, T, D/2)
    angle = torch.cat([angle, angle], dim=-1)                                               # (…, T, D)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding; Hugging Face checkpoints pair dimension i with i + D/2."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class Cache:
    """Keys and values of every layer, written at explicit positions; slot s of a row holds its token s.

    It starts as zeros, not as whatever the memory held: a masked slot has weight 0, and 0 * NaN is NaN.
    """

    def __init__(self, config: ModelConfig, rows: int, slots: int, like: Tensor):
        shape = (rows, config.num_key_value_heads, slots, config.head_dim)
        self.k = [like.new_zeros(shape) for _ in range(config.num_hidden_layers)]   # each (B, K, S, D)
        self.v = [like.new_zeros(shape) for _ in range(config.num_hidden_layers)]

    def select(self, index: Tensor) -> None:
        """Keeps (or repeats) rows: one prefill serves a whole group, and finished rows stop costing."""
        for tensors in (self.k, self.v):
            for layer, old in enumerate(tensors):       # one layer after another: never two caches at a time
                tensors[layer] = old.index_select(0, index)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        c, d = config, config.head_dim
        self.config = config
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * d, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * d, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * d, bias=c.qkv_bias)
        self.o_proj = nn.Linear(c.num_attention_heads * d, c.hidden_size, bias=False)
        if c.qk_norm:
            self.q_norm = RMSNorm(d, c.rms_norm_eps)
            self.k_norm = RMSNorm(d, c.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layer: int, cache: Cache | None,
                slot: tuple[Tensor, slice, Tensor] | None, mask: Tensor | None) -> Tensor:
        B, T, _ = x.shape
        D = self.config.head_dim
        q = self.q_proj(x).view(B, T, -1, D)    # (B, T, H, D)
        k = self.k_proj(x).view(B, T, -1, D)    # (B, T, K, D)
        v = self.v_proj(x).view(B, T, -1, D).transpose(1, 2)    # (B, K, T, D)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = (rotate(q.transpose(1, 2), cos, sin),            # (B, H, T, D)
                rotate(k.transpose(1, 2), cos, sin))            # (B, K, T, D)

        if slot is None:                        # whole sequences from position 0: plain causal attention
            if cache is not None:
                cache.k[layer][:, :, :T] = k
                cache.v[layer][:, :, :T] = v
            # float32 on CUDA: flash attention has none, and the other fast kernel takes no fewer key heads
            if q.is_cuda and q.dtype == torch.float32:
                k, v = (t.repeat_interleave(q.size(1) // t.size(1), 1) for t in (k, v))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True,
                                                 enable_gqa=k.size(1) < q.size(1))          # (B, H, T, D)
        else:                                   # one new token a row: write its slot, then read
            cache.k[layer][slot] = k.squeeze(2)                                             # (B, K, D)
            cache.v[layer][slot] = v.squeeze(2)
            S = mask.size(-1)                   # the slots in use; a group's query heads share one key head
            q = q.reshape(B, self.config.num_key_value_heads, -1, D)                        # (B, K, H/K, D)
            out = F.scaled_dot_product_attention(q, cache.k[layer][:, :, :S], cache.v[layer][:, :, :S], mask)
        return self.o_proj(out.reshape(B, -1, T, D).transpose(1, 2).reshape(B, T, -1))      # (B, T, C)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, *attention_inputs) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), *attention_inputs)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """The checkpoint's `model.` prefix: embeddings, blocks, final norm."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Transformer(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config, self.recompute = config, False
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def hidden(self, ids: Tensor, cache: Cache | None = None, positions: Tensor | None = None,
               slots: int = 0) -> Tensor:
        """Hidden states (B, T, C) before the output projection.

        Without `positions`: whole right-padded sequences `ids` (B, T), written to the cache if there is one.
        With `positions` (B) and `ids` (B, 1): one decoding step against the first `slots` slots of the cache.
        A slot beyond a row's own position (a pad of its prompt, or not yet written) is masked.
        """
        x = self.model.embed_tokens(ids)                                                 # (B, T, C)
        if positions is None:
            at, slot, mask = torch.arange(ids.size(1), device=ids.device), None, None
        else:
            slot = torch.arange(len(ids), device=ids.device), slice(None), positions     # of (B, K, S, D)
            at = positions[:, None, None]                                                # (B, 1, 1)
            seen = torch.arange(slots, device=ids.device) <= at.unsqueeze(-1)            # (B, 1, 1, S)
            mask = torch.zeros_like(seen, dtype=x.dtype).masked_fill_(~seen, -math.inf)  # added to the scores
        cos, sin = rotary_tables(at, self.config)
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        for layer, block in enumerate(self.model.layers):
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, layer, cache, slot, mask, use_reentrant=False)
            else:
                x = block(x, cos, sin, layer, cache, slot, mask)
        return self.model.norm(x)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (B, T, V) of right-padded sequences (B, T)."""
        return self.lm_head(self.hidden(ids))
