"""Adapters: nothing before training, only they train, merged or apart one model, what the teacher shares."""
import pytest
import torch

from sd.llm.checkpoint import load, save_model
from sd.conditions import Teacher, accumulate
from sd.config import Config
from sd.llm.lora import TARGETS, LoRALinear, add_lora, plain_weights, save_adapter, switch_off
from sd.problems import embedded
from sd.rollouts import Rollout
from sd.steps import parse

from tests.test_model import FAMILIES, QWEN2, QWEN3, some_ids, tiny, write

RANK, ALPHA = 3, 7.0
ROLLOUTS = [Rollout(embedded("val")[0], prompt, completion, torch.zeros(len(completion)), False, parse(""),
                    None, 0.0, teacher_prompt=teacher_prompt)
            for prompt, completion, teacher_prompt in (([5, 1, 7], [4, 6, 2], [5, 1, 6, 6, 7]),
                                                       ([5, 9], [9, 9, 1, 8, 2], [5, 3, 9]))]


def adapted(config=QWEN3, dtype=torch.float32, trained=False):
    """A model of random weights with adapters; `trained`: B is no longer 0."""
    model = tiny(config).to(dtype).requires_grad_()
    add_lora(model, RANK, ALPHA, seed=0)
    if trained:
        source = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.normal_(std=0.3, generator=source)
    return model


def train(student, teacher, steps=3):
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        accumulate(student, teacher, ROLLOUTS, Config(), 8)
        optimizer.step()
        teacher.update(student)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [QWEN3, QWEN2])
def test_an_adapter_that_is_new_or_off_leaves_every_bit_of_the_logits(config, dtype):
    ids = some_ids(2, 11)
    before = tiny(config).to(dtype)(ids)
    student = adapted(config, dtype)
    assert torch.equal(student(ids), before) and before.dtype == dtype
    train(student, Teacher("live", student, 0))
    assert not torch.equal(student(ids), before)
    switch_off(student)
    assert torch.equal(student(ids), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_adapters_train_and_they_are_float32(dtype):
    student = adapted(QWEN2, dtype)
    frozen = {name: p.clone() for name, p in student.named_parameters() if ".lora_" not in name}
    train(student, Teacher("live", student, 0))
    for name, p in student.named_parameters():
        if ".lora_" in name:
            assert p.grad.abs().max() > 0 and p.dtype == p.grad.dtype == torch.float32, name
        else:
            assert p.grad is None and not p.requires_grad and torch.equal(p, frozen[name]) \
                and p.dtype == dtype, name
    adapters = sorted(name.split(".")[-2] for name, p in student.named_parameters() if p.requires_grad)
    assert adapters == sorted(2 * QWEN2.num_hidden_layers * list(TARGETS))


def test_the_product_of_b_and_a_is_scaled_by_alpha_over_rank():
    base, x = torch.nn.Linear(6, 4), torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    weight, bias = base.weight.detach().clone(), base.bias.detach().clone()
    layer = LoRALinear(base, RANK, ALPHA, torch.Generator().manual_seed(1))
    assert layer.lora_A.shape == (RANK, 6) and layer.lora_B.shape == (4, RANK) and not layer.lora_B.any()
    torch.nn.init.normal_(layer.lora_B)
    delta = torch.zeros(4, 6, dtype=torch.float64)
    for r in range(RANK):
        delta += ALPHA / RANK * torch.outer(layer.lora_B[:, r].double(), layer.lora_A[r].double())
    dense = x.double() @ (weight.double() + delta).T + bias.double()
    torch.testing.assert_close(layer(x).double(), dense, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer.merged().double(), weight.double() + delta, atol=1e-6, rtol=1e-5)


def test_the_seed_decides_where_an_adapter_starts():
    one, same, other = (tiny(QWEN3) for _ in range(3))
    for model, seed in ((one, 0), (same, 0), (other, 1)):
        add_lora(model, RANK, ALPHA, seed)
    a, b, c = (model.model.layers[1].mlp.up_proj.lora_A for model in (one, same, other))
    assert torch.equal(a, b) and not torch.equal(a, c)


@FAMILIES
def test_merged_weights_give_the_same_logits_here_and_in_transformers(tmp_path, family, config):
    folder, _ = write(tmp_path, family, config)
    student, ids = adapted(config, trained=True), some_ids(2, 11)
    save_model(tmp_path / "merged", plain_weights(student), folder)
    save_adapter(tmp_path / "merged", student, str(folder))
    merged, _ = load(tmp_path / "merged")
    of_merged = merged(ids)[..., :82]               # the folder's tokenizer knows no more
    of_student = student(ids)[..., :82]
    # its own premise: the adapter does something
    assert (of_merged - tiny(config)(ids)[..., :82]).abs().max() > 0.1
    torch.testing.assert_close(of_merged, of_student, atol=1e-5, rtol=1e-5)
    transformers = pytest.importorskip("transformers")
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(other(ids).logits, student(ids), atol=2e-4, rtol=1e-4)


@FAMILIES
def test_the_adapter_alone_opens_in_peft_over_the_base_folder(tmp_path, family, config):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    folder, _ = write(tmp_path, family, config)
    student, ids = adapted(config, trained=True), some_ids(2, 11)
    save_adapter(tmp_path / "saved", student, str(folder))
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    other = peft.PeftModel.from_pretrained(base, tmp_path / "saved" / "adapter")
    torch.testing.assert_close(other(ids).logits, student(ids), atol=2e-4, rtol=1e-4)


def test_without_an_adapter_no_adapter_is_written(tmp_path):
    save_adapter(tmp_path, tiny(QWEN3), "base")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("config", [QWEN3, QWEN2])
def test_the_base_teacher_is_the_student_with_its_adapter_off_and_stays_the_initial_policy(config):
    student, ids = adapted(config), some_ids(2, 11)
    before, teacher = student(ids).detach(), Teacher("base", student, 0)
    mine = dict(teacher.model.named_parameters())
    assert all(p.data_ptr() == mine[name].data_ptr() for name, p in student.named_parameters())
    train(student, teacher)
    assert torch.equal(teacher.model(ids), before) and not torch.equal(student(ids), before)
    assert any(p.requires_grad for p in student.parameters())


def test_the_moving_average_follows_the_adapters_alone():
    student = adapted(trained=True)
    ema, live = Teacher("ema", student, 0.9), Teacher("live", student, 0.9)
    old = {name: p.detach().clone() for name, p in student.named_parameters()}
    with torch.no_grad():
        for name, p in student.named_parameters():
            if ".lora_" in name:
                p.add_(1.0)
    ema.update(student)
    live.update(student)
    for name, p in ema.model.named_parameters():
        new = dict(student.named_parameters())[name]
        assert torch.equal(old[name], new) and p is new if ".lora_" not in name else p is not new
        torch.testing.assert_close(p.detach(), 0.9 * old[name] + 0.1 * new.detach())
    assert live.model is student
