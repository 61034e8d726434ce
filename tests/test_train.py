"""train.py's loop against one written out, which takes the same steps from the logged rollouts."""
import json
from copy import deepcopy

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train
from sd import rollouts as records
from sd.llm.checkpoint import load
from sd.problems import EMBEDDED, embedded
from sd.llm.sampling import Sampled
from sd.prompts import student_prompt, teacher_prompt

LR, CLIP, DECAY, TEMPERATURE = 1e-3, 0.3, 0.5, 1.1
# wrong, but what the solver answers in one rollout of four, so that most groups have an advantage
PROBLEMS = [{"problem": "11*11 + 3*3 + 2*4", "answer": "140"}, {"problem": "3*8 + 3*3 + 2*4", "answer": "49"}]


@pytest.fixture
def data(tmp_path):
    """Options for two problems to train on."""
    path = tmp_path / "two.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PROBLEMS))
    return ["--data", path, "--val", EMBEDDED / "val.jsonl", "--eval-samples", 1, "--eval-every", 9]


def logs(run):
    """The rows of a run's steps: numbers and rollouts."""
    numbers, rollouts = ([json.loads(line) for line in (run / name).read_text().splitlines()]
                         for name in ("metrics.jsonl", "rollouts.jsonl"))
    return [row for row in numbers if "loss" in row], rollouts


def log_probs(model, prompt, ids):
    """(T, V) of one rollout."""
    return (model(torch.tensor([prompt + ids]))[0, len(prompt) - 1:-1] / TEMPERATURE).log_softmax(-1)


@pytest.mark.parametrize("cond", ["grpo", "ref", "critique"])
def test_three_steps_are_those_of_the_plain_loop(cond, tmp_path, here, data):
    """With a clip that cuts, and a teacher that moves. All four rollouts of a step are in its log."""
    given = ["--batch", 2, "--group", 2, *data] if cond == "grpo" else ["--batch", 4, "--eval-samples", 1]
    code, text = here("--cond", cond, *given, "--steps", 3, "--lr", LR, "--clip", CLIP, "--teacher", "ema",
                      "--ema-decay", DECAY, "--out", tmp_path / "run")
    assert code == 0, text
    numbers, rollouts = logs(tmp_path / "run")
    solutions, truths = ({p.id: p.solution for p in embedded("train")},
                         {row["problem"]: row["answer"] for row in PROBLEMS})
    student, tokenizer = load(EMBEDDED)
    teacher = deepcopy(student)
    optimizer = torch.optim.AdamW(student.parameters(), lr=LR, betas=(0.9, 0.999), weight_decay=0)
    norms = []
    for step in (1, 2, 3):
        rows, loss, surprise = [row for row in rollouts if row["step"] == step], 0, 0
        assert len(rows) == 4
        rewards = torch.tensor([row["reward"] for row in rows])         # (4)
        if cond == "grpo":
            assert rewards.tolist() == [f"<answer> {truths[row['problem']]} </answer>" in row["trace"]
                                        for row in rows]
        (a, b), (c, d) = rewards.view(2, 2).tolist()    # of two, the better has 1, the other -1
        for row, advantage in zip(rows, (a - b, b - a, c - d, d - c)):
            ids = tokenizer.encode(row["trace"]) + ([] if row["truncated"] else [tokenizer.eos[0]])
            assert len(ids) == row["tokens"]
            logp = log_probs(student, student_prompt(tokenizer, row["problem"]), ids)
            surprise -= logp[range(len(ids)), ids].sum().item()
            if cond == "grpo":
                loss -= advantage * logp[range(len(ids)), ids].sum()
            else:
                context = solutions[row["id"]] if cond == "ref" else row["critique"]
                prompt = teacher_prompt(tokenizer, row["problem"], cond, context)
                told = log_probs(teacher, prompt, ids).detach()
                loss += (told.exp() * (told - logp)).sum()
        tokens = sum(row["tokens"] for row in rows)
        loss = loss / tokens
        optimizer.zero_grad()
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in student.parameters()]).norm()
        norms.append(norm.item())
        for p in student.parameters():
            p.grad *= min(1, CLIP / norm)
        if norms[-1]:                           # without any signal AdamW's momentum rests, too
            optimizer.step()
        with torch.no_grad():
            for mine, new in zip(teacher.parameters(), student.parameters()):
                mine.copy_(DECAY * mine + (1 - DECAY) * new)
        signal = np.mean([a != b, c != d]) if cond == "grpo" else 1      # share of groups that teach something
        logged = numbers[step - 1]
        for name, expected in (("loss", loss.item()), ("grad_norm", norms[-1]),
                               ("entropy", surprise / tokens), ("reward", rewards.mean().item()),
                               ("signal", signal)):
            assert logged[name] == pytest.approx(expected, rel=1e-3, abs=1e-6), (step, name)
    assert max(norms) > CLIP                    # the premise: something was cut off
    written = load_file(tmp_path / "run/last/model.safetensors")
    begun = dict(load(EMBEDDED)[0].named_parameters())
    for name, p in student.named_parameters():  # in all: AdamW makes a step of rounding where there is no more
        assert (written[name] - p).norm() < 1e-3 * (p - begun[name]).norm(), name


def test_each_epoch_is_a_shuffle_of_its_own_in_one_stream():
    config = train.Config("ref", epochs=3)
    order = train.data_order(config, 50)
    epochs = [order[i:i + 50] for i in (0, 50, 100)]
    assert len(order) == 150 and all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    other = train.Config("ref", epochs=3, seed=1)
    assert order == train.data_order(config, 50) != train.data_order(other, 50)


def test_each_step_and_seed_samples_anew(tmp_path, here, data):
    traces = set()
    for seed in (0, 1):
        code, text = here("--cond", "grpo", *data, "--batch", 2, "--group", 2, "--steps", 2, "--lr", 1e-12,
                          "--seed", seed, "--out", tmp_path / f"seed-{seed}")
        assert code == 0, text
        rows = sorted(logs(tmp_path / f"seed-{seed}")[1], key=lambda row: row["problem"])
        traces |= {tuple(row["trace"] for row in rows if row["step"] == step) for step in (1, 2)}
    assert len(traces) == 4


@pytest.mark.parametrize("text, cut, reward", [("<answer> 140 </answer>", False, 1),
                                               ("<answer> 140", True, 0)])
def test_an_answer_that_was_cut_off_earns_nothing(text, cut, reward, tmp_path, here, data, monkeypatch):
    """It might have gone on: 140 may be the beginning of 1400."""
    ids = load(EMBEDDED)[1].encode(text)

    def fixed(model, prompts, eos, tokens, temperature, group, *rest):
        n = len(prompts) * group
        return Sampled(torch.tensor([ids] * n), torch.full((n,), len(ids)), torch.zeros(n, len(ids)),
                        torch.full((n,), cut))

    monkeypatch.setattr(records, "sample", fixed)
    code, said = here("--cond", "grpo", "--group", 2, "--batch", 2, "--steps", 1, *data,
                      "--out", tmp_path / "run")
    assert code == 0, said
    numbers, rollouts = logs(tmp_path / "run")
    assert [row["reward"] for row in rollouts if row["problem"] == PROBLEMS[0]["problem"]] == [reward] * 2
    assert numbers[0]["reward"] == reward / 2       # the other problem has another answer
