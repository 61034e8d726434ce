"""One record per rollout, and the one place that samples, decodes and grades.

`roll` makes a Rollout from the student's prompt; `feedback` (conditions.py) then adds what the
condition says of it; the loss, the metrics and the logs only read it. The token ids are those that
were sampled: nothing is ever decoded and encoded again on the way to the loss.
"""
from dataclasses import dataclass

from torch import Tensor

from sd.answers import equal, final_answer
from sd.config import Config
from sd.llm.model import Transformer
from sd.llm.sampling import sample
from sd.llm.tokenizer import Tokenizer
from sd.problems import Problem, check_lengths
from sd.steps import Trace, parse


@dataclass(frozen=True)
class Critique:
    """What a critic says of one rollout; critic.py has the four cases."""
    case: str                   # A, B, C or D
    text: str                   # what the self-teacher reads
    wrong: int | None = None    # index of the first wrong step; len(steps) is the answer
    malformed: str = ""         # why this must not be trained on; then the case is empty


@dataclass
class Rollout:
    """A sampled completion of T tokens, and all that becomes known of it."""
    problem: Problem
    prompt: list[int]           # the student's
    completion: list[int]       # (T) sampled token ids, the end token included
    logprobs: Tensor            # (T) log student(y_t) at the rollout temperature, on the CPU
    truncated: bool             # ran out of tokens before it ended
    trace: Trace                # the text of the completion, read once
    answer: str | None          # its final answer, if it has one
    reward: float               # 1.0 if the answer is right, else 0.0

    # added by `feedback`: an advantage for grpo, a teacher's prompt for ref and critique
    advantage: float | None = None
    critique: Critique | None = None
    teacher_prompt: list[int] | None = None
    shortened: bool = False     # the context did not fit whole
    weights: list[float] | None = None      # (T) of its tokens in the loss; None: each 1

    @property
    def in_normaliser(self) -> bool:
        """Whether its tokens are in the normaliser: not if it got no usable feedback."""
        return self.advantage is not None or self.teacher_prompt is not None

    @property
    def has_gradient(self) -> bool:
        """Whether it is scored. In a group with equal rewards it counts but teaches nothing."""
        return self.in_normaliser and self.advantage != 0.0

    def row(self) -> dict:
        """What rollouts.jsonl keeps."""
        row = {"id": self.problem.id, "problem": self.problem.problem,
               "right_answer": self.problem.answer, "reference": self.problem.solution,
               "trace": self.trace.text,
               "reward": self.reward, "tokens": len(self.completion), "truncated": self.truncated,
               "nats": -self.logprobs.sum().item(),             # -log p of the completion
               "signal": self.has_gradient and (self.weights is None or any(self.weights))}
        if self.advantage is None:
            row["shortened"] = self.shortened
        if self.critique is not None:
            row |= {"critique": self.critique.text, "case": self.critique.case,
                    "malformed": self.critique.malformed}
        return row


def roll(model: Transformer, tokenizer: Tokenizer, problems: list[Problem],
         prompts: list[list[int]], group: int, config: Config, noise: Tensor) -> list[Rollout]:
    """Samples `group` rollouts of each prompt and grades them; a group's stand side by side.

    `noise` (P * group, max_new_tokens) comes from `uniforms`. The limits and the temperature are
    config's. Raises UserError if a prompt does not fit the model beside max_new_tokens, and
    FloatingPointError if the model's probabilities are not finite.
    """
    check_lengths(problems, prompts, model.config.max_position_embeddings - config.max_new_tokens)
    rollouts = []
    at_once = max(1, config.sample_batch // group)      # prompts; it bounds the cache, no more
    for begin in range(0, len(prompts), at_once):
        part = slice(begin * group, (begin + at_once) * group)
        sampled = sample(model, prompts[begin:begin + at_once], tokenizer.eos,
                         config.max_new_tokens, config.temperature, group, noise[part],
                         config.compile)
        rows = zip(sampled.completions(), sampled.logprobs.cpu(), sampled.truncated.tolist())
        for completion, logprobs, truncated in rows:
            owner = len(rollouts) // group
            trace = parse(tokenizer.decode(completion))
            answer = final_answer(trace, truncated)
            reward = float(equal(answer, problems[owner].answer))
            rollouts.append(Rollout(problems[owner], prompts[owner], completion,
                                    logprobs[:len(completion)], truncated, trace, answer, reward))
    if not all(rollout.logprobs.isfinite().all() for rollout in rollouts):
        raise FloatingPointError("the solver's probabilities are not finite; begin again with "
                                 "a lower --lr, or look at the weights of the checkpoint")
    return rollouts
