"""Hugging Face folders <-> model, and the one way this project writes files.

A checkpoint is an ordinary folder: config.json, model.safetensors (or several files and their
index), tokenizer.json, and a chat model's template. Names and sizes are those of the Hugging Face
format, so transformers and vLLM open what we write. Loading refuses by name what a folder asks for
and we lack: to ignore such an entry would give a wrong model, or a wrong prompt, that looks right.
"""
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from shutil import copyfile

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sd import UserError
from sd.llm.model import ModelConfig, RopeScaling, Transformer
from sd.llm.tokenizer import CONTROL, Tokenizer

# what an absent entry stands for, as in transformers
DEFAULTS = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "no_rope_layer_interval": 1e9}
FAMILIES = {
    "qwen3": {},
    "qwen2": {},
    "llama": {},
    "smollm3": {"num_key_value_heads": 4, "rope_theta": 2e6, "no_rope_layer_interval": 4,
                "tie_word_embeddings": True},
}
LARGEST = {             # what is believed, before any memory is taken for it
    "vocab_size": 4_000_000,
    "hidden_size": 65_536,
    "intermediate_size": 262_144,
    "num_hidden_layers": 1000,
    "num_attention_heads": 1024,
    "num_key_value_heads": 1024,
    "head_dim": 4096,
    "max_position_embeddings": 1_000_000_000,
    "rms_norm_eps": 1.0,
    "rope_theta": 1e12,
}
ONLY = {                # with any other value of these entries it is not this model
    "hidden_act": "silu",
    "quantization_config": None,
    "use_sliding_window": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1,
}
COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
              "added_tokens.json", "chat_template.jinja", "vocab.json", "merges.txt",
              "generation_config.json")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what goes wrong while a file is written into a UserError that names it."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be written ({getattr(error, 'strerror', None) or error}); "
                        "free some space, fix the permissions or choose another place") from None


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yields a temporary path, then fsyncs and renames it: nobody sees half a file.

    Raises UserError if it cannot be written.
    """
    temporary = Path(f"{path}.tmp")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.touch()
            mode = temporary.stat().st_mode     # safetensors' own files only their owner can read
            yield temporary
            temporary.chmod(mode)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink()


def append_rows(path: Path, rows: list[dict]) -> None:
    """Adds lines to a JSONL file. Raises UserError if it cannot be written."""
    with writing(path), open(path, "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], facts: dict[str, str]) -> None:
    """Writes a safetensors file with `facts` in its header, so they change with the tensors.

    Raises UserError if it cannot be written, FloatingPointError if a number is not finite.
    """
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise FloatingPointError(f"{path}: is not written, since {name} is not finite; begin "
                                     "again with a lower --lr, or look at the weights of --model")
    with atomic(path) as temporary:
        save_file(tensors, temporary, facts)


def write_atomic(path: Path, text: str) -> None:
    with atomic(path) as temporary:
        temporary.write_bytes(text.encode())


def write_json(path: Path, content: dict) -> None:
    write_atomic(path, json.dumps(content, indent=1) + "\n")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns whatever is found wrong with a file into a UserError that names it."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError,
            RecursionError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be used ({str(error)[:200]})") from None


def read_config(folder: Path) -> ModelConfig:
    """config.json -> ModelConfig. Raises UserError naming what is missing or not supported."""
    path = folder / "config.json"
    if not path.exists():
        raise UserError(f"{folder}: no such folder, or no config.json in it; "
                        "models are not looked up by name, download them first")
    if (folder / "best").exists():
        raise UserError(f"{folder}: is a run folder; take the checkpoint {folder / 'best'}")
    with reading(path):
        return model_config(json.loads(path.read_bytes()))


def model_config(raw: dict) -> ModelConfig:
    """Raises ValueError about an entry that is not supported, others if `raw` is no config."""
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"model_type must be one of {', '.join(FAMILIES)}")
    # in this order, as in transformers
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    entries = DEFAULTS | FAMILIES[family] | raw | rope
    entries.setdefault("num_key_value_heads", raw["num_attention_heads"])
    if not entries.get("head_dim"):
        entries["head_dim"] = raw["hidden_size"] // raw["num_attention_heads"]
    for name, largest in LARGEST.items():
        value = entries.get(name)
        if not isinstance(value, (int, type(largest))) or not 0 < value <= largest:
            raise ValueError(f"{name} must be a number above 0 and up to {largest}, "
                             f"not {str(value)[:80]!r}")
    only = ONLY | {
        "attention_bias": family == "qwen2",
        "layer_types": ["full_attention"] * entries["num_hidden_layers"],
    }
    for name, value in only.items():
        if entries.get(name) not in (None, value):
            raise ValueError(f"{name} {str(entries[name])[:80]!r} is not supported")
    unequal = entries["num_attention_heads"] % entries["num_key_value_heads"]
    if unequal or entries["head_dim"] % 2:
        raise ValueError("num_attention_heads must be a multiple of num_key_value_heads, "
                         "and head_dim even")
    layers = range(entries["num_hidden_layers"])
    rotary = entries.get("no_rope_layers") or [(layer + 1) % entries["no_rope_layer_interval"]
                                               for layer in layers]
    return ModelConfig(
        **{name: entries[name] for name in LARGEST},
        rope_scaling=rope_scaling(rope),
        tie_word_embeddings=bool(entries.get("tie_word_embeddings")),
        qk_norm=family == "qwen3",
        qkv_bias=family == "qwen2",
        unrotated=tuple(layer for layer in layers if not rotary[layer]),
    )


def rope_scaling(rope: dict) -> RopeScaling | None:
    """Raises ValueError about rotary positions of another kind."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if any(isinstance(value, dict) for value in rope.values()):
        kind = "one per kind of layer"
    if kind == "default":
        return None
    if kind != "llama3":
        raise ValueError(f"rotary positions of type {str(kind)[:40]!r} are not supported")
    return RopeScaling(*[float(rope[field.name]) for field in fields(RopeScaling)])


