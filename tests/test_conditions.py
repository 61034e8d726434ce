"""A batch's loss against a dense one with (B, T, V) logits and masks: values, gradients, what they teach."""
import pytest
import torch

import train
from sd import UserError
from sd.answers import equal, final_answer
from sd.conditions import Teacher, accumulate, feedback
from sd.config import Config
from sd.llm.model import ModelConfig, Transformer
from sd.llm.sampling import sample, uniforms
from sd.llm.tokenizer import Tokenizer
from sd.problems import EMBEDDED, Problem, embedded
from sd.prompts import student_prompt, teacher_prompt
from sd.rollouts import Critique, Rollout
from sd.steps import parse

SIZES = ModelConfig(11, 16, 24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=6,
                    rms_norm_eps=1e-6, rope_theta=100.0, max_position_embeddings=64, qk_norm=True)
EOS, BETA, TEMPERATURE = 2, 0.3, 1.4
PROMPTS = [[5, 1, 7], [5, 9], [5, 3, 3, 8, 1, 6], [5, 1, 7], [5, 4, 10, 1]]
COMPLETIONS = [[4, 6, EOS], [9, 9, 1, 8, 3, 7, EOS], [EOS], [3, 10, 1, 1, 6], [8, EOS]]
CONTEXTS = [[6, 6, 1, 8], [3], [10, 9, 8, 7, 6, 4, 3, 1, 1], [4, 4], [7, 8, 3, 1, 9, 6]]
TEACHER_PROMPTS = [prompt[:-1] + context + prompt[-1:]          # all longer
                   for prompt, context in zip(PROMPTS, CONTEXTS)]
ADVANTAGES = [1.5, -0.5, 0.7, 0.0, -1.2]
DIVERGENCES = ("forward", "reverse", "jsd", "sampled")
LOSSES = (*DIVERGENCES, "grpo")


def record(problem, text, truncated=False, prompt=(), completion=(), **feedback):
    """A rollout that says `text`, and what feedback has added to it."""
    trace = parse(text)
    answer = final_answer(trace, truncated)
    return Rollout(problem, list(prompt), list(completion), torch.zeros(len(completion)), truncated, trace,
                   answer, float(equal(answer, problem.answer)), **feedback)


def told(name, given=None, prompts=PROMPTS, completions=COMPLETIONS):
    """Sampled with the advantages or teacher prompts `given` (by default those above)."""
    field, given = (("advantage", given or ADVANTAGES) if name == "grpo" else
                    ("teacher_prompt", given or TEACHER_PROMPTS))
    return [record(Problem("id", "", ""), "", False, prompt, completion, **{field: value})
            for prompt, completion, value in zip(prompts, completions, given)]


def tiny(seed):
    model, source = Transformer(SIZES), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.5, generator=source)
    return model


def run(name, student, teacher, rollouts=None, **options):
    """Loss and gradients of `accumulate`."""
    student.zero_grad()
    rollouts = rollouts or told(name)
    config = Config(divergence=name.replace("grpo", "forward"), beta=BETA, temperature=TEMPERATURE, **options)
    tokens = sum(len(r.completion) for r in rollouts if r.in_normaliser)
    value = accumulate(student, None if name == "grpo" else teacher, rollouts, config, tokens)
    return value, [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in student.parameters()]


def dense_logp(model, prompts):
    """(B, T-1, V) log-probabilities of the next token, the mask (B, T-1) of completions, the next tokens."""
    width = max(len(p) + len(c) for p, c in zip(prompts, COMPLETIONS))
    ids = torch.tensor([(p + c + [9] * width)[:width] for p, c in zip(prompts, COMPLETIONS)])
    start, end = (torch.tensor([[len(p) + n * len(c)] for p, c in zip(prompts, COMPLETIONS)]) for n in (0, 1))
    predicted = torch.arange(1, width)                              # position i predicts token i + 1
    return ((model(ids)[:, :-1] / TEMPERATURE).log_softmax(-1), (predicted >= start) & (predicted < end),
            ids[:, 1:])


