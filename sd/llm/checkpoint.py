"""Hugging Face folders <-> model, and the one way this project writes files.

A checkpoint is an ordinary folder: config.json, model.safetensors (or several files and their index),
tokenizer.json. Names and sizes are those of the Hugging Face format, so transformers and vLLM open what we
write. Loading refuses, by name, what a config asks for and this model lacks: to ignore an entry would give a
wrong model that looks right.
"""
import json
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sd import UserError
from sd.llm.model import ModelConfig, RopeScaling, Transformer
from sd.llm.tokenizer import Tokenizer


ARCHITECTURES = ("qwen3", "qwen2", "llama")
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "max_position_embeddings")
ONLY_VALUES = {"hidden_act": ("silu",), "quantization_config": (None,), "use_sliding_window": (None, False),
                "mlp_bias": (None, False), "pretraining_tp": (None, 1),
               "partial_rotary_factor": (None, 1, 1.0)}
COMPANIONS = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json",
              "added_tokens.json", "chat_template.jinja", "vocab.json", "merges.txt")
LARGEST = 2 ** 38       # parameters; more means a broken config, reported before anything is allocated


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yields a temporary path, then fsyncs and renames it: nobody sees half a file. Raises UserError."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode  # the user's default; safetensors makes files that others cannot read
        yield temporary
        temporary.chmod(mode)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({getattr(error, 'strerror', None) or error}); "
                        "free some space, fix the permissions or choose another place") from None
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomic(path: Path, data: bytes | str) -> None:
    with atomic(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def read_config(folder: Path) -> ModelConfig:
    """config.json -> ModelConfig. Raises UserError naming the file and the missing or unsupported entry."""
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if (folder / "adapter_config.json").exists():
            raise UserError(f"{folder}: is an adapter alone; take the checkpoint {folder.parent}") from None
        problem = "not a checkpoint folder (no config.json in it)" if folder.exists() else "no such folder"
        raise UserError(f"{folder}: {problem}; models are not looked up by name, "
                        "download them first") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({str(error)[:200]})") from None
    if (folder / "best/config.json").exists():
        raise UserError(f"{folder}: is a run folder; take the checkpoint {folder / 'best'}")
    if not isinstance(raw, dict) or raw.get("model_type") not in ARCHITECTURES:
        raise UserError(f"{path}: model_type must be one of {', '.join(ARCHITECTURES)}")
    for name in SIZES:
        if not isinstance(raw.get(name), int) or not 0 < raw[name] < 2**31:
            raise UserError(f"{path}: {name} must be a positive integer, not {str(raw.get(name))[:80]!r}")
    for name, allowed in ONLY_VALUES.items():
        if raw.get(name, allowed[0]) not in allowed:
            raise UserError(f"{path}: {name} {str(raw[name])[:80]!r} is not supported")
    layers = raw.get("layer_types") or []
    if not isinstance(layers, list) or any(kind != "full_attention" for kind in layers):
        raise UserError(f"{path}: layer_types other than full_attention are not supported")
    if raw.get("attention_bias") and raw["model_type"] != "qwen2":
        raise UserError(f"{path}: attention_bias is not supported for {raw['model_type']}")
    if raw["num_attention_heads"] % raw["num_key_value_heads"]:
        raise UserError(f"{path}: num_attention_heads must be a multiple of num_key_value_heads")
    if not isinstance(raw.get("rms_norm_eps", 1e-6), float):
        raise UserError(f"{path}: rms_norm_eps must be a number, not {raw['rms_norm_eps']!r}")
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}     # in this order, as in transformers
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise UserError(f"{path}: rope_scaling and rope_parameters must be one object for all layers")
    if rope.get("partial_rotary_factor") not in ONLY_VALUES["partial_rotary_factor"]:
        raise UserError(f"{path}: partial_rotary_factor {str(rope['partial_rotary_factor'])[:80]!r} "
                        "is not supported")
    theta = rope.get("rope_theta", raw.get("rope_theta", 10000.0 if raw["model_type"] == "llama" else None))
    if not isinstance(theta, (int, float)) or not theta > 1:
        raise UserError(f"{path}: rope_theta must be a number above 1, not {theta!r}")
    head_dim = raw.get("head_dim") or (128 if raw["model_type"] == "qwen3" else
                                       raw["hidden_size"] // raw["num_attention_heads"])
    if not isinstance(head_dim, int) or not 0 < head_dim < 2**16 or head_dim % 2:
        raise UserError(f"{path}: head_dim must be a positive even integer, not {head_dim!r}")
    weights = raw["num_hidden_layers"] * raw["hidden_size"] * (
        3 * raw["intermediate_size"] +
        2 * head_dim * (raw["num_attention_heads"] + raw["num_key_value_heads"]))
    if weights + 2 * raw["vocab_size"] * raw["hidden_size"] > LARGEST or raw["num_hidden_layers"] > 1000:
        raise UserError(f"{path}: asks for {weights:.1e} weights in {raw['num_hidden_layers']} layers; "
                        "that is no real model")
    return ModelConfig(
        **{name: raw[name] for name in SIZES}, head_dim=head_dim, rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
        rope_theta=float(theta), rope_scaling=_rope_scaling(path, rope),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qk_norm=raw["model_type"] == "qwen3", qkv_bias=raw["model_type"] == "qwen2")


def _rope_scaling(path: Path, rope: dict) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    values = [rope.get(f.name) for f in fields(RopeScaling)]
    if kind != "llama3":
        raise UserError(f"{path}: rotary positions of type {str(kind)[:40]!r} are not supported, "
                        "only default and llama3")
    if not all(isinstance(v, (int, float)) and v > 0 for v in values) or values[1] >= values[2]:
        raise UserError(f"{path}: rope_scaling llama3 needs {', '.join(f.name for f in fields(RopeScaling))}")
    return RopeScaling(*values)


def load(folder: str | Path, dtype: torch.dtype = torch.float32,
         device: str | torch.device = "cpu") -> tuple[Transformer, Tokenizer]:
    """Opens a checkpoint folder: the model in `dtype` on `device`, its sizes in `.config`, and the tokenizer.

    Raises UserError if a file is missing or broken, or a tensor is missing, unexpected or of the wrong shape.
    """
    folder, device = Path(folder), torch.device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)       # streams and graphs are made on the current one
        # PyTorch prefers cuDNN's attention on Hopper, which prepares for each new length, so at every token
        torch.backends.cuda.enable_cudnn_sdp(False)
    config = read_config(folder)
    tokenizer = Tokenizer(folder / "tokenizer.json")
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(f"{folder}: tokenizer.json has {tokenizer.vocab_size} tokens, "
                        f"the model only {config.vocab_size}")
    with torch.device("meta"):                          # shapes without memory
        model = Transformer(config)
    expected = dict(model.named_parameters())           # a tied lm_head is listed once, as the embedding
    tensors = {}
    for path, names in _files(folder).items():
        try:
            with safe_open(path, "pt") as file:
                for name in names or file.keys():
                    if name == "lm_head.weight" and config.tie_word_embeddings:
                        continue
                    if name not in expected:
                        raise UserError(f"{path}: unexpected tensor {name[:120]!r}")
                    if (shape := tuple(file.get_slice(name).get_shape())) != tuple(expected[name].shape):
                        raise UserError(f"{path}: {name} has shape {shape}, config.json asks for "
                                        f"{tuple(expected[name].shape)}")
                    tensors[name] = file.get_tensor(name).to(device, dtype)
        except (OSError, SafetensorError, struct.error) as error:
            raise UserError(f"{path}: not a readable safetensors file ({error})") from None
    if missing := sorted(set(expected) - set(tensors)):
        raise UserError(f"{folder / 'model.safetensors'}: lacks {len(missing)} tensors, "
                        f"the first is {missing[0]}")
    model.load_state_dict(tensors, strict=False, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.requires_grad_(), tokenizer


def _files(folder: Path) -> dict[Path, list[str] | None]:
    """The weight files and the tensors to take from each (None: all); files outside the index are ignored."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return {folder / "model.safetensors": None}
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files: dict[Path, list[str]] = {}
        for tensor, name in weight_map.items():
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise UserError(f"{index}: {name[:120]!r} is not the name of "
                                "a safetensors file in this folder")
            files.setdefault(folder / name, []).append(tensor)
        return files
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index}: not a readable index of safetensors files "
                        f"({type(error).__name__})") from None


def save_model(folder: Path, weights: dict[str, torch.Tensor], source: Path, **facts) -> None:
    """Writes a checkpoint; tokenizer and config come from `source`, with the dtype that the weights have.

    `facts` (step, score) go into the safetensors header: weights and facts change in one atomic rename.
    """
    source = Path(source)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    types = {str(p.dtype).removeprefix("torch.") for p in weights.values()}
    config["dtype" if "dtype" in config else "torch_dtype"] = "float32" if "float32" in types else types.pop()
    write_atomic(folder / "config.json", json.dumps(config, indent=1) + "\n")
    for name in ("tokenizer.json", *COMPANIONS):
        if (source / name).exists() and not (folder / name).exists():
            write_atomic(folder / name, (source / name).read_bytes())
    tensors = {name: p.detach().cpu().contiguous() for name, p in weights.items()}
    with atomic(folder / "model.safetensors") as temporary:
        save_file(tensors, temporary, {"format": "pt", **{key: str(value) for key, value in facts.items()}})
