"""The losses, as pure per-token functions; they know no models, prompts or optimisers.

M tokens, V vocabulary. `student` and `teacher` are (M, V) log-probabilities at the rollout
temperature, in float32, from `log_probs`; the teacher carries no gradient. Every function returns
one number per token (M). The caller sums them and divides once by the completion tokens of the
whole batch, so the size of a micro-batch does not change the result.

Simplified: fully on-policy. There is one optimiser step per batch of rollouts, so there is no
importance ratio and nothing to clip.
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor


def log_probs(logits: Tensor, temperature: float) -> Tensor:
    """log softmax(logits / temperature) over the last dimension, always in float32."""
    return F.log_softmax(logits.float() / temperature, dim=-1)


def of_token(logprobs: Tensor, ids: Tensor) -> Tensor:
    """The sampled tokens' entries: (M, V), (M) -> (M)."""
    return logprobs.gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) = sum_v teacher_v (log teacher_v - log student_v): the paper's."""
    return (teacher.exp() * (teacher - student)).sum(-1)


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(student || teacher) = sum_v student_v (log student_v - log teacher_v)."""
    return (student.exp() * (student - teacher)).sum(-1)


def jsd(student: Tensor, teacher: Tensor, beta: float = 0.5) -> Tensor:
    """beta KL(teacher || m) + (1 - beta) KL(student || m), m = beta teacher + (1 - beta) student.

    Here 0 < beta < 1. At its ends it tends to 0 and not to the KLs: those are `forward_kl` and
    `reverse_kl`.
    """
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log(1 - beta))
    from_teacher = teacher.exp() * (teacher - mixture)
    from_student = student.exp() * (student - mixture)
    return torch.lerp(from_student, from_teacher, beta).sum(-1)


def token_advantage(student: Tensor, teacher: Tensor, ids: Tensor) -> Tensor:
    """A_t = log teacher(y_t|x, c, y_<t) - log student(y_t|x, y_<t): what c says of y_t."""
    return (of_token(teacher, ids) - of_token(student, ids)).detach()


def policy_gradient(logprob: Tensor, advantage: Tensor) -> Tensor:
    """-A log student(y_t): GRPO's objective on-policy, with A_i of the whole rollout for A."""
    return -advantage * logprob


def sampled_token(student: Tensor, teacher: Tensor, ids: Tensor) -> Tensor:
    """-A_t log student(y_t) with A_t from `token_advantage`.

    Its gradient is an unbiased estimate of the reverse KL's, from the sampled token alone. (The
    vocabulary-summed KL in A_t's place would have zero expected gradient.)
    """
    return policy_gradient(of_token(student, ids), token_advantage(student, teacher, ids))


def group_advantages(rewards: Tensor) -> Tensor:
    """GRPO: A_i = (r_i - mean(r)) / std(r) within each group (P, G); 0 where all rewards are equal.

    >>> group_advantages(torch.tensor([[1., 0., 0., 0.], [1., 1., 1., 1.]]))[:, :2].tolist()
    [[1.7320507764816284, -0.5773502588272095], [0.0, 0.0]]
    """
    spread = rewards.std(-1, correction=0, keepdim=True)
    centred = rewards - rewards.mean(-1, keepdim=True)
    differ = (rewards != rewards[..., :1]).any(-1, keepdim=True)    # spread > 0 can be rounding
    return torch.where(differ, centred / spread, torch.zeros_like(centred))


def token_loss(kind: str, logits: Tensor, target: Tensor, ids: Tensor, temperature: float,
               beta: float) -> Tensor:
    """The loss of each token (m), from the student's logits (m, V) and what they should be like.

    `target` holds the advantages (m) if `kind` is "grpo"; for a divergence it holds the teacher's
    logits (m, V). This is the function that --compile compiles.
    """
    student = log_probs(logits, temperature)
    if kind == "grpo":
        return policy_gradient(of_token(student, ids), target)
    teacher = log_probs(target, temperature)
    if kind == "forward":
        return forward_kl(student, teacher)
    if kind == "reverse":
        return reverse_kl(student, teacher)
    if kind == "jsd":
        return jsd(student, teacher, beta)
    if kind == "sampled":
        return sampled_token(student, teacher, ids)
    raise ValueError(f"no divergence {kind}")