def open_tokenizer(folder: Path) -> Tokenizer:
    """tokenizer.json, with what the files beside it say of a chat's turns and the end of a text.

    Raises UserError if one of them is broken, or if no prompt is known for the model.
    """
    entries, ends = {}, set()
    for path in (folder / "config.json", folder / "generation_config.json",
                 folder / "tokenizer_config.json"):
        if path.exists():
            with reading(path):
                found = json.loads(path.read_bytes())
                eos = found.get("eos_token_id")
                ends |= set(eos if isinstance(eos, list) else [eos])
                entries |= found
    template = str(entries.get("chat_template") or "")
    path = folder / "chat_template.jinja"
    if path.exists():
        with reading(path):
            template = path.read_text(encoding="utf-8")
    # it may be an object with the token in it
    bos = "".join(CONTROL.findall(str(entries.get("bos_token"))))
    tokenizer = Tokenizer(folder / "tokenizer.json", template, bos)
    tokenizer.eos += tuple(ends & tokenizer.ids)
    return tokenizer


def load(folder: str | Path, dtype: torch.dtype = torch.float32,
         device: str | torch.device = "cpu") -> tuple[Transformer, Tokenizer]:
    """Opens a checkpoint folder: the model in `dtype` on `device`, and the tokenizer.

    An id that the tokenizer lacks, as in a padded vocabulary, has the probability 0. Raises
    UserError if a file is missing or broken, or if a tensor is missing, unexpected, quantised or
    of another shape than config.json says.
    """
    folder, device = Path(folder), torch.device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)       # streams and graphs are made on the current one
        # reported of Hopper: PyTorch prefers cuDNN's attention, which prepares for each length
        torch.backends.cuda.enable_cudnn_sdp(False)
    config = read_config(folder)
    tokenizer = open_tokenizer(folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(f"{folder}: tokenizer.json has {tokenizer.vocab_size} tokens, "
                        f"the model only {config.vocab_size}")
    tensors = {}
    for path in weight_files(folder):
        with reading(path), safe_open(path, "pt") as file:
            for name in file.keys():
                if name.endswith("rotary_emb.inv_freq"):        # a buffer that old files hold
                    continue
                tensor = file.get_tensor(name)
                if not tensor.is_floating_point() or tensor.itemsize < 2:
                    raise ValueError(f"tensor {name[:120]!r} holds {tensor.dtype}; "
                                     "quantised weights are not supported")
                tensors[name] = tensor.to(device, dtype)
    if config.tie_word_embeddings:
        head = tensors.pop("lm_head.weight", tensors.get("model.embed_tokens.weight"))
    with torch.device("meta"):              # shapes without memory
        model = Transformer(config)
    wanted = dict(model.named_parameters())
    for name in sorted(wanted | tensors):
        asked, found = [list(t[name].shape) if name in t else None for t in (wanted, tensors)]
        if asked != found:
            raise UserError(f"{folder / 'model.safetensors'}: tensor {name[:120]!r} has the shape "
                            f"{found}, config.json asks for {asked}")
    model.load_state_dict(tensors, strict=False, assign=True)
    if config.tie_word_embeddings:
        embedding = model.model.embed_tokens.weight
        if not torch.equal(head, embedding):
            raise UserError(f"{folder / 'config.json'}: tie_word_embeddings is true, but the "
                            "weights have another lm_head.weight; if it is right, say false")
        model.lm_head.weight = embedding
    # As a bias it costs nothing and holds in sampling and in every loss alike. It is finite, since
    # a divergence multiplies it by a probability of 0, and no parameter, so not trained or saved.
    bias = model.lm_head.weight.new_full([config.vocab_size], -1e9)
    bias[list(tokenizer.ids)] = 0
    if bias.any():
        del model.lm_head.bias
        model.lm_head.bias = bias
    return model.requires_grad_(), tokenizer


def weight_files(folder: Path) -> list[Path]:
    """One file, or those in the index; others that lie in the folder are ignored."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return [folder / "model.safetensors"]
    with reading(index):
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        for name in names:
            if not re.fullmatch(r"[\w.-]+\.safetensors", name):
                raise ValueError(f"{name[:120]!r} is no name of a safetensors file in this folder")
    return [folder / name for name in names]


def save_model(folder: Path, weights: dict[str, torch.Tensor], source: str | Path,
               **facts) -> None:
    """Writes a checkpoint; tokenizer and config come from the checkpoint `source`.

    `facts` go into the header of the weights, which are written last. Raises UserError if a file
    cannot be read or written, FloatingPointError if a weight is not finite.
    """
    source = Path(source)
    with reading(source / "config.json"):
        config = json.loads((source / "config.json").read_bytes())
    config["dtype" if "dtype" in config else "torch_dtype"] = "float32"     # as merged weights are
    write_json(folder / "config.json", config)
    for name in COMPANIONS:
        if (source / name).exists():
            with atomic(folder / name) as temporary:
                copyfile(source / name, temporary)      # bytes: not every companion need be UTF-8
    tensors = {name: weight.detach().cpu() for name, weight in weights.items()}
    header = {"format": "pt"} | {name: str(value) for name, value in facts.items()}
    save_tensors(folder / "model.safetensors", tensors, header)
