"""Packed, compiled, captured: the plain form's numbers, a graph per size, no wait per token."""
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Interpreter
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sd.llm.compile
import sd.llm.sampling
from sd import UserError, losses
from sd.llm.compile import Captured, Packed, check_compile, compiled, next_logits, prepared
from sd.llm.lora import add_lora, switch_off
from sd.llm.model import Cache, ModelConfig, Transformer
from sd.llm.sampling import CHECK_EVERY, draw, sample, uniforms

CONFIG = ModelConfig(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                     num_attention_heads=4, num_key_value_heads=2, head_dim=6, rms_norm_eps=1e-6,
                     rope_theta=100.0, max_position_embeddings=64, qk_norm=True, qkv_bias=True)
EOS, LIMIT = (3, 5), 24
PROMPTS = [[int(v) for v in torch.randint(1, 40, (n,), generator=torch.Generator().manual_seed(n))]
           for n in (2, 9, 1, 5, 12)]
LOSSES = ["grpo", "forward", "reverse", "jsd", "sampled"]
OPTIONS = (1.2, 0.3)        # temperature, beta


@pytest.fixture(scope="module")
def model():
    return tiny(CONFIG)


def tiny(config):
    model, source = Transformer(config), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.5, generator=source)
    return model.requires_grad_(False)


def with_adapter(model):
    """As after some training: a new adapter changes nothing."""
    add_lora(model, 4, 8.0, 0)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(len(name)))
    return model


def sampled(model, compile=False, plain=False):
    """Sampled, with the decode step as this device has it, captured, or just as the model computes it."""
    with pytest.MonkeyPatch.context() as patch:
        if plain:
            patch.setattr(sd.llm.sampling, "prepared", lambda model, rows, tokens: model)
        return sample(model, PROMPTS, EOS, LIMIT, 1.3, 2, uniforms(10, LIMIT, 1), compile)


def assert_same(one, other):
    assert one.completions() == other.completions()
    torch.testing.assert_close(one.logprobs, other.logprobs, atol=1e-5, rtol=1e-5)


@pytest.fixture
def pack_all(monkeypatch, model):
    monkeypatch.setattr(sd.llm.compile, "PACK_TOKENS", 0)
    monkeypatch.setattr(sd.llm.compile, "PACK_WEIGHTS", 0)
    assert has_packed(prepared(model, 2, 1))            # the premise


def has_packed(model):
    return any(isinstance(part, Packed) for part in model.modules())


def test_weights_are_packed_where_that_pays_and_works(model, monkeypatch):
    weights = sum(p.numel() for p in model.parameters())
    monkeypatch.setattr(sd.llm.compile, "PACK_WEIGHTS", weights)
    assert has_packed(prepared(model, 2, 16)) and not has_packed(prepared(model, 2, 15))
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert has_packed(prepared(model, 2, 16)) and not has_packed(prepared(tiny(CONFIG).bfloat16(), 2, 16))
    monkeypatch.setattr(sd.llm.compile, "PACK_WEIGHTS", weights + 1)
    assert not has_packed(prepared(model, 2, 16))


@pytest.mark.parametrize("tied", [False, True])
def test_packed_weights_sample_the_same_rollouts(tied, pack_all):
    model = tiny(replace(CONFIG, tie_word_embeddings=tied))
    plain = sampled(model, plain=True)
    assert plain.lengths.min() <= CHECK_EVERY < plain.lengths.max()         # so rows are dropped on the way
    assert_same(sampled(model), plain)
    for p in model.parameters():                # a step of training: what was packed before is stale
        p.data.mul_(1.1)
    assert_same(sampled(model), sampled(model, plain=True))


