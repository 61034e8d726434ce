"""Packed, compiled, captured: the plain form's numbers, a graph per size, no wait per token."""
import os
import subprocess
import sys
import weakref
from contextlib import nullcontext
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
from sd.llm.compile import Packed, check_compile, compiled, decode_step, next_logits, prepared
from sd.llm.lora import add_lora, switch_off
from sd.llm.model import Cache, ModelConfig, Transformer
from sd.llm.sampling import CHECK_EVERY, draw, sample, uniforms
from tests.cpu_graphs import WAITING, cpu_graphs

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
def fresh():
    """Nothing is traced yet."""
    torch._dynamo.reset()
    compiled.cache_clear()


@pytest.fixture
def graphs(fresh):
    """The path of CUDA on a CPU; all graphs that have been captured."""
    with cpu_graphs() as made:
        yield made


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
def test_a_loss_is_traced_once_for_any_number_of_rows_with_equal_values_and_gradients(name, fresh):
    loss = compiled(losses.token_loss)
    compare(loss, name, 5)
    with torch.compiler.set_stance("fail_on_recompile"):
        for rows in (1, 32, 33, *(2 ** i + 1 for i in range(6, 13))):
            compare(loss, name, rows)


@pytest.mark.parametrize("name", LOSSES)
def test_a_captured_loss_is_one_cuda_graph_each_way_up_to_a_power_of_two(name, graphs):
    loss = compiled(losses.token_loss)
    for rows in (1, 5, 32, 33, 64, 17, 60):
        compare(loss, name, rows)
    assert len(graphs) == 4


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


@pytest.mark.parametrize("adapted", [False, True])
def test_the_decode_step_is_traced_once_for_all_lengths_rows_and_weights(adapted, fresh, monkeypatch):
    monkeypatch.setattr(sd.llm.compile, "SLOTS", 16)
    first, other = (with_adapter(tiny(CONFIG)) if adapted else tiny(CONFIG) for _ in range(2))
    sample(first, [[1], [2]], (), 2, compile=True)
    with torch.compiler.set_stance("fail_on_recompile"):
        for model, prompts, tokens in ((first, PROMPTS, 24), (other, PROMPTS[1:3], 40), (other, PROMPTS * 3, 9)):
            inputs = model, prompts, (), tokens, 0.7, 2
            assert_same(sample(*inputs, compile=True), sample(*inputs))


def test_one_row_alone_has_a_trace_of_its_own(model, fresh):
    for prompts in (PROMPTS, PROMPTS[:1]):
        assert_same(sample(model, prompts, EOS, LIMIT, compile=True), sample(model, prompts, EOS, LIMIT))
    with torch.compiler.set_stance("fail_on_recompile"):
        for prompts in (PROMPTS[1:], PROMPTS[-1:]):
            sample(model, prompts, EOS, LIMIT, compile=True)


def test_cuda_graphs_sample_the_same_rollouts_and_are_few(graphs, monkeypatch):
    """One is captured for fewer rows, more slots or other addresses; its second half, a backward pass, is empty."""
    monkeypatch.setattr(sd.llm.compile, "SLOTS", 16)
    model = tiny(CONFIG)
    for _ in range(2):
        plain = sampled(model, plain=True)
        assert len(set((plain.lengths / CHECK_EVERY).ceil().tolist())) > 1      # so rows are dropped on the way
        assert_same(sampled(model, compile=True), plain)
        for p in model.parameters():        # a step of training: other weights at the same addresses
            p.mul_(1.1)
    assert 2 * 2 * 3 <= len(graphs) < 2 * 2 * LIMIT / 3


def test_cuda_graphs_read_weights_and_cache_in_place(model, graphs, monkeypatch):
    """Only ids and positions are copied, into buffers of the graph's own: the caller's stay as they are."""
    copied, make = [], torch.cuda.make_graphed_callables
    monkeypatch.setattr(torch.cuda, "make_graphed_callables",
                        lambda function, buffers: copied.extend(buffers) or make(function, buffers))
    with torch.inference_mode():
        cache, other = (Cache(CONFIG, 3, 9, model.lm_head.weight) for _ in range(2))
        step, at = decode_step(model, cache, True), torch.tensor([0, 1, 2])
        given = []
        for ids in torch.randint(40, (4, 3)):
            torch.testing.assert_close(step(ids, at, 4), next_logits(model, other, ids, at, 9))
            assert all(map(torch.equal, cache.k + cache.v, other.k + other.v))
            given.append((ids, at, ids.clone(), at.clone()))
            at = at + 1
    assert all(torch.equal(a, c) and torch.equal(b, d) for a, b, c, d in given)
    assert [t.dtype for t in copied] == [torch.long] * 2


def test_no_more_than_a_few_cuda_graphs_stay_in_memory(model, graphs, monkeypatch):
    monkeypatch.setattr(sd.llm.compile, "GRAPHS", 3)
    with torch.inference_mode():
        for slots in range(5, 16):
            step = decode_step(model, Cache(CONFIG, 3, slots, model.lm_head.weight), True)
            step(torch.ones(3, dtype=torch.long), torch.zeros(3, dtype=torch.long), 1)
            assert sum(graph() is not None for graph in graphs) <= 2 * 3


def test_a_cuda_graph_does_not_keep_the_cache_that_it_reads(model, graphs, monkeypatch):
    """Else there would be two caches while rows are dropped."""
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool: nullcontext())     # records no tensors
    with torch.inference_mode():
        cache = Cache(CONFIG, 3, 9, model.lm_head.weight)
        decode_step(model, cache, True)(torch.ones(3, dtype=torch.long), torch.zeros(3, dtype=torch.long), 1)
        layer = weakref.ref(cache.k[0])
        cache.select(torch.tensor([0, 2]))
    assert layer() is None and graphs[0]() is not None


class OnCuda(Interpreter):
    """Runs a graph traced on "meta" on CUDA tensors without data, which PyTorch can do without CUDA."""

    def get_attr(self, target, args, kwargs):
        return without_data(super().get_attr(target, args, kwargs))

    def call_function(self, target, args, kwargs):
        kwargs = {key: "cuda" if value == torch.device("meta") else value for key, value in kwargs.items()}
        out = super().call_function(target, args, kwargs)
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        assert all(t.device.type == "cuda" and all(type(n) is int for n in t.shape) for t in tensors), target
        assert target not in WAITING
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
            self.count += func in WAITING
            return func(*args, **(kwargs or {}))
    counts = []
    for tokens in (CHECK_EVERY, 5 * CHECK_EVERY):
        with Waits() as waits:
            sample(model, PROMPTS, -1, tokens, 1.3, 2, uniforms(10, tokens, 1))
        counts.append(waits.count)
    assert counts[1] - counts[0] == 4


def ahead(tmp_path):
    """Decode step and loss compiled in a process where something named triton could be imported, and would leave a mark."""
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')")
    code = ("import sys, torch; from sd import losses; from sd.llm.compile import compiled; "
            "from tests.test_compile import CONFIG, sample, tiny; "
            "sample(tiny(CONFIG), [[1], [2]], (), 2, compile=True); "
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
