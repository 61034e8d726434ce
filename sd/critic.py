"""The frozen critic is a faithful scribe: it follows the solver's trace step by step, as written.

The paper's four cases:
  A  fully correct                          reproduce the trace exactly
  B  right answer, a justification missing  insert the missing step
  C  incomplete or out of tokens            condense (drop what was said twice) and finish
  D  wrong                                  copy the right steps, correct the first wrong, finish

How the right and the wrong steps are quoted decides what the self-teacher does with them (induction
heads continue a sequence as they saw it), so it is an option of the symbolic critic:
  partial  right steps verbatim, the wrong one only as corrected: the paper's, and the default
  full     the wrong step is quoted too, its correction comes after
  omit     "correct" in place of each right step: nothing to anchor to

`align` is the step aligner: it sets a critique that a language model wrote beside the solver's
trace, finds the first step that was not copied, and names the case. task/symbolic.py, exact on the
embedded task, knows the case before it writes.
"""
import re
from typing import Protocol

from sd.answers import equal
from sd.rollouts import Critique, Rollout
from sd.steps import Step, parse, render

SPELLED = re.compile(r"<(?=/?think>|\|\w+\|>)")     # </think>, <|im_end|>: to a server, tokens


class Critic(Protocol):
    """What the `critique` condition asks of a critic: one critique per rollout, in their order."""

    def batch(self, rollouts: list[Rollout]) -> list[Critique]: ...


def words(text: str) -> str:
    """What must match for a step to count as copied; white space and control tokens need not."""
    return " ".join(SPELLED.sub("< ", text).split())


def malformed(output: str, reason: str) -> Critique:
    """A critique that must not be trained on; 2,000 characters of it are kept for the log."""
    return Critique("", output[:2000], malformed=reason)


def align(rollout: Rollout, output: str) -> Critique:
    """Makes a Critique of `output`, the trace as a language model would have it. Never raises.

    The last answer counts, with the steps since the answer before it: a trace quoted first is not
    part of the critique. The solver's steps are looked for, in order, among the critique's. The
    first that is not found was corrected (or dropped, or reworded):

        no answer by the solver        C, wrong None: a missing step may be condensed or wrong
        wrong answer                   D, wrong = that step, or len(steps) if all were found
        right answer, one not found    B, wrong = that step: the teacher disagrees there
        right answer, all found        A, or B if the critique has more steps; wrong None

    Malformed is what is empty, has no complete answer or no steps, holds a placeholder such as "…",
    or ends in another answer than the ground truth, which the critic was given.

    Simplified: the case is inferred from wording, so a step that was reworded counts as corrected.
    """
    answer = parse(output).answer
    steps = _steps_of_last_answer(output, answer)
    if not words(output):
        return malformed(output, "empty")
    if any(map(_is_placeholder, steps)) or answer and _is_placeholder(answer.text):
        return malformed(output, "echo of the prompt")
    if answer is None or not answer.closed:
        return malformed(output, "no complete answer")
    if not steps:
        return malformed(output, "no steps")
    if not equal(answer.text, rollout.problem.answer):
        return malformed(output, "wrong answer")

    critique = render(steps, answer.text)
    written = _finished_steps(rollout)
    wrong = _first_not_copied(written, steps)
    if rollout.answer is None:
        return Critique("C", critique)
    if not rollout.reward:
        if wrong is None:
            wrong = len(rollout.trace.steps)        # the answer
        return Critique("D", critique, wrong)
    if wrong is None and len(steps) == len(written):
        return Critique("A", critique)
    return Critique("B", critique, wrong)


def _steps_of_last_answer(output: str, answer: Step | None) -> list[str]:
    """The texts of the steps that lead to the last answer, empty ones left out."""
    before = parse(output[:answer.start] if answer else output)
    begin = before.answer.end if before.answer else 0
    filled = [step for step in before.steps if step.text]
    since = [step for step in filled if step.start >= begin]
    return [step.text for step in since or filled]


def _is_placeholder(text: str) -> bool:
    return ("." in text or "…" in text) and not any(map(str.isalnum, text))


def _finished_steps(rollout: Rollout) -> list[Step]:
    """The solver's steps without one that was cut off in its middle: unfinished is not wrong."""
    steps = rollout.trace.steps
    if rollout.truncated and steps:
        last = steps[-1]
        if not last.closed and last.end == len(rollout.trace.text):
            return steps[:-1]
    return steps


def _first_not_copied(written: list[Step], steps: list[str]) -> int | None:
    """Index of the first written step not found among `steps`, which may have others in between."""
    left = list(map(words, steps))
    for i, step in enumerate(written):
        text = words(step.text)
        if text not in left:
            return i
        left = left[left.index(text) + 1:]
    return None
