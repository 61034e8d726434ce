"""The embedded task's critic. It is exact: judging a step is arithmetic, going on is a derivation.

`times_table.check` judges the trace, `times_table.derive` finishes it. critic.py has the four cases
and the three ways of quoting.
"""
import random
from dataclasses import dataclass, replace

from sd import UserError
from sd.answers import equal
from sd.problems import Problem
from sd.rollouts import Critique, Rollout
from sd.steps import render
from sd.task import times_table as tt


@dataclass(frozen=True)
class SymbolicCritic:
    """Critiques rollouts on sums of products."""
    quoting: str = "partial"
    noise: float = 0.0              # share of the corrected products that are made wrong again

    def check(self, problems: list[Problem]) -> None:
        """Raises UserError at the first problem that it cannot read, or whose answer is wrong."""
        for problem in problems:
            _products(problem)

    def batch(self, rollouts: list[Rollout]) -> list[Critique]:
        return [self(rollout) for rollout in rollouts]

    def __call__(self, rollout: Rollout) -> Critique:
        """The critique of one rollout. Raises UserError as `check` does."""
        written = list(rollout.trace.steps)
        answer = rollout.trace.answer
        if rollout.truncated and answer is None and written and not written[-1].closed:
            written.pop()                   # cut off in its middle: unfinished, not wrong
        answered = answer is not None and (answer.closed or not rollout.truncated)
        wrong_answer = answered and not rollout.reward
        equations = [tt.read_equation(step.text) for step in written]
        pairs = _products(rollout.problem)
        notation, interleaved = _habits(equations, len(pairs))

        # In a wrong rollout, a step said twice takes another's place; elsewhere it is superfluous.
        state = tt.State(_own_order(equations, pairs))
        right = tt.check(state, equations, repeats=not wrong_answer)
        wrong = len(right)              # index of the first wrong step, or else that of the answer
        wrong_step = wrong < len(written)
        steps = []
        for step, missing in zip(written, right):
            steps += map(str, missing or [])
            if missing is not None or wrong_step or answered:   # case C drops what was said before
                steps.append("correct" if self.quoting == "omit" else step.text)
        if wrong_step:
            fixed = _corrected(state, equations[wrong], interleaved, notation)
            if fixed is not None:
                rng = random.Random(f"{rollout.problem.id} {rollout.trace.text}")
                if fixed.product and rng.random() < self.noise:
                    fixed = replace(fixed, value=rng.choice(tt.usual_mistakes(fixed.operands)))
                notation = fixed.notation
                state.apply(fixed)
                steps.append(self._correct(written[wrong].text, str(fixed)))
        rest = tt.derive(state, interleaved, notation)
        steps += map(str, rest)
        final = str(state.pool[0]) if self.noise else rollout.problem.answer
        if wrong_answer and not wrong_step:
            final = self._correct(answer.text, final)

        text = render(steps, final)
        if wrong_step or wrong_answer:
            return Critique("D", text, wrong)
        if not answered:
            return Critique("C", text)
        return Critique("B" if rest or any(right) else "A", text)

    def _correct(self, wrong: str, right: str) -> str:
        return f"{wrong}, so {right} is correct" if self.quoting == "full" else right


def _products(problem: Problem) -> list[tt.Pair]:
    pairs = tt.read_problem(problem.problem)
    if pairs is None:
        raise UserError(f"problem {problem.id}: the symbolic critic reads only sums of products "
                        f"such as '7*8 + 6*9', not {problem.problem[:80]!r}")
    if not equal(problem.answer, str(sum(a * b for a, b in pairs))):
        raise UserError(f"problem {problem.id}: its answer is not the sum of its products")
    return pairs


def _habits(equations: list[tt.Equation | None], products: int) -> tuple[tt.Notation, bool]:
    """The solver's last wording, and whether it adds as it goes, read off its own steps."""
    readable = [equation for equation in equations if equation is not None]
    notation = readable[-1].notation if readable else tt.SYMBOLS
    for i, equation in enumerate(equations):        # steps that cannot be read count too
        if equation is not None and not equation.product:
            return notation, i < products
    return notation, False


def _own_order(equations: list[tt.Equation | None], pairs: list[tt.Pair]) -> list[tt.Pair]:
    """The products in the order in which the solver takes them.

    A step that is none of them (a misread factor, a product said twice) stands for one that the
    solver never takes: in `7*8 + 6*9 + 3*4`, the steps 7*8, 7*9, 3*4 mean 7*8, 6*9, 3*4. Correcting
    7*9 into 3*4, the next one left, would reward the solver for a scrambled order, and it does
    learn that.
    """
    order, left = [], list(pairs)
    for equation in equations:
        if equation is not None and not equation.product:
            continue
        pair = equation and tt.find(left, equation)
        if pair is not None:
            left.remove(pair)
            pair = equation.operands        # the solver's own order of the factors
        order.append(pair)
    while None in order:
        i = order.index(None)
        order[i:i + 1] = left[:1]           # nothing, if no product is left
        left = left[1:]
    return order + left


def _corrected(state: tt.State, equation: tt.Equation | None, interleaved: bool,
               notation: tt.Notation) -> tt.Equation | None:
    """The true step in place of a wrong one: with its operands, if they fit, or else the next one.

    None if all has been derived, so that the step is superfluous.
    """
    if equation is not None:
        fixed = replace(equation, value=equation.truth)
        if tt.missing_steps(state, fixed) == []:
            return fixed
    return state.next(interleaved, notation)
