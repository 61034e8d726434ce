"""The plan against the memory that runs on a CPU take, and for the paper's model from config.json alone."""
import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from shutil import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import sd.run.plan
from sd.llm.checkpoint import load, read_config, save_model
from sd.conditions import Feedback, Teacher, accumulate
from sd.config import PRESETS, Config
from sd.llm.lora import add_lora
from sd.llm.model import Transformer
from sd.run.plan import PROMPT, RUNTIME, flops, needs, parameters, peak, plan, work
from sd.llm.tokenizer import Tokenizer
from sd.problems import EMBEDDED

GIB, NEW = 2 ** 30, 16
QWEN3 = {"model_type": "qwen3", "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28,
         "head_dim": 128, "num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 151936,
         "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1000000,
         "tie_word_embeddings": True, "attention_bias": False}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model of 7 million random weights, deep and narrow: activations dominate and computing is short."""
    base = tmp_path_factory.mktemp("plan")
    (source := base / "source").mkdir()
    copy(EMBEDDED / "tokenizer.json", source)
    (source / "config.json").write_text(json.dumps(QWEN3 | {
        "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 16, "head_dim": 16,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 48000,
        "max_position_embeddings": 512, "tie_word_embeddings": False}))
    torch.manual_seed(0)
    model = Transformer(read_config(source))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.02) if p.dim() > 1 else None
    save_model(base / "model", dict(model.named_parameters()), source)
    tokenizer = Tokenizer(source / "tokenizer.json")
    problem = "1" * (PROMPT - len(tokenizer.student_prompt("")))
    assert len(tokenizer.student_prompt(problem)) == PROMPT
    for split, digit, count in (("train", "1", 20), ("val", "2", 2)):
        line = json.dumps({"problem": problem[1:] + digit, "answer": "1", "solution": "1" * NEW}) + "\n"
        (base / f"{split}.jsonl").write_text(line * count)
    return base


@pytest.fixture(scope="module")
def idle(trainer, tmp_path_factory):
    """What the smallest run takes: the runtime, as far as a forked process counts it, and next to nothing."""
    args = ["--cond", "ref", "--steps", 1, "--batch", 1, "--eval-samples", 1, "--max-new-tokens", NEW]
    assert trainer([*args, "--out", tmp_path_factory.mktemp("idle") / "run"], measured=True)[0] == 0
    return trainer.peak


@pytest.mark.parametrize("name, more", [("full", {"steps": 2}),  # two: from the second on there are moments
                                        ("lora", {"steps": 1, "lora_rank": 8}),
                                        ("recomputed", {"steps": 1, "lora_rank": 8, "recompute": True})])
def test_the_plan_is_what_a_run_takes(base, trainer, idle, name, more):
    config = Config(cond="ref", model=str(base / "model"), data=str(base / "train.jsonl"),
                    val=str(base / "val.jsonl"), batch=8, micro_batch=8, max_new_tokens=NEW, eval_samples=1,
                    out=str(base / name), **more)
    args = []
    for option, value in asdict(config).items():
        if value != getattr(Config(), option):
            args += [f"--{option.replace('_', '-')}"] + ([value] if value is not True else [])
    assert trainer(args, measured=True)[0] == 0
    parts = needs(config)
    taken, planned = trainer.peak - idle, peak(parts) - RUNTIME["cpu"]
    if name != "recomputed":        # the test's own premise
        assert parts["phase: training, activations and logits"] > 0.6 * planned
    assert planned == pytest.approx(taken, rel=0.15), (
        taken / GIB, {part: size / GIB for part, size in parts.items()})


def test_the_plan_knows_what_python_and_pytorch_take(trainer, idle):    # idle: so it has been imported by now
    status = Path(f"/proc/{trainer.server.pid}/status").read_text()
    assert RUNTIME["cpu"] == pytest.approx(1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]), rel=0.15)


@pytest.fixture
def qwen3(tmp_path, monkeypatch):
    """Options of a run of the paper on a GPU, which need not be here; only config.json is."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    (tmp_path / "config.json").write_text(json.dumps(QWEN3))
    return Config(**PRESETS["paper"], cond="ref", model=str(tmp_path))


