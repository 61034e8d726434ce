"""Folders that transformers wrote, and what a config may ask for that is refused by name."""
import json
import shutil
import threading
import resource
import struct
from dataclasses import asdict
from shutil import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

from sd import UserError
from sd.llm.checkpoint import LARGEST, load, read_config, save_model, write_atomic
from sd.llm.model import RopeScaling
from sd.llm.sampling import sample
from sd.losses import log_probs, token_loss
from sd.problems import EMBEDDED

from tests.test_model import QWEN3, tiny

SIZES = dict(vocab_size=98, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=6,
             num_key_value_heads=2, rms_norm_eps=1e-5)
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}
PEERS = {       # class, entries beside SIZES, tokens of context
    "Qwen3": ({"head_dim": 10, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, 60),
    "Qwen2": ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, 60),
    "Llama": ({"head_dim": 12, "rope_parameters": {**LLAMA3, "rope_theta": 500.0}}, 150),
    "SmolLM3": ({"no_rope_layers": [1, 0, 0], "pad_token_id": 0,
                 "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, 60),
}
PROMPTS = [torch.randint(98, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (2, 9, 1, 5)]
LIMIT, SEED = 24, 11


def peer(family, tied, dtype=torch.float32, **changes):
    """A transformers model with every weight random, norms and biases too."""
    transformers = pytest.importorskip("transformers")
    entries, context = PEERS[family]
    config = getattr(transformers, f"{family}Config")(
        **SIZES | entries | changes, max_position_embeddings=256, eos_token_id=None, tie_word_embeddings=tied,
        attn_implementation="eager")
    model, source = getattr(transformers, f"{family}ForCausalLM")(config), torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.4, generator=source)
    return model.to(dtype).eval(), context


def save(model, folder, shard="5GB"):
    model.save_pretrained(folder, max_shard_size=shard)
    copy(EMBEDDED / "tokenizer.json", folder)
    return folder


def edit(folder, **entries):
    """Changes entries of config.json; None removes one."""
    raw = json.loads((folder / "config.json").read_text()) | entries
    (folder / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v is not None}))
    return folder


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", PEERS)
def test_a_folder_of_transformers_gives_its_logits_and_its_greedy_tokens(tmp_path, family, tied):
    other, context = peer(family, tied)
    folder = save(other, tmp_path / "one")
    model, _ = load(folder)
    config = model.config
    ids = torch.randint(98, (2, context), generator=torch.Generator().manual_seed(1))
    expected = other(ids).logits
    torch.testing.assert_close(model(ids), expected, atol=2e-4, rtol=0)
    if config.rope_scaling:         # the test's own premise: at this length it matters
        plain, _ = load(edit(folder, rope_parameters={"rope_type": "default", "rope_theta": 500.0}))
        assert (plain(ids) - expected).abs().amax() > 0.1

    settings = dict(max_new_tokens=LIMIT, do_sample=False, pad_token_id=0)
    alone = [other.generate(torch.tensor([p]), **settings)[0, len(p):].tolist() for p in PROMPTS]
    eos = alone[1][6]                                           # so that one ends early
    alone = [ids[:ids.index(eos) + 1] if eos in ids else ids for ids in alone]
    # the test's own premise
    assert min(map(len, alone)) < LIMIT == max(map(len, alone)) and len(set(map(tuple, alone))) == 4

    width = max(map(len, PROMPTS))                              # padded on the left there, on the right here
    padded = torch.tensor([[0] * (width - len(p)) + p for p in PROMPTS])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in PROMPTS])
    together = other.generate(padded, attention_mask=mask, eos_token_id=eos, **settings)[:, width:].tolist()
    assert [row[:len(ids)] for row, ids in zip(together, alone)] == alone
    assert sample(model, PROMPTS, eos, LIMIT, temperature=0).completions() == alone
    assert [sample(model, [p], eos, LIMIT, temperature=0).completions()[0] for p in PROMPTS] == alone


