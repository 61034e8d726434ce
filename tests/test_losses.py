"""The losses against arithmetic done by hand: two and three tokens, and gradients from their formulas."""
from math import exp, log, sqrt

import pytest
import torch

from sd.losses import (forward_kl, group_advantages, jsd, log_probs, of_token, policy_gradient, reverse_kl,
                       sampled_token, token_loss)

LOGITS = torch.tensor([[0.3, -1.2, 2.0, 0.7]])  # the student's, one token, V = 4
OTHER = torch.tensor([[1.1, 0.4, -0.5, 0.2]])   # the teacher's


def logs(*probabilities):
    return torch.tensor([probabilities]).log()


def softmax(logits, temperature):
    weights = [exp(z / temperature) for z in logits.flatten().tolist()]
    return torch.tensor([[w / sum(weights) for w in weights]])


def gradient(loss, temperature):
    """d loss / d student logits, for the fixed logits above."""
    z = LOGITS.clone().requires_grad_()
    loss(log_probs(z, temperature), log_probs(OTHER, temperature)).sum().backward()
    return z.grad


def test_two_tokens_by_hand():
    student, teacher = logs(0.5, 0.5), logs(0.8, 0.2)
    forward = 0.8 * log(0.8 / 0.5) + 0.2 * log(0.2 / 0.5)
    reverse = 0.5 * log(0.5 / 0.8) + 0.5 * log(0.5 / 0.2)
    assert forward_kl(student, teacher).item() == pytest.approx(forward, abs=1e-6)
    assert reverse_kl(student, teacher).item() == pytest.approx(reverse, abs=1e-6)
    # beta 0.25: m = 0.25 teacher + 0.75 student = (0.575, 0.425)
    by_hand = (0.25 * (0.8 * log(0.8 / 0.575) + 0.2 * log(0.2 / 0.425))
               + 0.75 * (0.5 * log(0.5 / 0.575) + 0.5 * log(0.5 / 0.425)))
    assert jsd(student, teacher, 0.25).item() == pytest.approx(by_hand, abs=1e-6)


def test_three_tokens_by_hand_one_number_per_token():
    student, teacher = logs(0.7, 0.2, 0.1), logs(0.1, 0.6, 0.3)
    forward = 0.1 * log(0.1 / 0.7) + 0.6 * log(0.6 / 0.2) + 0.3 * log(0.3 / 0.1)
    reverse = 0.7 * log(0.7 / 0.1) + 0.2 * log(0.2 / 0.6) + 0.1 * log(0.1 / 0.3)
    middle = (0.5 * (0.1 * log(0.1 / 0.4) + 0.6 * log(0.6 / 0.4) + 0.3 * log(0.3 / 0.2))
              + 0.5 * (0.7 * log(0.7 / 0.4) + 0.2 * log(0.2 / 0.4) + 0.1 * log(0.1 / 0.2)))
    for loss, by_hand in ((forward_kl, forward), (reverse_kl, reverse), (jsd, middle)):
        both = loss(torch.cat([student, teacher]), torch.cat([teacher, teacher]))
        assert both.tolist() == pytest.approx([by_hand, 0.0], abs=1e-6)     # and 0 where the two agree


def test_jsd_tends_to_zero_at_its_ends_and_not_to_the_kls():
    student, teacher = logs(0.7, 0.2, 0.1), logs(0.1, 0.6, 0.3)
    for beta in (1e-5, 1 - 1e-5):
        assert jsd(student, teacher, beta).item() == pytest.approx(0, abs=1e-4)
    # beta weighs the teacher: the two models change places with 1 - beta
    assert jsd(student, teacher, 0.1).item() == pytest.approx(jsd(teacher, student, 0.9).item(), abs=1e-6)
    assert jsd(student, teacher, 0.1).item() != pytest.approx(jsd(student, teacher, 0.9).item(), abs=1e-3)