def test_parameters_of_qwen3_1_7b_are_counted_without_its_weights(qwen3, tmp_path):
    C, heads, keys, inner = 2048, 16 * 128, 8 * 128, 6144
    projections = 28 * (2 * C * heads + 2 * C * keys + 3 * C * inner)
    pairs = 28 * (2 * (C + heads) + 2 * (C + keys) + 3 * (C + inner))
    total = 151936 * C + projections + 28 * (2 * C + 2 * 128) + C
    assert parameters(read_config(tmp_path)) == (total, projections, pairs) and total == 1_720_574_976
    parts = needs(qwen3)
    assert (parts["weights"] == 2 * total
            and parts["AdamW's moments"] == 2 * parts["gradients"] == 2 * 4 * 64 * pairs)


def test_the_papers_setting_in_24_gib(qwen3):
    """At the old count the critic, the initial policy with a long prompt, was free of charge."""
    assert "fits 24 GiB" in plan(qwen3, 24)
    token = 2 * 28 * 8 * 128 * 2                                    # of the key/value cache, in bfloat16
    assert needs(qwen3)["phase: sampling, key/value cache"] >= 32 * (PROMPT + 2048) * token
    parts = needs(replace(qwen3, cond="critique"))
    assert parts["phase: the critic's key/value cache"] >= 8 * (3 * 2048 + PROMPT) * token
    assert "does not fit 24 GiB" in plan(replace(qwen3, lora_rank=0, dtype="float32"), 24)


@pytest.mark.parametrize("more, part, factor", [
    ({"sample_batch": 16}, "phase: sampling, key/value cache", 0.5),
    ({"batch": 16, "sample_batch": 64}, "weights", 1),
    ({"micro_batch": 1}, "phase: the teacher's forward pass", 0.5), ({"lora_rank": 32}, "gradients", 0.5),
    ({"lora_rank": 32}, "weights", 1), ({"teacher": "ema"}, "weights", 1),
    ({"sample_batch": 1, "micro_batch": 2}, "phase: training, activations and logits", 1)])
def test_parts_follow_the_options(qwen3, more, part, factor):
    """--micro-batch counted only up to --sample-batch, though rollouts are scored all the same."""
    assert needs(replace(qwen3, **more))[part] == pytest.approx(factor * needs(qwen3)[part], rel=0.01)


def test_parts_come_and_go_with_their_options(qwen3):
    base = needs(qwen3)
    assert all("self-teacher" not in needs(replace(qwen3, **more))
               for more in ({}, {"teacher": "live"}, {"cond": "grpo"}))
    ema = needs(replace(qwen3, cond="critique", teacher="ema"))     # the critic is the student, adapter off
    assert ema["self-teacher"] == base["adapter"]
    whole = needs(replace(qwen3, cond="critique", teacher="ema", lora_rank=0, dtype="float32"))
    assert whole["self-teacher"] == 2 * whole["weights"]            # and the initial policy, of full size
    training = "phase: training, activations and logits"
    assert needs(replace(qwen3, recompute=False))[training] > 5 * base[training]
    short = [needs(replace(qwen3, max_new_tokens=128, **more))[training]
             for more in ({"divergence": "jsd"}, {}, {"cond": "grpo"})]
    assert short[0] > short[1] > short[2]               # else a layer's activations are more than the logits
    assert ("critic" not in base
            and needs(replace(qwen3, cond="critique", critic=qwen3.model))["critic"] == base["weights"])


