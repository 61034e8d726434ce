"""grpo / ref / critique: what each condition tells the self-teacher, and the loss that follows.

    L_SD  = E_{y ~ student(.|x)} sum_t D( student(.|x, y_<t), stopgrad teacher(.|x, c, y_<t) ) / N
    grpo  = E_{y ~ student(.|x)} sum_t -A_i log student(y_t|x, y_<t) / N

D is KL(teacher || student) unless told otherwise, A_i = (r_i - mean(r)) / std(r), and N the number
of completion tokens in the whole batch. The rollout y is given: the gradient goes through D, not
through the sampling of y. The conditions differ in `feedback` alone; the loss follows from it.

`accumulate` scores the very token ids that were sampled, under the student's prompt with gradient
and the teacher's without, in micro-batches of similar length. N is the whole batch's, so the size
of a micro-batch changes memory and not the result.
"""
from copy import deepcopy

import torch
from torch import Tensor

from sd import UserError, controls, losses
from sd.config import Config
from sd.critic import Critic
from sd.llm.checkpoint import load
from sd.llm.compile import compiled
from sd.llm.lora import LoRALinear, switch_off
from sd.llm.model import Transformer
from sd.llm.sampling import pad
from sd.llm.tokenizer import Tokenizer
from sd.problems import Problem
from sd.prompts import teacher_prompt
from sd.rollouts import Rollout
from sd.run.client import ChatClient
from sd.scribe import LocalCritic, ServerCritic
from sd.task.symbolic import SymbolicCritic

CHUNK = 2 ** 24     # logits held at once: 64 MiB in float32; a KL holds some seven such tensors
SPARE = 8           # tokens: cutting a text moves its token borders a little


def feedback(config: Config, rollouts: list[Rollout], critic: Critic | None, tokenizer: Tokenizer,
             limit: int) -> None:
    """Adds to each rollout what its condition tells of it: the only difference between the three.

    `limit` is how many tokens a teacher's prompt may have. Raises UserError if a prompt does not
    fit even without its context, or if the critic cannot be reached.
    """
    if config.cond == "grpo":
        rewards = torch.tensor([r.reward for r in rollouts]).view(-1, config.group)     # (P, G)
        advantages = losses.group_advantages(rewards).flatten().tolist()                # (P * G)
        for rollout, advantage in zip(rollouts, advantages):
            rollout.advantage = advantage
        return
    if config.cond == "ref":
        contexts = [rollout.problem.solution for rollout in rollouts]
    else:
        contexts = []
        for rollout, critique in zip(rollouts, critic.batch(rollouts)):
            rollout.critique = critique
            # what is malformed must never become a training signal
            contexts.append(None if critique.malformed else critique.text)
    contexts = controls.replaced(config.control, contexts, rollouts)        # for sd.experiment
    for rollout, context in zip(rollouts, contexts):
        if context is not None:
            set_teacher_prompt(rollout, config.cond, context, tokenizer, limit)
    controls.finish(config, rollouts, tokenizer)                            # for sd.experiment


def set_teacher_prompt(rollout: Rollout, kind: str, context: str, tokenizer: Tokenizer,
                       limit: int) -> None:
    """Sets the rollout's teacher prompt; a context that does not fit is shortened at its end.

    If nothing is left of the context, the rollout gets no teacher prompt and so is left out.
    """
    prompt = teacher_prompt(tokenizer, rollout.problem.problem, kind, context)
    excess = len(prompt) - limit
    if excess > 0:
        kept = tokenizer.encode(context)[:-excess - SPARE]
        prompt = teacher_prompt(tokenizer, rollout.problem.problem, kind, tokenizer.decode(kept))
        if len(prompt) > limit:
            raise UserError(f"problem {rollout.problem.id!r}: too long for the self-teacher's "
                            "prompt; remove it or lower --max-new-tokens")
        rollout.shortened = True
        if not kept:
            return
    rollout.teacher_prompt = prompt


