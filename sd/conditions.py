"""grpo / ref / critique: what the self-teacher sees of a batch of rollouts, and the loss that follows from it.

    L_SD  = E_{y ~ student(.|x)} [ sum_t D( student(.|x, y_<t) || stopgrad teacher(.|x, c, y_<t) ) ] / tokens
    grpo  = E [ sum_t -A_i log student(y_t|x, y_<t) ] / tokens,  A_i = (r_i - mean(r)) / std(r)

The conditions differ in `feedback` alone. `accumulate` scores the very token ids that were sampled, under the student's
prompt with gradient and the teacher's without, in micro-batches of similar length; the normaliser is the number of
completion tokens in the whole batch, so the micro-batch size changes memory and not the result.
"""
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor

from sd import losses
from sd.config import Config
from sd.critic import Critique, SymbolicCritic
from sd.model import Transformer
from sd.problems import Problem
from sd.sampling import pad
from sd.tokenizer import Tokenizer


@dataclass
class Feedback:
    """What a batch of N rollouts is told; one of the first two is set."""
    advantages: list[float] | None = None           # grpo: one constant per rollout
    teacher_prompts: list[list[int]] | None = None  # ref, critique: problem and context
    critiques: list[Critique] | None = None


def feedback(cond: str, problems: list[Problem], texts: list[str], truncated: list[bool], rewards: list[float],
             group: int, critic: SymbolicCritic, tokenizer: Tokenizer) -> Feedback:
    """The one place where the three conditions differ. `problems` has an entry per rollout, groups side by side."""
    if cond == "grpo":
        return Feedback(advantages=losses.group_advantages(torch.tensor(rewards).view(-1, group)).flatten().tolist())
    if cond == "ref":
        return Feedback(teacher_prompts=[tokenizer.teacher_prompt(p.problem, "ref", p.solution) for p in problems])
    critiques = [critic(*rollout) for rollout in zip(problems, texts, truncated)]
    return Feedback(teacher_prompts=[tokenizer.teacher_prompt(p.problem, "critique", c.text)
                                     for p, c in zip(problems, critiques)], critiques=critiques)


class Teacher:
    """The self-teacher's weights: `base` the initial ones, `ema` their moving average, `live` the student's own."""

    def __init__(self, kind: str, student: Transformer, decay: float):
        self.kind, self.decay = kind, decay
        self.model = student if kind == "live" else deepcopy(student).requires_grad_(False)

    @torch.no_grad()
    def update(self, student: Transformer) -> None:
        """After each optimiser step; ema: teacher = decay teacher + (1 - decay) student."""
        if self.kind == "ema":
            for mine, new in zip(self.model.parameters(), student.parameters()):
                mine.lerp_(new, 1 - self.decay)


def completion_hidden(model: Transformer, prompts: list[list[int]], completions: list[list[int]]) -> Tensor:
    """Hidden states (M, C) that predict the M completion tokens of all rows, row after row; no padding among them.

    Token t of a row is predicted one position before its own. Prompt [7, 8, 9], completion [5, 6]:

        position    0  1  2  3  4
        input       7  8  9  5  6
        predicts    8  9  5  6  -        -> positions 2 and 3: len(prompt) - 1 onwards, len(completion) of them
    """
    device = model.lm_head.weight.device
    ids = pad([p + c for p, c in zip(prompts, completions)], device)                        # (B, T)
    at = [row * ids.size(1) + len(p) - 1 + t for row, (p, c) in enumerate(zip(prompts, completions))
          for t in range(len(c))]
    return model.hidden(ids).flatten(0, 1)[torch.tensor(at, device=device)]                 # (M, C)


def accumulate(student: Transformer, teacher: Teacher, prompts: list[list[int]], completions: list[list[int]],
               told: Feedback, config: Config) -> float:
    """Adds the batch's gradient to the student's parameters and returns its loss (nats per completion token)."""
    device = student.lm_head.weight.device
    tokens = sum(map(len, completions))
    per_token = losses.divergence(config.divergence, config.beta)
    # a group whose rewards are all equal has no gradient: its tokens count, its forward pass does not happen
    rows = [i for i in range(len(prompts)) if told.advantages is None or told.advantages[i] != 0]
    rows.sort(key=lambda i: len(prompts[i]) + len(completions[i]))
    total = 0.0
    for start in range(0, len(rows), config.micro_batch):
        micro = rows[start:start + config.micro_batch]
        answered = [completions[i] for i in micro]
        ids = torch.tensor([token for c in answered for token in c], device=device)         # (M)
        hidden = completion_hidden(student, [prompts[i] for i in micro], answered)          # (M, C)
        logp = losses.log_probs(student.lm_head(hidden), config.temperature)                # (M, V)
        if told.teacher_prompts is None:
            advantage = torch.tensor([told.advantages[i] for i in micro for _ in completions[i]], device=device)  # (M)
            loss = losses.policy_gradient(losses.of_token(logp, ids), advantage)            # (M)
        else:
            with torch.no_grad():
                hidden = completion_hidden(teacher.model, [told.teacher_prompts[i] for i in micro], answered)
                teacher_logp = losses.log_probs(teacher.model.lm_head(hidden), config.temperature)    # (M, V)
            loss = per_token(logp, teacher_logp, ids)                                       # (M)
        loss = loss.sum() / tokens
        loss.backward()
        total += loss.item()
    return total