@pytest.mark.parametrize("on", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights_keep_the_adapter_and_its_switch(on, dtype, monkeypatch):
    model = with_adapter(tiny(CONFIG).to(dtype))
    if not on:
        switch_off(model)

    def logits(form):
        cache = Cache(CONFIG, 5, 4, form.model.embed_tokens.weight)
        with torch.no_grad():
            return next_logits(form, cache, torch.arange(5), torch.zeros(5, dtype=torch.long), 1)
    unpacked = prepared(model, 5, 16)
    assert not has_packed(unpacked) and {p.dtype for p in unpacked.parameters()} == {dtype}
    assert torch.equal(logits(model), logits(unpacked))     # a cast before is the cast at every token
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN packs no bfloat16 on this processor")
    monkeypatch.setattr(sd.llm.compile, "PACK_WEIGHTS", 0)
    packed = prepared(model, 5, 16)
    assert has_packed(packed)
    torch.testing.assert_close(logits(model), logits(packed),
                               atol=1e-5 if dtype == torch.float32 else 0.5, rtol=0.02)
    assert all(p.data_ptr() in {q.data_ptr() for q in model.parameters()} for p in packed.parameters())


@pytest.mark.parametrize("name", LOSSES)
def test_a_compiled_loss_has_the_same_values_and_gradients_for_any_number_of_rows(name):
    torch._dynamo.reset()
    for rows in (1, 32, 33, 5):
        compare(compiled(losses.token_loss), name, rows)    # that backend leaves CPU tensors as they are


def test_no_number_of_rows_is_one_too_many_to_compile():
    """Nine powers of two were more than torch.compile allows, and the run ended at the first lone row."""
    torch._dynamo.reset()
    for rows in (*(2 ** i + 1 for i in range(4, 13)), 1):
        compare(compiled(losses.token_loss), "grpo", rows)


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_is_one_graph_of_tensors_alone_for_all_rows_up_to_a_power_of_two(name, monkeypatch):
    """A number as an input would be a tensor on the CPU, and nothing would be captured on CUDA."""
    torch._dynamo.reset()
    graphs, compile = [], torch.compile

    def backend(graph, inputs):
        graphs.append([tuple(x.shape) for x in inputs])
        return graph.forward

    def recording(function, **options):
        assert options.pop("backend") == "cudagraphs" and options["fullgraph"]
        return compile(function, backend=backend, **options)
    monkeypatch.setattr(torch, "compile", recording)
    loss = compiled.__wrapped__(losses.token_loss)
    for rows in (1, 5, 32, 33, 64, 17, 60):
        compare(loss, name, rows)
    shapes = [(9,), () if name == "grpo" else (9,), ()][:3 if name in ("grpo", "sampled") else 2]
    assert graphs == [[(rows, *shape) for shape in shapes] for rows in (32, 64)]


def compare(loss, name, rows):
    """`loss` against the plain one, and its gradients with a weight of its own for each row."""
    draws = torch.Generator().manual_seed(rows)
    logits, target = torch.randn(2, rows, 9, generator=draws) * 3
    target, ids = target[:, 0] if name == "grpo" else target, torch.randint(9, (rows,), generator=draws)
    results = []
    for function in (loss, losses.token_loss):
        value = function(name, student := logits.clone().requires_grad_(), target, ids, *OPTIONS)
        results.append([value.detach(),
                        *torch.autograd.grad((value * torch.arange(1, rows + 1)).sum(), student)])
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


class Replayed(Captured):
    """A CUDA graph on a CPU: the same operations on the same buffers, for one number of rows and of slots."""
    made = []

    def capture(self, slots):
        run = lambda: next_logits(self.model, self.cache, self.ids, self.positions, slots)
        logits, where = run(), self.cache.k[0].data_ptr()

        class Graph:
            def replay(graph):
                assert self.cache.k[0].data_ptr() == where, "replayed on a cache that is gone"
                logits.copy_(run())
        self.made.append((len(self.ids), slots))
        return Graph(), logits


def test_captured_steps_are_made_anew_for_fewer_rows_or_more_slots_only(model, monkeypatch):
    plain = sampled(model, plain=True)
    monkeypatch.setattr(sd.llm.compile, "SLOTS", 16)
    monkeypatch.setattr(sd.llm.compile, "Captured", Replayed)
    Replayed.made.clear()
    assert_same(sampled(model, compile=True), plain)
    rows, slots = zip(*Replayed.made)
    assert rows[0] == 10 > rows[-1] and set(slots) == {16, 32, 36}          # 36: the whole cache
    assert len(Replayed.made) == len(set(Replayed.made)) < LIMIT / 3


class OnCuda(Interpreter):
    """Runs a graph traced on "meta" on CUDA tensors without data, which PyTorch can do without CUDA."""

    def get_attr(self, target, args, kwargs):
        return without_data(super().get_attr(target, args, kwargs))

    def call_function(self, target, args, kwargs):
        kwargs = {key: "cuda" if value == torch.device("meta") else value for key, value in kwargs.items()}
        out = super().call_function(target, args, kwargs)
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        assert all(t.device.type == "cuda" and all(type(n) is int for n in t.shape) for t in tensors), target
        assert target not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return out


def without_data(tensor):
    assert tensor.device.type == "meta"
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")


def on_cuda(function, *inputs):
    """What `function` of tensors on "meta" gives on CUDA; fails if it moves data off the device or waits."""
    graph = make_fx(function)(*inputs)                  # gradients are operations of the graph, too
    with FakeTensorMode(), torch.no_grad():
        return OnCuda(graph).run(*map(without_data, inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_decode_step_and_the_draw_stay_on_the_device_and_never_wait_for_it(dtype):
    with torch.device("meta"):
        model = Transformer(CONFIG).requires_grad_(False).to(dtype)
        ids, uniform = torch.empty(4, dtype=torch.long), torch.empty(4, dtype=torch.float64)
    cache = Cache(CONFIG, 4, 32, model.lm_head.weight)
    step = lambda ids, uniform: draw(next_logits(model, cache, ids, ids, 32), 1.1, uniform)
    assert [t.shape for t in on_cuda(step, ids, uniform)] == [(4,), (4,)]


@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_their_gradients_stay_on_the_device_and_never_wait_for_it(name):
    def gradient(logits, other, ids):
        student = logits.detach().requires_grad_()
        return torch.autograd.grad(losses.token_loss(name, student, other, ids, *OPTIONS).sum(), student)
    with torch.device("meta"):
        logits, ids = torch.empty(4, 9, dtype=torch.bfloat16), torch.empty(4, dtype=torch.long)
    assert on_cuda(gradient, logits, logits[:, 0] if name == "grpo" else logits, ids)[0].shape == (4, 9)


@pytest.mark.parametrize("moved", [lambda x: x + torch.ones(4).to(x.device), lambda x: x * x.sum().item(),
                                   lambda x: x[x > 0], lambda x: x.cpu()])
def test_what_moves_or_waits_is_found(moved):
    with pytest.raises(Exception):
        on_cuda(moved, torch.empty(4, device="meta"))


def test_sampling_waits_for_the_device_once_in_a_while_and_not_per_token(model):
    class Waits(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
            return func(*args, **(kwargs or {}))
    counts = []
    for tokens in (CHECK_EVERY, 5 * CHECK_EVERY):
        with Waits() as waits:
            sample(model, PROMPTS, -1, tokens, 1.3, 2, uniforms(10, tokens, 1))
        counts.append(waits.count)
    assert counts[1] - counts[0] == 4


def ahead(tmp_path):
    """A loss compiled in a process where something named triton could be imported, and would leave a mark."""
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')")
    code = ("import sys, torch; from sd import losses; from sd.llm.compile import compiled; "
            "x, ids = torch.zeros(2, 5, requires_grad=True), torch.zeros(2).long(); "
            "compiled(losses.token_loss)('forward', x, x.detach(), ids, 1.0, 0.5).sum().backward(); "
            "sys.exit(sys.modules.get('triton') is not None)")
    result = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": f"{tmp_path}:."},
                            cwd=Path(__file__).parents[1], capture_output=True, text=True)
    return result, (tmp_path / "imported").exists()


def test_triton_is_never_imported(ahead):
    """torch.compile imports it where it is installed."""
    result, imported = ahead["test_compile"].result()
    assert result.returncode == 0 and not imported, result.stderr


def test_on_a_cpu_one_sentence_says_that_compile_is_not_for_it():
    check_compile(torch.device("cuda"))
    with pytest.raises(UserError, match="^--compile is for CUDA alone"):
        check_compile(torch.device("cpu"))
