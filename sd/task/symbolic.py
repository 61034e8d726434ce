"""The embedded task's critic: exact, as judgements are arithmetic and continuations are derived."""
import random
from dataclasses import replace

from sd import UserError
from sd.answers import equal
from sd.critic import Critique
from sd.problems import Problem
from sd.steps import Step, parse, render
from sd.task import times_table as tt


class SymbolicCritic:
    """Exact on the embedded task: judgements are arithmetic (`times_table.check`), continuations derived."""

    def __init__(self, quoting: str = "partial", noise: float = 0.0):
        self.quoting, self.noise = quoting, noise    # noise: share of corrected products wrong on purpose

    def batch(self, problems: list[Problem], texts: list[str], truncated: list[bool]) -> list[Critique]:
        return [self(*rollout) for rollout in zip(problems, texts, truncated)]

    def __call__(self, problem: Problem, text: str, truncated: bool = False) -> Critique:
        """The critique of one trace. Raises UserError on a problem that is not a sum of products."""
        try:
            pairs = tt.read_problem(problem.problem)
        except ValueError as error:
            raise UserError(f"problem {problem.id}: the symbolic critic cannot read it, {error}") from None
        if not equal(problem.answer, str(sum(a * b for a, b in pairs))):
            raise UserError(f"problem {problem.id}: its answer is not the sum of its products; correct it")
        trace = parse(text)
        written = list(trace.steps)
        if truncated and written and trace.answer is None and not written[-1].closed:
            written.pop()                                   # cut off in mid-step: unfinished, not wrong
        answered = trace.answer is not None and (trace.answer.closed or not truncated)
        notation, interleaved = _habits(written, len(pairs))

        # a true step said twice is superfluous in a right rollout, but takes another's place in a wrong one
        wrong_kinds = ({"wrong", "again"} if answered and not equal(trace.answer.text, problem.answer)
                       else {"wrong"})
        order, texts = _own_order(written, pairs), [step.text for step in written]
        verdicts = tt.check(tt.State(list(order)), texts)
        wrong = next((i for i, verdict in enumerate(verdicts) if verdict.kind in wrong_kinds), None)
        state = tt.State(list(order))
        tt.check(state, texts[:len(verdicts) if wrong is None else wrong])  # again, to where it went wrong
        condense = wrong is None and not answered           # case C
        critique, inserted = [], False
        for verdict, step in zip(verdicts[:wrong], written):
            critique += map(str, verdict.missing)
            inserted |= bool(verdict.missing)
            if not (condense and verdict.kind == "again"):
                critique.append("correct" if self.quoting == "omit" else step.text)
        if wrong is not None:
            fixed = _corrected(state, verdicts[wrong].equation) or state.next(interleaved, notation)
            if (fixed is not None and fixed.product
                    and (rng := random.Random(f"{problem.id} {text}")).random() < self.noise):
                fixed = replace(fixed, value=rng.choice(tt.usual_mistakes(tt.key((fixed.left, fixed.right)))))
            if fixed is not None:                   # None: the derivation was complete, the step superfluous
                state.apply(fixed)
                notation = fixed.notation
                critique.append(self._fix(written[wrong].text, str(fixed)))
        rest = list(map(str, tt.derive(state, interleaved, notation)))
        answer = str(state.pool[0]) if self.noise and len(state.pool) == 1 else problem.answer
        if wrong is None and answered and not equal(trace.answer.text, problem.answer):
            wrong = len(written)
            answer = self._fix(trace.answer.text, answer)
        case = "D" if wrong is not None else "C" if not answered else "B" if inserted or rest else "A"
        return Critique(case, render(critique + rest, answer), wrong)

    def _fix(self, wrong: str, right: str) -> str:
        return f"{wrong}, so {right} is correct" if self.quoting == "full" else right


def _habits(written: list[Step], products: int) -> tuple[int, bool]:
    """The solver's notation and plan (sums as soon as possible?), read off its own steps."""
    read = [tt.read_equation(step.text) for step in written]
    equations = [e for e in read if e is not None]
    notation = equations[-1].notation if equations else tt.SYMBOLS
    first_sum = next((i for i, e in enumerate(read)     # unreadable steps count
                      if e is not None and not e.product), None)
    if first_sum is not None:
        return notation, first_sum < products
    # too early to see: words go with adding as one goes
    return notation, notation == tt.WORDS and len(equations) < 3


def _own_order(written: list[Step], pairs: list[tt.Pair]) -> list[tt.Pair]:
    """The products in the order in which the solver takes them.

    A step that is none of them (a misread factor, a product said twice) stands for one that the solver never
    takes: in `7*8 + 6*9 + 3*4`, the steps 7*8, 7*9, 3*4 mean 7*8, 6*9, 3*4. Correcting 7*9 into 3*4, the next
    one left, would reward the solver for a scrambled order, and it does learn that.
    """
    order, left = [], list(pairs)
    for equation in (tt.read_equation(step.text) for step in written):
        if equation is not None and not equation.product:
            continue
        match = tt.find(left, equation) if equation is not None else None
        order.append((equation.left, equation.right) if match else None)
        if match:
            left.remove(match)
    filled = []
    for pair in order:
        if pair is None and left:
            pair = left.pop(0)
        if pair is not None:
            filled.append(pair)
    return filled + left


def _corrected(state: tt.State, equation: tt.Equation | None) -> tt.Equation | None:
    """The wrong step with its own operands and the true value; None if these operands do not belong here."""
    if equation is None:
        return None
    truth = equation.left * equation.right if equation.product else equation.left + equation.right
    fixed = replace(equation, value=truth)
    verdict = tt.check(state.copy(), [str(fixed)])[0]
    return fixed if verdict.kind == "right" and not verdict.missing else None
