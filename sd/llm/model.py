"""A decoder-only transformer for Qwen3, Qwen2, Llama and SmolLM3; names as in the checkpoint.

Read it top to bottom: RMSNorm, rotary positions, the key/value cache, grouped-query attention,
SwiGLU, the block, the model. Simplified on purpose: one attention path (PyTorch's
scaled_dot_product_attention), no dropout, no bias on the output projection, full attention in every
layer.

With `recompute` a block keeps only its input for the backward pass and computes the rest again
there (activation checkpointing). That is a third more work, for the memory of one layer instead of
all.

Padding is on the right everywhere. A token then never sees a pad (causal mask), positions count
from 0 in every row, and no mask has to be built for scoring. Lengths say what is real and pad ids
never do, so pad and EOS may be the same token.

Letters: B rows, T tokens, S slots of the cache, H query heads, K key/value heads, D head size, C
hidden size, V vocabulary.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's: long wavelengths are stretched by `factor`, short ones kept, others mixed."""
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: float


@dataclass(frozen=True)
class ModelConfig:
    """The sizes that a checkpoint's config.json gives, under its names."""
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
    unrotated: tuple[int, ...] = ()     # SmolLM3: layers without rotary positions


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight; the mean in float32, as the checkpoints were trained."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        mean_square = wide.pow(2).mean(-1, keepdim=True)
        wide = wide * torch.rsqrt(mean_square + self.eps)
        return self.weight * wide.to(x.dtype)