def open_critic(config: Config, student: Transformer, tokenizer: Tokenizer,
                problems: list[Problem]) -> Critic:
    """The frozen critic that --critic names; `self` is the policy `student` as it is now.

    Raises UserError if it cannot be opened, or cannot read the problems.
    """
    if config.critic == "symbolic":
        critic = SymbolicCritic(config.quoting, config.critic_noise)
        critic.check(problems)
        return critic
    if "://" in config.critic:
        return ServerCritic(ChatClient(config.critic, config.critic_tokens))
    if config.critic != "self":
        weight = student.lm_head.weight
        model, tokenizer = load(config.critic, weight.dtype, weight.device)
    elif tokenizer.chat_model:
        model = initial_policy(student)
    else:
        raise UserError("--critic self needs a chat model, which the embedded solver is not: "
                        "take symbolic")
    at_once = max(1, config.sample_batch // 4)      # a critique is about four rollouts long
    return LocalCritic(model, tokenizer, config.critic_tokens, at_once, config.compile)


class Teacher:
    """The self-teacher's weights: the initial ones, their moving average, or the student's own.

    What the student does not train is shared and not copied: under LoRA `base` is the same weights
    with the adapter off.
    """

    def __init__(self, kind: str, student: Transformer, decay: float):
        self.kind, self.decay = kind, decay
        if kind == "base":
            self.model = initial_policy(student)
        elif kind == "ema":
            frozen = {id(p): p for p in student.parameters() if not p.requires_grad}
            self.model = deepcopy(student, frozen).requires_grad_(False)
        else:
            self.model = student

    @torch.no_grad()
    def update(self, student: Transformer) -> None:
        """After each optimiser step; ema: teacher = decay teacher + (1 - decay) student.

        Under LoRA the factors A and B are averaged, not their product.
        """
        if self.kind == "ema":
            for mine, new in zip(self.model.parameters(), student.parameters()):
                if mine is not new:
                    mine.lerp_(new, 1 - self.decay)


def initial_policy(student: Transformer) -> Transformer:
    """The policy before training, held fixed: the student with its adapter off, or a copy of it.

    Only weights that train are copied, and under LoRA not even those: switched off they are unused.
    """
    adapted = any(isinstance(module, LoRALinear) for module in student.modules())
    shared = [p for p in student.parameters() if adapted or not p.requires_grad]
    policy = deepcopy(student, {id(p): p for p in shared})
    if adapted:
        switch_off(policy)
        return policy
    return policy.requires_grad_(False)


def completion_hidden(model: Transformer, prompts: list[list[int]],
                      completions: list[list[int]]) -> Tensor:
    """Hidden states (M, C) that predict the M completion tokens, row after row without padding.

    Token t of a row is predicted one position before its own. Prompt [7, 8, 9], completion [5, 6]:

        position    0  1  2  3
        input       7  8  9  5       -> the last token is not read: nothing follows it
        predicts    8  9  5  6       -> the last two: from position len(prompt) - 1 onwards
    """
    device = model.lm_head.weight.device
    ids = pad([p + c[:-1] for p, c in zip(prompts, completions)], device)               # (B, T)
    at = []
    for row, (prompt, completion) in enumerate(zip(prompts, completions)):
        first = row * ids.size(1) + len(prompt) - 1
        at.extend(range(first, first + len(completion)))
    return model.hidden(ids).flatten(0, 1)[torch.tensor(at, device=device)]             # (M, C)


def accumulate(student: Transformer, teacher: Teacher | None, rollouts: list[Rollout],
               config: Config, tokens: int) -> float:
    """Adds the batch's gradient to the student's parameters; returns its loss, in nats per token.

    `teacher` is None for grpo. `tokens` is the normaliser N: the completion tokens of all rollouts
    in it, over all ranks.

    (M, V) logits would be the largest tensor by far. Each chunk of tokens goes forward and at once
    backward to `leaf`, and its logits are gone before the next chunk's are made. Then one backward
    pass goes through the model.
    """
    device = student.lm_head.weight.device
    token_loss = compiled(losses.token_loss) if config.compile else losses.token_loss
    kind = config.divergence if teacher else "grpo"
    chunk = max(1, CHUNK // student.config.vocab_size)
    scored = [r for r in rollouts if r.has_gradient]
    scored.sort(key=lambda r: len(r.prompt) + len(r.completion))
    total = torch.zeros((), device=device)
    for start in range(0, len(scored), config.micro_batch):
        part = scored[start:start + config.micro_batch]
        completions = [r.completion for r in part]
        ids = torch.tensor([token for c in completions for token in c], device=device)  # (M)
        weights = [w for r in part for w in r.weights or [1.0] * len(r.completion)]     # (M)
        weights = torch.tensor(weights, device=device)
        target = target_of(part, teacher, device)                                       # (M, …)
        hidden = completion_hidden(student, [r.prompt for r in part], completions)      # (M, C)
        leaf = hidden.detach().requires_grad_()
        for at in range(0, len(ids), chunk):
            now = slice(at, at + chunk)
            wanted = target[now]                                                        # (m, …)
            if teacher:
                with torch.no_grad():
                    wanted = teacher.model.lm_head(wanted)                              # (m, V)
            each = token_loss(kind, student.lm_head(leaf[now]), wanted, ids[now],
                              config.temperature, config.beta)                          # (m)
            loss = (each * weights[now]).sum() / tokens                                 # ()
            loss.backward()
            total += loss.detach()
        hidden.backward(leaf.grad)
    return total.item()


@torch.no_grad()
def target_of(rollouts: list[Rollout], teacher: Teacher | None, device: torch.device) -> Tensor:
    """What M tokens are compared with: advantages (M), or the teacher's hidden states (M, C)."""
    if teacher is None:
        return torch.tensor([r.advantage for r in rollouts for _ in r.completion], device=device)
    prompts = [r.teacher_prompt for r in rollouts]
    return completion_hidden(teacher.model, prompts, [r.completion for r in rollouts])
