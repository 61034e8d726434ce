"""For `sd.experiment` alone: other contexts, other references, a loss on a part of the tokens.

A control stands in the place of what the condition tells the self-teacher, between the same tags.
If it teaches as much as the condition's own context, the gain was not the feedback's.

    none      no context at all: the teacher reads the student's prompt
    empty     nothing between the tags
    answer    the right answer, without a derivation
    other     the reference, or the critique, of the batch's next problem
    echo      this rollout's own trace, uncorrected
    needless  the same, but a right step is "corrected" to itself, written as full quoting does
    plan      the embedded task's products to compute, without their values
"""
import random

from sd.config import Config
from sd.llm.tokenizer import Tokenizer
from sd.problems import Problem
from sd.rollouts import Rollout
from sd.steps import render, token_span
from sd.task import times_table as tt


Contexts = list[str | None]     # of each rollout; None if it got no usable one
# --loss-on: the weights of the tokens before the first wrong step or answer, in it, and after it;
# and of those of a rollout in which nothing is wrong.
PARTS = {
    "wrong": (0.0, 1.0, 0.0, 0.0),
    "others": (1.0, 0.0, 1.0, 1.0),
    "correct": (1.0, 0.0, 0.0, 1.0),
    "before": (1.0, 0.0, 0.0, 0.0),
    "right": (0.0, 0.0, 0.0, 1.0),
}


def replaced(control: str, contexts: Contexts, rollouts: list[Rollout]) -> Contexts:
    """The contexts that `control` puts in the place of `contexts`."""
    if control == "off":
        return contexts
    if control != "other":
        return [control_text(control, rollout) for rollout in rollouts]
    result = []
    for i, rollout in enumerate(rollouts):
        following = [*range(i + 1, len(rollouts)), *range(i)]
        others = [j for j in following if rollouts[j].problem != rollout.problem]
        result.append(contexts[others[0]] if others else None)
    return result


def control_text(control: str, rollout: Rollout) -> str:
    """`needless` asks for a critique, which says which steps are right."""
    trace = rollout.trace
    if control == "answer":
        return rollout.problem.answer
    if control == "echo":
        return trace.text
    if control == "needless":
        steps = [step.text for step in trace.steps]
        right = range(len(steps))[:rollout.critique.wrong]
        if right:
            i = random.Random(trace.text).choice(right)
            steps[i] += f", so {steps[i]} is correct"
        return render(steps, trace.answer.text if trace.answer else "")
    if control == "plan":
        return render([f"{product}=" for product in rollout.problem.problem.split(" + ")], "")
    return ""                                       # none, empty


def finish(config: Config, rollouts: list[Rollout], tokenizer: Tokenizer) -> None:
    """What is left to change once the rollouts have their teacher's prompts."""
    for rollout in rollouts:
        if config.control == "none":
            rollout.teacher_prompt = rollout.prompt
        if config.loss_on != "all":
            restrict(rollout, config.loss_on, tokenizer)


def restrict(rollout: Rollout, part: str, tokenizer: Tokenizer) -> None:
    """Sets the weights (T) of a rollout's tokens to those of one of PARTS; for `critique`.

    They are 0 if the wrong answer has no tags, since then nobody knows where it stands.
    """
    before, inside, after, right = PARTS[part]
    trace, wrong = rollout.trace, rollout.critique.wrong
    T = len(rollout.completion)
    if wrong is None:
        rollout.weights = [right] * T
        return
    step = [*trace.steps, trace.answer][wrong]
    if step is None:
        rollout.weights = [0.0] * T
        return
    start, end = token_span(tokenizer.pieces(rollout.completion), step.start, step.end)
    rollout.weights = [before] * start + [inside] * (end - start) + [after] * (T - end)


def reference(problem: Problem, kind: str) -> str:
    """A reference solution of one kind: the facts stay, the derivation moves from the solver's."""
    pairs, rng = tt.read_problem(problem.problem), random.Random(f"{problem.id} {kind}")
    if kind == "same":
        equations = tt.derive(tt.State(list(pairs)), False, tt.SYMBOLS)
        return render(list(map(str, equations)), problem.answer)
    if kind == "half":
        pairs = tt.author_order(pairs, rng)
    elif kind != "worded":
        turned = [pairs[i:] + pairs[:i] for i in range(1, len(pairs))]
        pairs = rng.choice([*turned, pairs[::-1]])
    if kind != "decomposed":
        return tt.reference_text(pairs)
    parts = []
    for a, b in pairs:
        half, rest = b // 2, b - b // 2
        parts.append(f"{a} multiplied by {half} makes {a * half}, "
                     f"then {a} multiplied by {rest} makes {a * rest}, "
                     f"then {a * half} plus {a * rest} gives {a * b}")
    return "first " + ", then ".join(parts) + f", so {problem.answer} is correct"