def rotary_tables(positions: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """cos and sin (…, T, D) of position * theta^(-2i/D), in float32, to multiply (B, H, T, D) with.

    `positions` is (T), the same for all rows, or (B, 1, T).
    """
    even = torch.arange(0, config.head_dim, 2, device=positions.device).float()
    frequency = config.rope_theta ** -(even / config.head_dim)              # (D/2)
    scaling = config.rope_scaling
    if scaling:
        # how often each dimension turns around within the context of the original training
        turns = scaling.original_max_position_embeddings * frequency / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = keep * frequency + (1 - keep) * frequency / scaling.factor
    angle = positions.unsqueeze(-1).float() * frequency                     # (…, T, D/2)
    angle = torch.cat([angle, angle], dim=-1)                               # (…, T, D)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding; Hugging Face checkpoints pair dimension i with i + D/2."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class Cache:
    """Keys and values of every layer; slot s of a row holds those of its token s.

    It starts as zeros, not as whatever the memory held: a masked slot has weight 0, and 0 * NaN is
    NaN.
    """

    def __init__(self, config: ModelConfig, rows: int, slots: int, like: Tensor):
        shape = (rows, config.num_key_value_heads, slots, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.k = [like.new_zeros(shape) for _ in layers]        # each (B, K, S, D)
        self.v = [like.new_zeros(shape) for _ in layers]

    def select(self, rows: Tensor) -> None:
        """Keeps (or repeats) rows: one prefill serves a group, and finished rows are dropped."""
        for layer in range(len(self.k)):        # one after another: never two caches at a time
            self.k[layer] = self.k[layer].index_select(0, rows)
            self.v[layer] = self.v[layer].index_select(0, rows)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        C, D = config.hidden_size, config.head_dim
        queries = config.num_attention_heads * D
        keys = config.num_key_value_heads * D
        self.q_proj = nn.Linear(C, queries, config.qkv_bias)
        self.k_proj = nn.Linear(C, keys, config.qkv_bias)
        self.v_proj = nn.Linear(C, keys, config.qkv_bias)
        self.o_proj = nn.Linear(queries, C, bias=False)
        if config.qk_norm:
            self.q_norm = RMSNorm(D, config.rms_norm_eps)
            self.k_norm = RMSNorm(D, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        layer: int,
        cache: Cache | None,
        slot: tuple | None,         # where the cache is written: one token a row
        mask: Tensor | None,        # what it may see of the cache
    ) -> Tensor:
        """(B, T, C) -> (B, T, C): whole sequences, or with a `slot` one new token a row."""
        B, T, _ = x.shape
        D = self.config.head_dim
        q, k, v = [linear(x).view(B, T, -1, D).transpose(1, 2)      # (B, H, T, D), k and v
                   for linear in (self.q_proj, self.k_proj, self.v_proj)]       # (B, K, T, D)
        if self.config.qk_norm:
            q = self.q_norm(q)
            k = self.k_norm(k)
        if layer not in self.config.unrotated:
            q = rotate(q, cos, sin)
            k = rotate(k, cos, sin)
        if slot is None:
            if cache:
                cache.k[layer][:, :, :T] = k
                cache.v[layer][:, :, :T] = v
            out = causal(q, k, v)                                   # (B, H, T, D)
        else:
            cache.k[layer][slot] = k.squeeze(2)                     # (B, K, D)
            cache.v[layer][slot] = v.squeeze(2)
            S = mask.size(-1)
            k = cache.k[layer][:, :, :S]                            # (B, K, S, D)
            v = cache.v[layer][:, :, :S]
            # the query heads that share a key head stand in the place of tokens
            q = q.reshape(B, k.size(1), -1, D)                      # (B, K, H/K, D)
            out = F.scaled_dot_product_attention(q, k, v, mask)     # (B, K, H/K, D)
            out = out.reshape(B, -1, T, D)                          # (B, H, T, D)
        out = out.transpose(1, 2).reshape(B, T, -1)                 # (B, T, H*D)
        return self.o_proj(out)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention: queries (B, H, T, D), keys and values (B, K, T, D) -> (B, H, T, D)."""
    shared = q.size(1) // k.size(1)             # query heads per key head
    # float32 on CUDA: flash attention has none, and the other fast kernel takes no fewer key heads
    if q.is_cuda and q.dtype == torch.float32:
        k = k.repeat_interleave(shared, 1)
        v = v.repeat_interleave(shared, 1)
        shared = 1
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shared > 1)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        C = config.hidden_size
        inner = config.intermediate_size
        self.gate_proj = nn.Linear(C, inner, bias=False)
        self.up_proj = nn.Linear(C, inner, bias=False)
        self.down_proj = nn.Linear(inner, C, bias=False)

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
        normed = self.input_layernorm(x)
        x = x + self.self_attn(normed, *attention_inputs)
        normed = self.post_attention_layernorm(x)
        return x + self.mlp(normed)


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
        self.config = config
        self.recompute = False
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def hidden(self, ids: Tensor, cache: Cache | None = None, positions: Tensor | None = None,
               slots: int = 0) -> Tensor:
        """Hidden states (B, T, C) before the output projection.

        Without `positions`, `ids` (B, T) are whole right-padded sequences, which are written to the
        cache if there is one. With `positions` (B), `ids` (B, 1) are one decoding step, which reads
        the first `slots` slots of the cache. A slot beyond a row's own position is masked: it holds
        a pad of the row's prompt, or nothing yet.
        """
        x = self.model.embed_tokens(ids)                                    # (B, T, C)
        if positions is None:
            positions = torch.arange(ids.size(1), device=ids.device)        # (T)
            slot = mask = None
        else:
            rows = torch.arange(len(ids), device=ids.device)
            slot = (rows, slice(None), positions)                           # of (B, K, S, D)
            positions = positions[:, None, None]                            # (B, 1, 1)
            unseen = torch.arange(slots, device=ids.device) > positions.unsqueeze(-1)
            mask = x.new_zeros(unseen.shape).masked_fill_(unseen, -math.inf)    # (B, 1, 1, S)
        cos, sin = rotary_tables(positions, self.config)                    # (…, T, D)
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        for layer, block in enumerate(self.model.layers):
            inputs = (x, cos, sin, layer, cache, slot, mask)
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, *inputs, use_reentrant=False)
            else:
                x = block(*inputs)
        return self.model.norm(x)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (B, T, V) of right-padded sequences (B, T)."""
        return self.lm_head(self.hidden(ids))
