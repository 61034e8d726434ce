"""The losses, as pure per-token functions of log-probabilities; they know no models, prompts or optimisers.

M tokens, V vocabulary. `student` and `teacher` are (M, V) log-probabilities at the rollout temperature in
float32, from `log_probs`; the teacher carries no gradient. Every function returns one number per token (M);
the caller sums them and divides by the completion tokens of the whole batch, once, so micro-batches do not
change the result.

Fully on-policy: one optimiser step per batch of rollouts, so no importance ratio and nothing to clip.
"""
import math
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor


def log_probs(logits: Tensor, temperature: float) -> Tensor:
    """log softmax(logits / temperature) over the last dimension, float32 whatever the model computes in."""
    return F.log_softmax(logits.float() / temperature, dim=-1)


def forward_kl(student: Tensor, teacher: Tensor, ids: Tensor, clamp: float = math.inf) -> Tensor:
    """KL(teacher || student) = sum_v teacher_v (log teacher_v - log student_v): the paper's, our default."""
    return over_vocabulary(teacher.exp() * (teacher - student), clamp)


def reverse_kl(student: Tensor, teacher: Tensor, ids: Tensor, clamp: float = math.inf) -> Tensor:
    """KL(student || teacher) = sum_v student_v (log student_v - log teacher_v)."""
    return over_vocabulary(student.exp() * (student - teacher), clamp)


def jsd(student: Tensor, teacher: Tensor, ids: Tensor, beta: float = 0.5, clamp: float = math.inf) -> Tensor:
    """beta KL(teacher || m) + (1 - beta) KL(student || m) with m = beta teacher + (1 - beta) student.

    Here 0 < beta < 1: at the ends it tends to 0, not to the KLs; these are `forward_kl` and `reverse_kl`.
    """
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log(1 - beta))
    of_teacher, of_student = teacher.exp() * (teacher - mixture), student.exp() * (student - mixture)
    return over_vocabulary(torch.lerp(of_student, of_teacher, beta), clamp)


def over_vocabulary(terms: Tensor, clamp: float) -> Tensor:
    """Sums (M, V) to (M), each term cut off at `clamp`: OPSD's remedy if a few tokens rule the gradient."""
    return (terms if clamp == math.inf else terms.clamp(max=clamp)).sum(-1)


def sampled_token(student: Tensor, teacher: Tensor, ids: Tensor) -> Tensor:
    """-A_t log student(y_t) with A_t = log teacher(y_t) - log student(y_t) held constant.

    Its gradient is an unbiased estimate of the reverse KL's, from the sampled token alone. (The
    vocabulary-summed KL in A_t's place would have zero expected gradient.)
    """
    return policy_gradient(of_token(student, ids), token_advantage(student, teacher, ids))


def token_advantage(student: Tensor, teacher: Tensor, ids: Tensor) -> Tensor:
    """A_t = log teacher(y_t|x, c, y_<t) - log student(y_t|x, y_<t): what the context says of each token."""
    return (of_token(teacher, ids) - of_token(student, ids)).detach()


def policy_gradient(logprob: Tensor, advantage: Tensor) -> Tensor:
    """-A log student(y_t): GRPO's objective on-policy, with A from `group_advantages` for a whole rollout."""
    return -advantage * logprob


def group_advantages(rewards: Tensor) -> Tensor:
    """GRPO: A_i = (r_i - mean(r)) / std(r) within each group (P, G); 0 where all rewards are equal.

    >>> group_advantages(torch.tensor([[1., 0., 0., 0.], [1., 1., 1., 1.]]))[:, :2].tolist()
    [[1.7320507764816284, -0.5773502588272095], [0.0, 0.0]]
    """
    spread = rewards.std(-1, correction=0, keepdim=True)
    centred = rewards - rewards.mean(-1, keepdim=True)
    differ = (rewards != rewards[..., :1]).any(-1, keepdim=True)     # spread > 0 can be rounding alone
    return torch.where(differ, centred / spread, torch.zeros_like(centred))


def of_token(logprobs: Tensor, ids: Tensor) -> Tensor:
    """The sampled tokens' entries: (M, V), (M) -> (M)."""
    return logprobs.gather(-1, ids.unsqueeze(-1)).squeeze(-1)


DIVERGENCES = {"forward": forward_kl, "reverse": reverse_kl, "jsd": jsd, "sampled": sampled_token}


def divergence(name: str, beta: float,
               clamp: float = math.inf) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The per-token loss of self-distillation called `name`; `beta` is jsd's, and sampled has no terms."""
    if name == "sampled":
        return sampled_token
    given = {"clamp": clamp} | ({"beta": beta} if name == "jsd" else {})
    return lambda student, teacher, ids: DIVERGENCES[name](student, teacher, ids, **given)


@cache
def of_logits(name: str, beta: float, temperature: float,
              clamp: float = math.inf) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """loss(student's logits (m, V), teacher's logits (m, V), ids (m)) -> (m): what --compile compiles.

    For "grpo" the advantages (m) stand in the teacher's place. The same options give the same function
    object, so that it is compiled once.
    """
    if name == "grpo":
        return lambda logits, advantage, ids: policy_gradient(
            of_token(log_probs(logits, temperature), ids), advantage)
    per_token = divergence(name, beta, clamp)
    return lambda logits, teacher, ids: per_token(
        log_probs(logits, temperature), log_probs(teacher, temperature), ids)
