"""grpo / ref / critique: what the self-teacher sees of a batch of rollouts, and the loss that follows.

    L_SD  = E_{y ~ student(.|x)} [ sum_t D( student(.|x, y_<t), stopgrad teacher(.|x, c, y_<t) ) ] / tokens
    grpo  = E [ sum_t -A_i log student(y_t|x, y_<t) ] / tokens,  A_i = (r_i - mean(r)) / std(r)

D is KL(teacher || student) unless told otherwise. The rollout y counts as given: the gradient goes through D,
not through the sampling of y. What a condition is told comes from `feedback` alone; the loss follows from it.

`accumulate` scores the very token ids that were sampled, under the student's prompt with gradient and the
teacher's without, in micro-batches of similar length; the normaliser is the number of completion tokens in
the whole batch, so the micro-batch size changes memory, not the result.
"""
import math
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor

from sd import UserError, losses
from sd.llm.compile import fused
from sd.config import Config
from sd.critic import Critic, Critique
from sd.llm.lora import LoRALinear, switch
from sd.llm.model import Transformer
from sd.problems import Problem
from sd.llm.sampling import pad
from sd.llm.tokenizer import Tokenizer

CHUNK = 2 ** 24     # logits held at once: 64 MiB in float32, of which a divergence has some six alive
SPARE = 8           # tokens: cutting a text moves its token borders a little


@dataclass
class Feedback:
    """What N rollouts are told: `advantages`, or `teacher_prompts`, where None leaves a rollout out."""
    advantages: list[float] | None = None                  # grpo: one constant per rollout
    teacher_prompts: list[list[int] | None] | None = None  # ref, critique: problem and context
    critiques: list[Critique] | None = None
    shortened: int = 0                                     # contexts that did not fit whole

    def counts(self, i: int) -> bool:
        """Whether rollout i is in the loss and in its normaliser."""
        return self.teacher_prompts is None or self.teacher_prompts[i] is not None


def feedback(cond: str, problems: list[Problem], texts: list[str], truncated: list[bool],
             rewards: list[float], group: int, critic: Critic, tokenizer: Tokenizer, limit: int) -> Feedback:
    """What each of the three conditions tells. `problems` has one per rollout, groups side by side.

    `limit` is how many tokens a teacher's prompt may have; a context is shortened at its end to fit. Raises
    UserError if a prompt does not fit even without its context, or if the critic cannot be reached.
    """
    if cond == "grpo":
        return Feedback(
            advantages=losses.group_advantages(torch.tensor(rewards).view(-1, group)).flatten().tolist())
    if cond == "ref":
        critiques, contexts = None, [p.solution for p in problems]
    else:
        critiques = critic.batch(problems, texts, truncated)
        contexts = [None if c.malformed else c.text for c in critiques]
    told = Feedback(teacher_prompts=[], critiques=critiques)
    for problem, context in zip(problems, contexts):
        prompt = None if context is None else tokenizer.teacher_prompt(problem.problem, cond, context)
        if prompt is not None and (excess := len(prompt) - limit) > 0:
            kept = tokenizer.encode(context)[:-excess - SPARE]
            prompt = tokenizer.teacher_prompt(problem.problem, cond, tokenizer.decode(kept))
            told.shortened += 1
            if len(prompt) > limit:
                raise UserError(f"problem {problem.id!r}: too long for the self-teacher's prompt; "
                                "remove it or lower --max-new-tokens")
            prompt = prompt if kept else None               # nothing is left of the context
        told.teacher_prompts.append(prompt)
    return told


class Teacher:
    """The self-teacher's weights: `base` the initial ones, `ema` a moving average, `live` the student's own.

    What the student does not train is shared, not copied: under LoRA `base` is the same weights, adapter off.
    """

    def __init__(self, kind: str, student: Transformer, decay: float):
        self.kind, self.decay = kind, decay
        if kind == "ema":
            frozen = {id(p): p for p in student.parameters() if not p.requires_grad}
            self.model = deepcopy(student, frozen).requires_grad_(False)    # what is frozen is not copied
        else:
            self.model = student if kind == "live" else initial_policy(student)

    @torch.no_grad()
    def update(self, student: Transformer) -> None:
        """After each optimiser step; ema: teacher = decay teacher + (1 - decay) student.

        Under LoRA it is A and B that are averaged, not their product.
        """
        if self.kind == "ema":
            for mine, new in zip(self.model.parameters(), student.parameters()):
                if mine is not new:
                    mine.lerp_(new, 1 - self.decay)


