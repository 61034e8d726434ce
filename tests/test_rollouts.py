"""The record of a rollout: sampled ids, what they say, and whether that is right, in any parts."""
import pytest
import torch

from sd import UserError
from sd.config import Config
from sd.llm.checkpoint import load
from sd.llm.sampling import uniforms
from sd.problems import EMBEDDED, embedded
from sd.prompts import student_prompt
from sd.rollouts import roll

GROUP, TOKENS = 3, 60


@pytest.fixture(scope="module")
def solver():
    return load(EMBEDDED)


def draw(solver, sample_batch=512, tokens=TOKENS, count=7):
    model, tokenizer = solver
    problems = embedded("val")[:count]
    prompts = [student_prompt(tokenizer, p.problem) for p in problems]
    config = Config("grpo", max_new_tokens=tokens, sample_batch=sample_batch)
    return problems, roll(model, tokenizer, problems, prompts, GROUP, config, uniforms(count * GROUP, tokens, 0))


def test_groups_stand_side_by_side_and_each_rollout_is_what_its_ids_say(solver):
    model, tokenizer = solver
    problems, rollouts = draw(solver)
    assert [r.problem for r in rollouts] == [p for p in problems for _ in range(GROUP)]
    for r in rollouts:
        assert r.prompt == student_prompt(tokenizer, r.problem.problem)
        assert r.trace.text == tokenizer.decode(r.completion)
        assert r.truncated == (r.completion[-1] not in tokenizer.eos)
        said = r.trace.text.rpartition("<answer> ")[2].partition(" </answer>")[0]
        assert r.truncated or (r.answer, r.reward) == (said, float(said == r.problem.answer))
        logits = model(torch.tensor([r.prompt + r.completion]))[0, len(r.prompt) - 1:-1] / Config.temperature
        expected = logits.log_softmax(-1)[range(len(r.completion)), r.completion]
        torch.testing.assert_close(r.logprobs, expected, atol=1e-4, rtol=1e-4)
    assert len({r.trace.text for r in rollouts}) > len(problems)        # the premise: they differ


def test_a_smaller_sample_batch_changes_no_rollout(solver):
    whole = [r.completion for r in draw(solver, count=5)[1]]
    for sample_batch in (1, 2 * GROUP, 100):
        assert [r.completion for r in draw(solver, sample_batch, count=5)[1]] == whole


def test_a_truncated_rollout_has_no_answer_and_no_reward(solver):
    _, rollouts = draw(solver, tokens=5)
    assert all(r.truncated and len(r.completion) == 5 and r.answer is None and r.reward == 0 for r in rollouts)


def test_a_prompt_that_does_not_fit_is_refused(solver):
    with pytest.raises(UserError, match="its prompt has"):
        draw(solver, tokens=508)


def test_probabilities_that_are_not_finite_are_no_rollouts():
    model, tokenizer = load(EMBEDDED)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(FloatingPointError, match="not finite"):
        draw((model, tokenizer))