def test_the_loss_of_each_name_is_the_formula_of_that_name():
    """From logits, with the temperature on both sides; grpo gets advantages in place of teacher's logits."""
    ids, two = torch.tensor([1, 3]), torch.cat([LOGITS, OTHER])
    other, advantages = two.flip(0), torch.tensor([0.5, -2.0])
    p, q = (torch.cat([softmax(row[None], 1.3) for row in rows]) for rows in (two, other))      # (2, V)
    m = 0.2 * q + 0.8 * p
    at = lambda x: x[[0, 1], ids]
    by_hand = {"forward": (q * (q / p).log()).sum(-1), "reverse": (p * (p / q).log()).sum(-1),
               "jsd": 0.2 * (q * (q / m).log()).sum(-1) + 0.8 * (p * (p / m).log()).sum(-1),
               "sampled": -(at(q) / at(p)).log() * at(p).log(), "grpo": -advantages * at(p).log()}
    for name, expected in by_hand.items():
        target = advantages if name == "grpo" else other
        torch.testing.assert_close(token_loss(name, two, target, ids, 1.3, 0.2), expected, msg=name)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_temperature_divides_both_logits(temperature):
    p, q = softmax(LOGITS, temperature), softmax(OTHER, temperature)
    loss = forward_kl(log_probs(LOGITS, temperature), log_probs(OTHER, temperature))
    assert loss.item() == pytest.approx(sum(b * log(b / a) for a, b in zip(p[0].tolist(), q[0].tolist())),
                                        abs=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_gradients_are_the_formulas(temperature):
    p, q, beta = softmax(LOGITS, temperature), softmax(OTHER, temperature), 0.3
    ratio, to_mixture = (p / q).log(), (p / (beta * q + (1 - beta) * p)).log()
    forward = (p - q) / temperature
    reverse = p * (ratio - (p * ratio).sum()) / temperature
    mixed = (1 - beta) * p * (to_mixture - (p * to_mixture).sum()) / temperature
    torch.testing.assert_close(gradient(lambda s, t: forward_kl(s, t), temperature), forward)
    torch.testing.assert_close(gradient(lambda s, t: reverse_kl(s, t), temperature), reverse)
    torch.testing.assert_close(gradient(lambda s, t: jsd(s, t, beta), temperature), mixed)


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_sampled_token_has_the_reverse_kl_gradient_in_expectation(temperature):
    """With the vocabulary-summed KL in the advantage's place the expectation would be zero."""
    p = softmax(LOGITS, temperature)[0]
    expected = sum(p[v] * gradient(lambda s, t: sampled_token(s, t, torch.tensor([v])), temperature)
                   for v in range(4))
    torch.testing.assert_close(expected, gradient(lambda s, t: reverse_kl(s, t), temperature))


def test_policy_gradient_pushes_the_sampled_token_by_its_advantage():
    ids, advantage = torch.tensor([2]), torch.tensor([-0.5])
    loss = policy_gradient(of_token(log_probs(LOGITS, 2.0), ids), advantage)
    p = softmax(LOGITS, 2.0)
    assert loss.item() == pytest.approx(0.5 * log(p[0, 2]), abs=1e-6)
    one_hot = torch.tensor([[0.0, 0.0, 1.0, 0.0]])
    torch.testing.assert_close(gradient(lambda s, t: policy_gradient(of_token(s, ids), advantage), 2.0),
                               0.5 * (one_hot - p) / 2.0)


def test_sampled_token_holds_the_advantage_constant_and_gives_the_teacher_no_gradient():
    student, teacher = logs(0.7, 0.2, 0.1).requires_grad_(), logs(0.1, 0.6, 0.3).requires_grad_()
    sampled_token(student, teacher, torch.tensor([1])).sum().backward()
    assert teacher.grad is None or not teacher.grad.any()
    assert student.grad.tolist()[0] == pytest.approx([0.0, -log(0.6 / 0.2), 0.0], abs=1e-6)


def test_low_precision_logits_are_computed_in_float32():
    logits = (torch.randn(3, 1000, generator=torch.Generator().manual_seed(0)) * 4).bfloat16()
    out = log_probs(logits, 1.1)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), torch.log_softmax(logits.double() / 1.1, -1),
                               atol=2e-6, rtol=1e-6)


def test_group_advantages_by_hand_and_zero_for_equal_rewards():
    out = group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0], [1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 1, 0]]))
    assert out.flatten().tolist() == pytest.approx([0.75 / sqrt(3 / 16), *[-0.25 / sqrt(3 / 16)] * 3,
                                                    *[0.0] * 8, 1, -1, 1, -1], abs=1e-6)
    assert group_advantages(torch.full((1, 8), 0.1)).abs().max() == 0   # its float32 deviation is not 0