@pytest.mark.parametrize("family, tied", [("Qwen3", True), ("Qwen2", False), ("Llama", False)])
def test_shards_give_the_same_weights_and_files_outside_the_index_are_ignored(tmp_path, family, tied):
    other, _ = peer(family, tied)
    whole, _ = load(save(other, tmp_path / "one"))
    folder = save(other, tmp_path / "many", shard="12KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 3
    save_file({"consolidated.weight": torch.ones(3)}, folder / "consolidated.safetensors")
    model, _ = load(folder)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in whole.state_dict().items())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    (folder / "model-00002-of-{:05d}.safetensors".format(len(list(folder.glob("model-*"))))).unlink()
    with pytest.raises(UserError, match="model-00002"):
        load(folder)


def test_bfloat16_weights_are_widened_without_loss_and_saved_as_float32(tmp_path):
    other, _ = peer("Qwen3", False, torch.bfloat16)
    model, _ = load(save(other, tmp_path / "half"))
    assert all(torch.equal(model.state_dict()[name], value.float())
               for name, value in other.state_dict().items())
    save_model(tmp_path / "saved", model.state_dict(), tmp_path / "half")
    written = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert written["dtype"] == "float32" and "torch_dtype" not in written
    tensors = load_file(tmp_path / "saved" / "model.safetensors")
    assert {str(t.dtype) for t in tensors.values()} == {"torch.float32"}


