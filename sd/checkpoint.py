"""Hugging Face folders <-> model, and the one way this project writes files.

A checkpoint is an ordinary folder: config.json, model.safetensors, tokenizer.json. Names and sizes are those of the
Hugging Face format, so transformers and vLLM open what we write. Loading refuses what it does not understand.
"""
import json
import os
import struct
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from sd import UserError
from sd.model import ModelConfig, Transformer
from sd.tokenizer import Tokenizer

EMBEDDED = Path(__file__).parent / "assets"
ARCHITECTURES = {"qwen3": "Qwen3ForCausalLM", "qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "max_position_embeddings")


def write_atomic(path: Path, data: bytes | str) -> None:
    """Writes a file so that a reader, a crash or a full disk never sees half of it: temporary file, fsync, rename."""
    data = data.encode() if isinstance(data, str) else data
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error.strerror}); free the space or choose another --out") from None


def read_config(folder: Path) -> ModelConfig:
    """config.json -> ModelConfig. Raises UserError naming the file and the entry that is missing or not supported."""
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{folder}: not a checkpoint folder (no config.json in it)") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(raw, dict) or raw.get("model_type") not in ARCHITECTURES:
        raise UserError(f"{path}: model_type must be one of {', '.join(ARCHITECTURES)}")
    for name in SIZES:
        if not isinstance(raw.get(name), int) or not 0 < raw[name] < 2**31:
            raise UserError(f"{path}: {name} must be a positive integer, not {raw.get(name)!r}")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise UserError(f"{path}: scaled rotary positions ({rope}) are not supported")
    if raw.get("hidden_act", "silu") != "silu" or raw.get("use_sliding_window"):
        raise UserError(f"{path}: only hidden_act silu and full attention are supported")
    if raw["num_attention_heads"] % raw["num_key_value_heads"]:
        raise UserError(f"{path}: num_attention_heads must be a multiple of num_key_value_heads")
    if not isinstance(raw.get("rms_norm_eps", 1e-6), float):
        raise UserError(f"{path}: rms_norm_eps must be a number, not {raw['rms_norm_eps']!r}")
    return ModelConfig(
        **{name: raw[name] for name in SIZES},
        head_dim=raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"],
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        rope_theta=float(rope.get("rope_theta", raw.get("rope_theta", 10000.0))),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qk_norm=raw["model_type"] == "qwen3",
        qkv_bias=raw["model_type"] == "qwen2",
    )


def load(folder: str | Path = EMBEDDED, dtype: torch.dtype = torch.float32,
         device: str | torch.device = "cpu") -> tuple[Transformer, Tokenizer, ModelConfig]:
    """Opens a checkpoint folder: (model, tokenizer, config), the model in `dtype` on `device`.

    Raises UserError if a file is missing or broken, or if a tensor is missing, superfluous or of another shape.
    """
    folder = Path(folder)
    config = read_config(folder)
    tokenizer = Tokenizer(folder / "tokenizer.json")
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(f"{folder}: tokenizer.json has {tokenizer.vocab_size} tokens, the model only {config.vocab_size}")
    with torch.device("meta"):                          # shapes without memory
        model = Transformer(config)
    expected = dict(model.named_parameters())           # a tied lm_head is listed once, as the embedding
    path, tensors = folder / "model.safetensors", {}
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():
                if name == "lm_head.weight" and config.tie_word_embeddings:
                    continue
                if name not in expected:
                    raise UserError(f"{path}: unexpected tensor {name}")
                if (shape := tuple(file.get_slice(name).get_shape())) != tuple(expected[name].shape):
                    raise UserError(f"{path}: {name} has shape {shape}, config.json asks for {tuple(expected[name].shape)}")
                tensors[name] = file.get_tensor(name).to(device, dtype)
    except (OSError, SafetensorError, struct.error) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from None
    if missing := sorted(set(expected) - set(tensors)):
        raise UserError(f"{path}: lacks {len(missing)} tensors, the first is {missing[0]}")
    model.load_state_dict(tensors, strict=False, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.requires_grad_(), tokenizer, config


def save_model(folder: Path, model: Transformer, source: Path, **facts) -> None:
    """Writes the folder; config.json and tokenizer.json are copied from `source`. `facts` (step, score) go into the
    safetensors header, so weights and what is known of them change in one atomic rename."""
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).exists():
            write_atomic(folder / name, (Path(source) / name).read_bytes())
    tensors = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters()}
    metadata = {"format": "pt", **{key: str(value) for key, value in facts.items()}}
    write_atomic(folder / "model.safetensors", save(tensors, metadata))
