"""The model against a naive forward pass: double precision, head by head, rotation as complex numbers."""
import json
from dataclasses import asdict, replace
from shutil import copy

import pytest
import torch

from sd.llm.checkpoint import load, save_model
from sd.llm.lora import plain_weights
from sd.llm.model import Cache, ModelConfig, Transformer
from sd.problems import EMBEDDED

QWEN3 = ModelConfig(vocab_size=106, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
                    num_attention_heads=6, num_key_value_heads=2, head_dim=10, rms_norm_eps=1e-6,
                    rope_theta=500.0, max_position_embeddings=64, qk_norm=True)     # heads of 10, not 24 / 6
QWEN2 = replace(QWEN3, qk_norm=False, qkv_bias=True, tie_word_embeddings=True, head_dim=4)
LLAMA = replace(QWEN3, qk_norm=False, num_key_value_heads=6, rms_norm_eps=1e-2, rope_theta=10000.0)
SINGLE = replace(QWEN3, qkv_bias=True, num_key_value_heads=1, tie_word_embeddings=True)  # heads share one key
CONFIGS = pytest.mark.parametrize("config", [QWEN3, QWEN2, LLAMA, SINGLE])
FAMILIES = pytest.mark.parametrize("family, config", [("qwen3", QWEN3), ("qwen2", QWEN2), ("llama", LLAMA)])


def tiny(config, seed=0):
    """Every weight random, norms and biases too, so that one left out is seen."""
    model, source = Transformer(config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.4, generator=source)
    return model.requires_grad_(False)


def some_ids(*shape):
    return torch.randint(98, shape, generator=torch.Generator().manual_seed(1))


def naive(weights, c, ids):
    """Logits (T, V) of one sequence, from the state dict alone."""
    w = {name: value.double() for name, value in weights.items()}
    T, D, shared = len(ids), c.head_dim, c.num_attention_heads // c.num_key_value_heads

    def norm(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + c.rms_norm_eps).sqrt() * weight

    def head(x, at, i, which):                          # head i of the q, k or v projection (T, D)
        out = x @ w[f"{at}.{which}_proj.weight"][i * D:(i + 1) * D].T
        if c.qkv_bias:
            out = out + w[f"{at}.{which}_proj.bias"][i * D:(i + 1) * D]
        return norm(out, w[f"{at}.{which}_norm.weight"]) if c.qk_norm and which != "v" else out

    def turn(x):
        angle = torch.arange(T).double()[:, None] * c.rope_theta ** (-2 * torch.arange(D // 2).double() / D)
        turned = torch.complex(x[:, :D // 2], x[:, D // 2:]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([turned.real, turned.imag], -1)

    x = w["model.embed_tokens.weight"][ids]
    for at in (f"model.layers.{layer}" for layer in range(c.num_hidden_layers)):
        h, heads = norm(x, w[f"{at}.input_layernorm.weight"]), []
        for i in range(c.num_attention_heads):
            q, k, v = (head(h, f"{at}.self_attn", n, of)
                       for n, of in zip((i, i // shared, i // shared), "qkv"))
            score = turn(q) @ turn(k).T / D ** 0.5
            heads.append(score.masked_fill(torch.ones(T, T).triu(1).bool(), float("-inf")).softmax(-1) @ v)
        x = x + torch.cat(heads, -1) @ w[f"{at}.self_attn.o_proj.weight"].T
        h = norm(x, w[f"{at}.post_attention_layernorm.weight"])
        gate, up = h @ w[f"{at}.mlp.gate_proj.weight"].T, h @ w[f"{at}.mlp.up_proj.weight"].T
        x = x + (gate * gate.sigmoid() * up) @ w[f"{at}.mlp.down_proj.weight"].T
    out = w["model.embed_tokens.weight" if c.tie_word_embeddings else "lm_head.weight"]
    return norm(x, w["model.norm.weight"]) @ out.T


@CONFIGS
def test_logits_equal_a_naive_forward_pass(config):
    model, ids = tiny(config), some_ids(2, 11)
    dense = torch.stack([naive(model.state_dict(), config, row) for row in ids])
    torch.testing.assert_close(model(ids).double(), dense, atol=2e-4, rtol=1e-4)


@CONFIGS
def test_padding_and_batching_leave_logits_unchanged(config):
    model, rows = tiny(config), [some_ids(9)[:n] for n in (3, 9, 5)]
    for padded in (torch.zeros(3, 9).long(), some_ids(3, 9)):           # neither pad id may matter
        for i, row in enumerate(rows):
            padded[i, :len(row)] = row
        for row, logits in zip(rows, model(padded)):
            torch.testing.assert_close(logits[:len(row)], model(row[None])[0], atol=2e-5, rtol=1e-4)


@CONFIGS
def test_cached_decoding_equals_the_uncached_forward_pass(config):
    """Prompts of 1, 4 and 6 tokens together, then token by token; each row writes over its prompt's pads."""
    model, ids, lengths = tiny(config), some_ids(3, 14), torch.tensor([1, 4, 6])
    whole, cache, each = model(ids), Cache(config, 3, 14, model.lm_head.weight), torch.arange(3)
    prefill = model.lm_head(model.hidden(
        torch.where(torch.arange(6) < lengths[:, None], ids[:, :6], 7), cache))
    torch.testing.assert_close(prefill[each, lengths - 1], whole[each, lengths - 1], atol=2e-5, rtol=1e-4)
    for step, at in enumerate(lengths + n for n in range(8)):
        logits = model.lm_head(model.hidden(ids[each, at][:, None], cache, at, 6 + step + 1))[:, 0]
        torch.testing.assert_close(logits, whole[each, at], atol=2e-5, rtol=1e-4)


def write(tmp_path, family, config):
    (source := tmp_path / "source").mkdir()
    copy(EMBEDDED / "tokenizer.json", source)
    (source / "config.json").write_text(json.dumps({"model_type": family, **asdict(config)}))
    save_model(tmp_path / "saved", plain_weights(model := tiny(config)), source, step=3)
    return tmp_path / "saved", model


@FAMILIES
def test_saving_and_loading_changes_no_weight(tmp_path, family, config):
    folder, model = write(tmp_path, family, config)
    again, _ = load(folder)
    read = again.config
    assert read == config and again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == config.tie_word_embeddings


@FAMILIES
def test_transformers_opens_the_folder_and_computes_the_same_logits(tmp_path, family, config):
    transformers = pytest.importorskip("transformers")
    folder, model = write(tmp_path, family, config)
    other, ids = transformers.AutoModelForCausalLM.from_pretrained(folder), some_ids(2, 11)
    torch.testing.assert_close(model(ids), other(ids).logits, atol=2e-4, rtol=1e-4)