ABSENT = {      # what of a config may be absent, and stands for transformers' default
    "Llama": ({"num_key_value_heads": 6, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
              ["num_key_value_heads", "rope_parameters", "rms_norm_eps", "tie_word_embeddings"]),
    "SmolLM3": ({"hidden_size": 32, "num_attention_heads": 8, "num_key_value_heads": 4,
                 "num_hidden_layers": 5, "no_rope_layers": None,
                 "rope_parameters": {"rope_type": "default", "rope_theta": 2e6}},
                ["num_key_value_heads", "rope_parameters", "no_rope_layers", "no_rope_layer_interval",
                 "tie_word_embeddings", "layer_types"]),
}


@torch.no_grad()
@pytest.mark.parametrize("family", ABSENT)
def test_absent_entries_mean_what_transformers_takes_them_for(tmp_path, family):
    """transformers 4 leaves out tie_word_embeddings where it is true, and SmolLM3's are tied by default."""
    transformers = pytest.importorskip("transformers")
    changes, absent = ABSENT[family]
    other, context = peer(family, family == "SmolLM3", **changes | {"rms_norm_eps": 1e-6})
    folder = edit(save(other, tmp_path / "one"), **dict.fromkeys(absent))
    assert not set(absent) & json.loads((folder / "config.json").read_text()).keys()
    ids = torch.randint(98, (2, context), generator=torch.Generator().manual_seed(1))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)(ids).logits
    torch.testing.assert_close(load(folder)[0](ids), theirs, atol=2e-4, rtol=0)
    torch.testing.assert_close(other(ids).logits, theirs, atol=2e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("entries", [{"no_rope_layers": [0, 1, 1, 0]}, {"no_rope_layer_interval": 2},
                                     {"no_rope_layer_interval": 1}, {"no_rope_layers": [1, 1, 1, 1]}])
def test_layers_without_rotary_positions_are_those_of_the_config(tmp_path, entries):
    other, context = peer("SmolLM3", False, num_hidden_layers=4, **{"no_rope_layers": None} | entries)
    folder = save(other, tmp_path / "one")
    ids = torch.randint(98, (2, context), generator=torch.Generator().manual_seed(1))
    expected = other(ids).logits
    torch.testing.assert_close(load(folder)[0](ids), expected, atol=2e-4, rtol=0)
    if "no_rope_layer_interval" in entries:         # what transformers writes beside it may be absent
        edit(folder, no_rope_layers=None)
        torch.testing.assert_close(load(folder)[0](ids), expected, atol=2e-4, rtol=0)


@torch.no_grad()
def test_ids_that_the_tokenizer_lacks_are_never_sampled(tmp_path):
    """A vocabulary of 106 over a tokenizer of 98, as Qwen3's of 151,936 over 151,669; here padding dominates.

    It was sampled, decoded to nothing and was trained on.
    """
    other, _ = peer("Qwen3", False, vocab_size=106)
    other.lm_head.weight[98:] *= 9
    folder, unheard = save(other, tmp_path / "one"), list(range(98, 106))
    model, tokenizer = load(folder)
    assert tokenizer.vocab_size == 98
    ids = torch.randint(98, (2, 60), generator=torch.Generator().manual_seed(1))
    expected = other(ids).logits
    assert (expected.argmax(-1) >= 98).float().mean() > 0.5             # the test's own premise
    torch.testing.assert_close(model(ids)[..., :98], expected[..., :98], atol=2e-4, rtol=0)
    assert (log_probs(model(ids), 5.0)[..., 98:].exp() == 0).all()
    settings = dict(max_new_tokens=LIMIT, do_sample=False, pad_token_id=0, suppress_tokens=unheard)
    alone = [other.generate(torch.tensor([p]), **settings)[0, len(p):].tolist() for p in PROMPTS]
    assert sample(model, PROMPTS, (99,), LIMIT, temperature=0).completions() == alone
    drawn = sample(model, PROMPTS, (99,), LIMIT, temperature=5.0, group=8)
    assert drawn.ids.max() < 98
    for prompt, row, logprobs in zip([p for p in PROMPTS for _ in range(8)], drawn.ids, drawn.logprobs):
        logits = other(torch.tensor([prompt + row.tolist()])).logits[0, len(prompt) - 1:-1, :98]
        of_row = (logits / 5.0).log_softmax(-1).gather(-1, row[:, None])[:, 0]
        torch.testing.assert_close(logprobs, of_row, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd", "sampled", "grpo"])
def test_ids_that_the_tokenizer_lacks_are_not_trained(written, kind, tied):
    """Every loss is that of a vocabulary without them; their rows of the projection keep their values."""
    edit(written, tie_word_embeddings=tied)
    tensors = load_file(written / "model.safetensors")
    if tied:
        del tensors["lm_head.weight"]
    save_file(tensors, written / "model.safetensors")
    model, _ = load(written)
    hidden = torch.randn(7, 24, generator=torch.Generator().manual_seed(0))
    target = torch.randn(7, 24, generator=torch.Generator().manual_seed(1)) @ model.lm_head.weight.detach().T
    ids = torch.arange(7)
    if kind == "grpo":
        target = known = torch.arange(7.0) - 3
    else:
        known, target = target[:, :98], target + model.lm_head.bias
    loss = token_loss(kind, model.lm_head(hidden), target, ids, 1.1, 0.5)
    plain = token_loss(kind, hidden @ model.lm_head.weight[:98].T, known, ids, 1.1, 0.5)
    torch.testing.assert_close(loss, plain)
    loss.sum().backward()
    gradient = model.lm_head.weight.grad.clone()
    assert (gradient[98:] == 0).all() and gradient[:98].abs().sum() > 0
    model.zero_grad()
    plain.sum().backward()
    torch.testing.assert_close(gradient, model.lm_head.weight.grad)
    torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0).step()
    save_model(written.parent / "after", dict(model.named_parameters()), written)
    after = load_file(written.parent / "after" / "model.safetensors")
    name = "model.embed_tokens.weight" if tied else "lm_head.weight"
    assert after.keys() == tensors.keys() and torch.equal(after[name][98:], tensors[name][98:])
    assert not torch.equal(after[name], tensors[name])


# From here on without transformers: config.json by hand.
OLD = {"model_type": "llama", **SIZES, "max_position_embeddings": 256, "rope_theta": 5e5,
       "torch_dtype": "float32", "rope_scaling": LLAMA3, "hidden_act": "silu", "sliding_window": None,
       "tie_word_embeddings": False}
NEW = {k: v for k, v in OLD.items() if k not in ("rope_theta", "torch_dtype", "rope_scaling")} | {
    "rope_parameters": {**LLAMA3, "rope_theta": 5e5}, "dtype": "float32",
    "layer_types": ["full_attention"] * 2}


def folder_of(tmp_path, config, text=None):
    (folder := tmp_path / "folder").mkdir(exist_ok=True)
    (folder / "config.json").write_text(text or json.dumps(config))
    return folder


def test_both_spellings_of_a_config_say_the_same(tmp_path):
    """Older files name a scaling's kind `type`; of both entries `rope_scaling` counts, as in transformers."""
    old, new = read_config(folder_of(tmp_path, OLD)), read_config(folder_of(tmp_path, NEW))
    assert old == new and old.rope_scaling == RopeScaling(4, 1, 4, 32) and old.rope_theta == 5e5 \
        and old.head_dim == 4
    older = OLD | {"rope_scaling": {"type": "llama3",
                                    **{k: v for k, v in LLAMA3.items() if k != "rope_type"}}}
    both = OLD | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    assert read_config(folder_of(tmp_path, older)) == read_config(folder_of(tmp_path, both)) == old


REFUSED = {
    "sliding window": ({"use_sliding_window": True, "sliding_window": 4096}, "use_sliding_window"),
    "sliding layers": ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    "yarn": ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'"),
    "linear, old spelling": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear'"),
    "llama3 without a factor": ({"rope_scaling": {"rope_type": "llama3", "low_freq_factor": 1.0}}, "factor"),
    "mixture of experts": ({"model_type": "qwen3_moe"}, "model_type"),
    "quantised": ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "quantization_config"),
    "attention bias": ({"attention_bias": True}, "attention_bias"),
    "mlp bias": ({"mlp_bias": True}, "mlp_bias"),
    "other activation": ({"hidden_act": "gelu"}, "hidden_act"),
    "partial rotary": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "partial rotary, new spelling": ({"rope_scaling": {**LLAMA3, "partial_rotary_factor": 0.5}},
                                     "partial_rotary_factor"),
    "positions per kind of layer": ({"rope_scaling": {"full_attention": LLAMA3}}, "kind of layer"),
    "positions not an object": ({"rope_scaling": "llama3"}, "config.json"),
    "layer types not a list": ({"layer_types": 7}, "layer_types"),
    "too few layers with or without positions": ({"model_type": "smollm3", "no_rope_layers": [1]}, "config"),
    "no interval": ({"model_type": "smollm3", "no_rope_layer_interval": 0}, "config.json"),
    "fewer key heads than fit": ({"num_key_value_heads": 4}, "num_key_value_heads"),
    "odd head": ({"head_dim": 7}, "head_dim"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_refused_by_name(tmp_path, name):
    """`partial_rotary_factor` within `rope_parameters`, where transformers 5 writes it, went unnoticed."""
    change, fact = REFUSED[name]
    read_config(folder_of(tmp_path, OLD))
    with pytest.raises(UserError, match=fact) as refusal:
        read_config(folder_of(tmp_path, OLD | change))
    assert "config.json" in str(refusal.value) and len(str(refusal.value)) < 400


@pytest.mark.parametrize("change", [
    {"hidden_size": 2 ** 30, "head_dim": 64}, {"intermediate_size": 2 ** 31 - 1, "num_hidden_layers": 9},
    {"vocab_size": 2 ** 31 - 1, "hidden_size": 6144}, {"num_hidden_layers": 10 ** 6},
    {"head_dim": 2 ** 15, "num_attention_heads": 2 ** 14, "hidden_size": 2 ** 14}])
def test_absurd_sizes_are_refused_before_a_model_is_made(tmp_path, change, monkeypatch):
    monkeypatch.setattr("sd.llm.checkpoint.Transformer", lambda config: pytest.fail("made a model"))
    with pytest.raises(UserError, match=f"config.json.*({'|'.join(change)}) must be"):
        load(folder_of(tmp_path, OLD | change))


def test_any_value_of_any_entry_is_understood_or_refused(tmp_path):
    """A string for `rope_scaling` or a number for `layer_types` ended in a traceback."""
    odd = [None, True, False, 0, -1, 2, 3.5, 1e400, float("nan"), 10 ** 30, "", "x", [], [1], [[]], {},
           {"factor": [1]}]
    more, understood = {name: None
                        for name in ("head_dim", "attention_bias", "mlp_bias", "use_sliding_window")}, 0
    smollm3 = NEW | {"model_type": "smollm3", "no_rope_layers": [1, 0], "no_rope_layer_interval": 2}
    for base in (OLD, NEW | {"model_type": "qwen3"}, smollm3):
        for name in base | more:
            for value in odd:
                try:
                    read_config(folder_of(tmp_path, base | {name: value}))
                    understood += 1
                except UserError:
                    pass
    assert 50 < understood < 500


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '"x"', "[" * 100_000, '{"model_type": ' + "[" * 100_000,
                                  "\0", "{}"])