def dense(name, student, teacher):
    """The same as `run`, all rows at once and without care for memory."""
    logp, mask, ids = dense_logp(student, PROMPTS)
    teacher_logp, teacher_mask, _ = dense_logp(teacher, TEACHER_PROMPTS)
    log_p, log_q = logp[mask], teacher_logp[teacher_mask].detach()                                  # (M, V)
    p, q, token = log_p.exp(), log_q.exp(), log_p.gather(1, ids[mask][:, None])
    middle, surprise = ((BETA * q + (1 - BETA) * p).log(),
                        (log_p - log_q).gather(1, ids[mask][:, None]).detach())
    rewarded = torch.tensor(ADVANTAGES)[:, None].expand(mask.shape)[mask][:, None]     # (M, 1)
    loss = {"forward": q * (log_q - log_p), "reverse": p * (log_p - log_q), "sampled": surprise * token,
            "jsd": BETA * q * (log_q - middle) + (1 - BETA) * p * (log_p - middle),
            "grpo": -rewarded * token}[name].sum() / mask.sum()
    return loss.item(), list(torch.autograd.grad(loss, list(student.parameters())))


def assert_same(one, other):
    assert one[0] == pytest.approx(other[0], abs=1e-5)
    torch.testing.assert_close(one[1], other[1], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("kind", ["base", "live"])
def test_loss_and_gradient_equal_the_dense_version_for_any_micro_batch(name, kind):
    """`live` scores by the student's weights, detached in the dense version: the teacher gets no gradient."""
    student = tiny(0)
    teacher = Teacher(kind, student if kind == "live" else tiny(8), 0)
    expected = dense(name, student, teacher.model)
    for micro_batch in (1, 3, 64):
        assert_same(run(name, student, teacher, micro_batch=micro_batch), expected)
    assert kind == "live" or all(p.grad is None for p in teacher.model.parameters())


def test_a_long_context_is_cut_at_its_end_and_a_rollout_without_any_is_left_out():
    tokenizer, problem = Tokenizer(EMBEDDED / "tokenizer.json"), embedded("val")[0]
    bare, whole = (teacher_prompt(tokenizer, problem.problem, "ref", text) for text in ("", problem.solution))

    def tell(limit):
        rollout = record(problem, "")
        feedback(Config("ref"), [rollout], None, tokenizer, limit)
        return rollout

    rollout = tell(len(whole))
    assert rollout.teacher_prompt == whole and not rollout.shortened and rollout.in_normaliser
    rollout = tell(len(whole) - 1)
    prompt = rollout.teacher_prompt
    assert len(bare) < len(prompt) < len(whole) and rollout.shortened and rollout.in_normaliser
    assert prompt == whole[:len(prompt) - 1] + whole[-1:]
    rollout = tell(len(bare))
    assert rollout.teacher_prompt is None and rollout.shortened and not rollout.in_normaliser
    with pytest.raises(UserError, match=problem.id):
        tell(len(bare) - 1)


def test_each_condition_tells_what_it_should_and_nothing_else():
    tokenizer, problem = Tokenizer(EMBEDDED / "tokenizer.json"), embedded("val")[0]
    right, wrong = f"<answer> {problem.answer} </answer>", "<answer> 1 </answer>"

    class Scribe:
        def batch(self, rollouts):
            return [Critique("D", f"<answer> {r.problem.answer} </answer>") if r.reward else
                    Critique("", "?", malformed="cut off") for r in rollouts]

    def tell(cond, group=8):
        rollouts = [record(problem, text) for text in (right, wrong, wrong, wrong)]
        feedback(Config(cond, group=group), rollouts, Scribe(), tokenizer, 400)
        return rollouts

    grpo, ref, critique = tell("grpo", 2), tell("ref"), tell("critique")
    assert [r.advantage for r in grpo] == [1, -1, 0, 0] and not any(r.teacher_prompt for r in grpo)
    assert [(r.in_normaliser, r.has_gradient) for r in grpo] == [(True, True)] * 2 + [(True, False)] * 2
    shown = teacher_prompt(tokenizer, problem.problem, "ref", problem.solution)
    assert all(r.teacher_prompt == shown and r.advantage is None and r.critique is None for r in ref)
    shown = teacher_prompt(tokenizer, problem.problem, "critique", right)
    assert [r.teacher_prompt for r in critique] == [shown, None, None, None]
    assert [(r.in_normaliser, r.has_gradient) for r in critique] == [(True, True)] + [(False, False)] * 3


def test_prompts_are_checked_for_the_condition_that_reads_them():
    """grpo was refused for a teacher's prompt that it has not, and validation problems likewise."""
    tokenizer = Tokenizer(EMBEDDED / "tokenizer.json")
    problems = embedded("train")
    longest = {"grpo": max(len(student_prompt(tokenizer, p.problem)) for p in problems + embedded("val")),
               "ref": max(len(teacher_prompt(tokenizer, p.problem, "ref", "")) for p in problems)}
    for cond, length in longest.items():
        train.read_data(Config(cond=cond), tokenizer, length)
        with pytest.raises(UserError, match="its prompt has"):
            train.read_data(Config(cond=cond), tokenizer, length - 1)
    assert longest["grpo"] < longest["ref"]


@pytest.mark.parametrize("name", DIVERGENCES)
def test_without_a_context_the_teacher_teaches_nothing(name):
    student = tiny(0)
    value, gradients = run(name, student, Teacher("base", student, 0), told(name, PROMPTS))
    assert value == pytest.approx(0, abs=1e-6) and all(g.abs().max() < 1e-6 for g in gradients)


def test_equal_rewards_give_no_gradient_but_their_tokens_count():
    student = tiny(0)
    rows = told("grpo")
    alone = run("grpo", student, None, rows[:3] + rows[4:])         # without the row of zero
    share = (sum(map(len, COMPLETIONS)) - len(COMPLETIONS[3])) / sum(map(len, COMPLETIONS))
    assert_same(run("grpo", student, None), (share * alone[0], [share * g for g in alone[1]]))
    nothing = told("grpo", [0.0] * len(PROMPTS))
    assert_same(run("grpo", student, None, nothing), (0, [0 * g for g in alone[1]]))


def test_a_rollout_without_an_advantage_or_a_context_costs_nothing():
    """It is not scored: a token outside the vocabulary, which no model can read, does no harm."""
    student, teacher = tiny(0), Teacher("base", tiny(8), 0)
    for name, none, some in (("grpo", 0.0, 1.0), ("forward", None, [5, 3])):
        given = ADVANTAGES if name == "grpo" else TEACHER_PROMPTS
        for last in (none, some):
            rollouts = told(name, [*given, last], [*PROMPTS, [5, 99]], [*COMPLETIONS, [4, EOS]])
            if last is none:
                run(name, student, teacher, rollouts)
            else:
                with pytest.raises(IndexError):
                    run(name, student, teacher, rollouts)


@pytest.mark.parametrize("name", ["grpo", "forward"])
def test_the_end_of_a_sampled_rollout_is_learned(name):
    """If EOS is dropped from the rollout, or masked like a pad, the student never learns to stop."""
    student, teacher, prompt, longer = tiny(0), Teacher("base", tiny(5), 0), PROMPTS[2], TEACHER_PROMPTS[2]
    out = sample(student, [prompt], EOS, 9, TEMPERATURE, 200, uniforms(200, 9, 0))
    ended = out.completions()[[n == 4 and not cut for n, cut in zip(out.lengths, out.truncated)].index(True)]

    def p_eos(model, prompt):
        return ((model(torch.tensor([prompt + ended])) / TEMPERATURE)
                .softmax(-1)[0, len(prompt) + 2, EOS].item())

    before, target = p_eos(student, prompt), 1.0 if name == "grpo" else p_eos(teacher.model, longer)
    assert abs(before - target) > 0.1       # the test's own premise
    optimizer = torch.optim.Adam(student.parameters(), lr=0.01)
    for _ in range(60):
        run(name, student, teacher, told(name, [1.0] if name == "grpo" else [longer], [prompt], [ended]))
        optimizer.step()
    assert abs(p_eos(student, prompt) - target) < 0.2 * abs(before - target)


def test_teachers_stay_or_follow_or_are_the_student():
    student = tiny(0)
    base, ema, live = (Teacher(kind, student, 0.9) for kind in ("base", "ema", "live"))
    old, new = [p.detach().clone() for p in student.parameters()], [p.detach() for p in tiny(1).parameters()]
    student.load_state_dict(tiny(1).state_dict())
    for teacher, expected in ((base, old), (ema, [0.9 * a + 0.1 * b for a, b in zip(old, new)]), (live, new)):
        teacher.update(student)
        torch.testing.assert_close([p.detach() for p in teacher.model.parameters()], expected)