def test_packed_weights_count_where_a_model_is_large_enough_to_be_packed(monkeypatch):
    """Of the critic by its own size. What is packed is every matrix but the embedding."""
    shape, phases = read_config(EMBEDDED), ("phase: sampling, key/value cache",
                                            "phase: the critic's key/value cache")
    linear = sum(m.weight.numel() for m in Transformer(shape).modules() if isinstance(m, torch.nn.Linear))
    config, plans = Config(cond="critique", critic=str(EMBEDDED)), []
    for worth in (0, sum(p.numel() for p in Transformer(shape).parameters()) + 1):
        monkeypatch.setattr(sd.run.plan, "PACK_WEIGHTS", worth)
        plans.append(needs(config))
    assert [plans[0][phase] - plans[1][phase] for phase in phases] == [4 * linear] * 2


def test_no_fewer_rollouts_than_a_group_are_sampled_at_once(qwen3):
    """--sample-batch 4 was planned as 4 rows, but an evaluation samples a problem's 12 together."""
    name = "phase: sampling, key/value cache"
    four, twelve = (needs(replace(qwen3, sample_batch=rows))[name] for rows in (4, 12))
    assert qwen3.eval_samples == 12 and four == twelve


def test_two_devices_halve_what_each_samples(qwen3):
    one, two = (needs(replace(qwen3, batch=256, sample_batch=512, eval_samples=1), ranks) for ranks in (1, 2))
    name = "phase: sampling, key/value cache"
    assert two[name] == pytest.approx(one[name] / 2, rel=0.05) and two["weights"] == one["weights"]


@pytest.mark.parametrize("cond, rank, recompute, close", [   # recomputing stops before a layer's last product
    ("grpo", 0, False, 0.02), ("ref", 0, False, 0.02), ("ref", 8, False, 0.15), ("grpo", 0, True, 0.07)])
def test_the_work_of_a_step_is_what_pytorch_counts(cond, rank, recompute, close):
    """Its own counter, on the real loss: no attention on a CPU, but the adapter's products, some percent."""
    config = Config(cond=cond, lora_rank=rank)
    student, _ = load(EMBEDDED)
    shape, student.recompute = student.config, recompute
    if rank:
        add_lora(student, rank, 1.0, 0)
    prompts, completions = [[5] * 100] * 4, [[7] * 150] * 4
    told = Feedback(advantages=[1.0] * 4) if cond == "grpo" else Feedback(teacher_prompts=[[5] * 250] * 4)
    with FlopCounterMode(display=False) as counter:
        accumulate(student, Teacher("base", student, 0.9), prompts, completions, told, config, 600)
    expected = 4 * (flops(shape, 100, 150, 2 if rank else 3, recompute)
                    + (flops(shape, 250, 150, 1) if cond == "ref" else 0))
    passes = (2 if rank else 3) + recompute
    attention = 4 * 2 * 4 * 128 * (passes * 250 ** 2 + (400 ** 2 if cond == "ref" else 0))
    assert expected - attention == pytest.approx(counter.get_total_flops(), rel=close)


def test_the_work_of_a_run_follows_the_options(qwen3):
    """By hand: 282 problems, 7 epochs and 32 a step make 61 steps; at 2 operations per weight and token."""
    token = 2 * 28 * (2 * 2048 * 2048 + 2 * 2048 * 1024 + 3 * 2048 * 6144)
    flop, moved, layers = work(qwen3)["sampling"]
    assert layers == 61 * 2048 * 28
    assert (flop == pytest.approx(61 * 32 * token * (PROMPT + 2048), rel=0.35)
            and flop > 61 * 32 * token * 2048)
    assert moved > 61 * 2048 * 2 * token / 2                # the weights, at every token of 61 batches
    grpo = work(replace(qwen3, cond="grpo"))
    assert (grpo["sampling"] == pytest.approx((8 * flop, 8 * moved, 8 * layers))
            and "teacher" not in grpo and "critic" not in grpo)
    assert work(qwen3, ranks=2)["teacher"][0] == work(qwen3)["teacher"][0] / 2
    assert ("critic" in work(replace(qwen3, cond="critique"))
            and "h\n" in plan(replace(qwen3, device="cuda")) + "\n")