def test_a_config_that_is_none_is_refused(tmp_path, text):
    with pytest.raises(UserError, match="config.json"):
        read_config(folder_of(tmp_path, None, text or " "))


@pytest.fixture
def written(tmp_path):
    """A whole folder with one file of weights, without transformers."""
    (source := tmp_path / "source").mkdir()
    copy(EMBEDDED / "tokenizer.json", source)
    (source / "config.json").write_text(json.dumps({"model_type": "qwen3", **asdict(QWEN3)}))
    save_model(tmp_path / "folder", dict(tiny(QWEN3).named_parameters()), source)
    return tmp_path / "folder"


def test_two_projections_that_a_config_ties_are_refused_if_they_differ(written):
    """The file's lm_head was dropped: another model ran, and nothing said so."""
    edit(written, tie_word_embeddings=True)
    with pytest.raises(UserError, match="config.json: tie_word_embeddings.*lm_head.weight"):
        load(written)
    tensors = load_file(written / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()},
              written / "model.safetensors")
    model, _ = load(written)                    # some tools write both
    assert model.lm_head.weight is model.model.embed_tokens.weight
    del tensors["model.embed_tokens.weight"]
    save_file(tensors, written / "model.safetensors")
    with pytest.raises(UserError, match="embed_tokens"):
        load(written)