def initial_policy(student: Transformer) -> Transformer:
    """The policy before training, held fixed: the student's weights, adapter off, or a copy of them all."""
    if not any(isinstance(module, LoRALinear) for module in student.modules()):
        return deepcopy(student).requires_grad_(False)
    policy = deepcopy(student, {id(p): p for p in student.parameters()})
    switch(policy, on=False)
    return policy


def completion_hidden(model: Transformer, prompts: list[list[int]], completions: list[list[int]]) -> Tensor:
    """Hidden states (M, C) that predict the M completion tokens of all rows, row after row, without padding.

    Token t of a row is predicted one position before its own. Prompt [7, 8, 9], completion [5, 6]:

        position    0  1  2  3
        input       7  8  9  5       -> the last token is not read: nothing follows it
        predicts    8  9  5  6       -> positions 2 and 3: len(prompt) - 1 onwards, len(completion) of them
    """
    device = model.lm_head.weight.device
    ids = pad([p + c[:-1] for p, c in zip(prompts, completions)], device)                   # (B, T)
    at = [row * ids.size(1) + len(p) - 1 + t for row, (p, c) in enumerate(zip(prompts, completions))
          for t in range(len(c))]
    return model.hidden(ids).flatten(0, 1)[torch.tensor(at, device=device)]                 # (M, C)


def accumulate(student: Transformer, teacher: Teacher, prompts: list[list[int]], completions: list[list[int]],
               told: Feedback, config: Config, tokens: int) -> float:
    """Adds the batch's gradient to the student's parameters and returns its loss (nats per completion token).

    `tokens` normalises: the completion tokens of the whole batch, over all ranks, that are not left out.
    """
    device, grpo = student.lm_head.weight.device, told.teacher_prompts is None
    per_token = losses.of_logits("grpo" if grpo else config.divergence, config.beta, config.temperature,
                                 config.term_clamp or math.inf)
    if config.compile:
        per_token = fused(per_token, device.type)
    # a group whose rewards are all equal has no gradient: its tokens count, its forward pass does not happen
    signal = told.advantages if grpo else told.teacher_prompts
    rows = [i for i in range(len(prompts)) if signal[i]]            # neither an advantage of 0 nor None
    rows.sort(key=lambda i: len(prompts[i]) + len(completions[i]))
    total = torch.zeros((), device=device)
    for start in range(0, len(rows), config.micro_batch):
        micro = rows[start:start + config.micro_batch]
        written = [completions[i] for i in micro]
        ids = torch.tensor([token for c in written for token in c], device=device)          # (M)
        if grpo:
            target = torch.tensor([told.advantages[i] for i in micro for _ in completions[i]],
                                  device=device)                                            # (M)
        else:
            with torch.no_grad():
                target = completion_hidden(teacher.model, [told.teacher_prompts[i] for i in micro],
                                           written)                                         # (M, C)
        hidden = completion_hidden(student, [prompts[i] for i in micro], written)           # (M, C)

        # (M, V) would be the largest tensor by far. Each chunk of tokens goes forward and at once backward to
        # `leaf`, its logits gone before the next chunk's; then one backward pass goes through the model.
        leaf = hidden.detach().requires_grad_()
        chunk = max(1, CHUNK // student.config.vocab_size)
        for part in (slice(at, at + chunk) for at in range(0, len(ids), chunk)):
            with torch.no_grad():
                of_part = target[part] if grpo else teacher.model.lm_head(target[part])     # (m) or (m, V)
            loss = per_token(student.lm_head(leaf[part]), of_part, ids[part]).sum() / tokens
            loss.backward()
            total += loss.detach()
        hidden.backward(leaf.grad)
    return total.item()