def test_buffers_that_old_files_hold_are_ignored(written):
    whole, _ = load(written)
    tensors = load_file(written / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(5)
    save_file(tensors, written / "model.safetensors")
    model, _ = load(written)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in whole.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn, torch.bool,
                                   torch.float8_e5m2])
def test_quantised_weights_are_refused_not_cast(written, dtype):
    """Their scales lie in other tensors: cast alone they are noise, which ran without a word."""
    tensors = load_file(written / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].to(dtype)
    save_file(tensors, written / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors.*model\.layers\.1\.mlp\.up_proj\.weight.*quant"):
        load(written)


def test_all_files_of_a_folder_have_the_users_permissions(written):
    """safetensors replaces the file with one only its owner can read: colleagues could not open the model."""
    assert len({path.stat().st_mode for path in written.iterdir()}) == 1


def test_a_config_for_more_memory_than_there_is_takes_none(written):
    """The sizes are the largest that are believed; the weights in the folder are small."""
    raw = json.loads((written / "config.json").read_text())
    (written / "config.json").write_text(json.dumps(raw | LARGEST | {"num_hidden_layers": 2}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="model.safetensors.*config.json asks for"):
        load(written)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000     # KiB


def index(folder, files):
    text = files if isinstance(files, str) else json.dumps({"weight_map": files})
    (folder / "model.safetensors.index.json").write_text(text)


@pytest.mark.parametrize("name", ["../x.safetensors", "sub/x.safetensors", "/tmp/x.safetensors", "..",
                                  "x.bin", "", 7, None, "x\0.safetensors", "missing.safetensors"])
def test_an_index_may_only_name_safetensors_files_of_its_folder(written, name):
    copy(written / "model.safetensors", written.parent / "x.safetensors")       # it would load
    index(written, {tensor: name for tensor in dict(tiny(QWEN3).named_parameters())})
    with pytest.raises(UserError):
        load(written)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"weight_map": []}', '{"weight_map": {}}', "[" * 100_000])
def test_a_broken_index_is_refused(written, text):
    index(written, text)
    with pytest.raises(UserError):
        load(written)


@pytest.mark.parametrize("data", [
    b"", b"\0" * 8, struct.pack("<Q", 2 ** 62) + b"{}", struct.pack("<Q", 2 ** 63 + 5),
    struct.pack("<Q", 200) + b"{}", struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 90_000) + b"[" * 90_000,
    *(struct.pack("<Q", len(header)) + header for header in [
        b'{"model.norm.weight":{"dtype":"F32","shape":[%d],"data_offsets":[0,%d]}}' % sizes
        for sizes in ((2 ** 50, 2 ** 52), (24, 2 ** 52), (2 ** 63, 8), (24, 96))])])
def test_a_file_of_weights_that_lies_about_its_size_is_refused(written, data):
    """An absurd header length must not be believed and allocated."""
    (written / "model.safetensors").write_bytes(data)
    with pytest.raises(UserError, match="model.safetensors"):
        load(written)


@pytest.mark.parametrize("change", ["lacks", "more", "shape"])
def test_tensors_that_do_not_fit_the_config_are_named(written, change):
    tensors = load_file(written / "model.safetensors")
    if change == "lacks":
        del tensors["model.layers.1.mlp.up_proj.weight"]
    else:
        tensors["model.layers.1.mlp.up_proj.weight" if change == "shape" else
                "model.layers.2.mlp.up_proj.weight"] = torch.ones(4, 4)
    save_file(tensors, written / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.layers\.[12]\.mlp\.up_proj\.weight"):
        load(written)


@pytest.mark.parametrize("gap", [False, True])
def test_a_tokenizer_that_reaches_beyond_the_vocabulary_is_refused(written, gap):
    """With a gap in its ids a tokenizer has few tokens, but their numbers are too large for the embedding."""
    raw = json.loads((written / "tokenizer.json").read_text())
    raw["model"]["vocab"] |= {"far": 1000} if gap else {f"more{i}": 1000 + i for i in range(30)}
    (written / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match="tokenizer.json"):
        load(written)


@pytest.mark.parametrize("text", ["", "{}", "[]", "[" * 100_000, "7"])
def test_a_tokenizer_that_is_none_is_refused(written, text):
    (written / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match="tokenizer.json"):
        load(written)


def test_a_file_is_never_seen_half_written(tmp_path):
    """Whoever reads while it is written again and again sees the old text or the new one, whole."""
    path, size, seen = tmp_path / "file", 2 ** 21, set()
    write_atomic(path, "a" * size)
    writer = threading.Thread(target=lambda: [write_atomic(path, letter * size) for letter in "bcd" * 8])
    writer.start()
    while writer.is_alive():
        text = path.read_text()
        assert text == text[:1] * size
        seen.add(text[0])
    writer.join()
    assert path.read_text() == "d" * size and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_companions_are_copied_as_they_are(tmp_path):
    """merges.txt of some old tokenizers may be no UTF-8: bytes are copied, not text."""
    source, odd = tmp_path / "source", b"\xff\xfe\r\n\x00"
    shutil.copytree(EMBEDDED, source)
    (source / "merges.txt").write_bytes(odd)
    model, _ = load(source)
    save_model(tmp_path / "copy", dict(model.named_parameters()), source)
    assert (tmp_path / "copy/merges.txt").read_bytes() == odd
    assert (tmp_path / "copy/tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
