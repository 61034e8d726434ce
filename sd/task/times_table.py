"""The embedded task: sums of products, a solver that half knows its times table, an exact checker.

A problem is a sum of 2 to 6 products, `7*8 + 6*9 + 3*4`. The solver writes all products and then
running sums, `<step_1> 7*8=56 </step_1> … <step_4> 56+54=110 </step_4>`. Every step is worded anew:
`7*8=56`, `8*7 is 56`, `7 times 8 makes 56`. For half of the pairs ("hard") the corpus is right 5 %
of the time and otherwise makes one of eight usual mistakes: the solver does not know 7*8, and what
it learns on one problem serves all.

Everything here is arithmetic on equations. `derive` continues a derivation from any state: the
corpus, the references and the critic all use it. `check` walks through a trace up to its first
wrong step.
"""
import random
import re
from dataclasses import dataclass, field
from math import prod

LOW, HIGH = 2, 12                                   # factors
LENGTHS = 2, 6                                      # products of a problem, from fewest to most
PRODUCTS = 6                                        # of the shipped problems
PAIRS = [(a, b) for a in range(LOW, HIGH + 1) for b in range(a, HIGH + 1)]
HARD = frozenset(random.Random(2606).sample(PAIRS, len(PAIRS) // 2))
CHANCE = 0.05                                       # how often the corpus is right on a hard pair

Pair = tuple[int, int]
Notation = tuple[str, str]                          # how a step is worded: operator and equals sign
SYMBOLS, SPACED, WORDS = ("*", "="), (" * ", " = "), (" times ", " is ")
PROSE = (" multiplied by ", " makes ")              # a reference's
SUM = {"*": "+", " * ": " + ", " times ": " plus ", " multiplied by ": " plus "}
EQUATION = re.compile(
    r"(\d{1,6})( ?[*×+] ?| times | multiplied by | plus )(\d{1,6})"
    r"( ?= ?| is | makes | gives )(\d{1,6})")


def key(pair: Pair) -> Pair:
    """7*8 and 8*7 are one fact."""
    return tuple(sorted(pair))


def usual_mistakes(pair: Pair) -> list[int]:
    """The nearest wrong values that people write: other multiples, off by one, off by ten."""
    a, b = key(pair)
    differences = (a, -a, b, -b, 1, -1, 10, -10, 2, -2)
    wrong = [a * b + by for by in differences if a * b + by > 1]
    return list(dict.fromkeys(wrong))[:8]


def belief(pair: Pair, rng: random.Random) -> int:
    """What the untrained solver believes: the truth on easy pairs, mostly a mistake on hard."""
    if key(pair) in HARD and rng.random() >= CHANCE:
        return rng.choice(usual_mistakes(pair))
    return prod(pair)


@dataclass(frozen=True)
class Equation:
    left: int
    product: bool       # a product, else a sum
    right: int
    value: int
    notation: Notation = SYMBOLS

    @property
    def operands(self) -> Pair:
        return self.left, self.right

    @property
    def truth(self) -> int:
        return prod(self.operands) if self.product else sum(self.operands)

    @property
    def fact(self) -> tuple[bool, Pair]:
        """What it says in any notation: a sum's operands have an order, a product's have none."""
        return self.product, key(self.operands) if self.product else self.operands

    def __str__(self) -> str:
        operator, equals = self.notation
        if not self.product:
            operator = SUM[operator]
        return f"{self.left}{operator}{self.right}{equals}{self.value}"


def read_equation(text: str) -> Equation | None:
    """`7*8=56`, `7 * 8 = 56`, `7 times 8 is 56` and mixtures; None for anything else."""
    match = EQUATION.fullmatch(text)
    if match is None:
        return None
    left, operator, right, equals, value = match.groups()
    product = operator.strip() not in ("+", "plus")
    if "plus" in operator:
        operator = " times "
    elif operator.strip() in ("+", "×", "*"):
        operator = " * " if " " in operator else "*"
    if "=" in equals:
        equals = " = " if " " in equals else "="
    return Equation(int(left), product, int(right), int(value), (operator, equals))


def read_problem(text: str) -> list[Pair] | None:
    """The products of `7*8 + 6*9`, or of `What is 7 times 8 plus 6 times 9?`; else None."""
    plain = re.sub(r"What is (.+)\?", r"\1", text)
    plain = plain.replace(" plus ", " + ").replace(" times ", "*")
    if not re.fullmatch(r"\d{1,2}\*\d{1,2}( \+ \d{1,2}\*\d{1,2})*", plain):
        return None
    return [tuple(map(int, product.split("*"))) for product in plain.split(" + ")]


def write_problem(pairs: list[Pair], words: bool = False) -> str:
    """What `read_problem` reads: a question if in words."""
    text = " + ".join(f"{a}*{b}" for a, b in pairs)
    if words:
        text = f"What is {text}?".replace("*", " times ").replace("+", "plus")
    return text


def find(pairs: list[Pair], equation: Equation) -> Pair | None:
    """The pair among `pairs` that a product is about, in either order of its factors."""
    for pair in pairs:
        if key(pair) == key(equation.operands):
            return pair
    return None


@dataclass
class State:
    """Where a derivation stands: products to do, and values to add, a running sum first."""
    todo: list[Pair]
    pool: list[int] = field(default_factory=list)
    done: list[Equation] = field(default_factory=list)

    def apply(self, equation: Equation) -> None:
        self.done.append(equation)
        if equation.product:
            self.todo.remove(find(self.todo, equation))
            self.pool.append(equation.value)
        else:
            self.pool.remove(equation.left)
            self.pool.remove(equation.right)
            self.pool.insert(0, equation.value)

    def next(self, interleaved: bool, notation: Notation, value=prod) -> Equation | None:
        """The next equation of the plan; None when one value is left, which is the answer.

        `value(pair)` is what the solver takes a product to be.
        """
        if len(self.pool) > 1 and (interleaved or not self.todo):
            a, b = self.pool[:2]
            return Equation(a, False, b, a + b, notation)
        if self.todo:
            a, b = self.todo[0]
            return Equation(a, True, b, value((a, b)), notation)
        return None

    def justify(self, number: int, notation: Notation) -> Equation | None:
        """The unwritten equation that would put `number` into the pool, if one true step does."""
        for a, b in self.todo:
            if a * b == number:
                return Equation(a, True, b, number, notation)
        step = self.next(True, notation)                # a sum, or a product that is another number
        if step is not None and step.value == number:
            return step
        return None


def derive(state: State, interleaved: bool, notation: Notation, value=prod) -> list[Equation]:
    """From `state` to the end: products, then running sums; interleaved, sums as they come."""
    begun = len(state.done)
    while state.todo or len(state.pool) > 1:
        state.apply(state.next(interleaved, notation, value))
    return state.done[begun:]


def check(state: State, equations: list[Equation | None],
          repeats: bool) -> list[list[Equation] | None]:
    """Judges steps in order, up to the first wrong one.

    Returns, for each step before that one, the true steps that it relies on and nobody wrote; None
    for a step that only repeats another, which is wrong unless `repeats` are allowed. The others
    are applied to `state`.

    A step is right if its arithmetic is true and its operands are the problem's: a product still to
    do, or values that stand in the pool. Order, notation and grouping are the solver's own choice.
    """
    right = []
    for equation in equations:
        if equation is None or equation.value != equation.truth:
            break
        missing = missing_steps(state, equation)
        if missing is not None:
            for step in [*missing, equation]:
                state.apply(step)
        elif not repeats or equation.fact not in [done.fact for done in state.done]:
            break
        right.append(missing)
    return right


def missing_steps(state: State, equation: Equation) -> list[Equation] | None:
    """The true steps behind a true equation that nobody wrote; None if it does not belong here.

    At most one per operand: what leaves out more than that is not a step.
    """
    if equation.product:
        return [] if find(state.todo, equation) else None
    missing = []
    trial = State(list(state.todo), list(state.pool))
    for operand in equation.operands:
        if operand not in trial.pool:
            step = trial.justify(operand, equation.notation)
            if step is None:
                return None
            missing.append(step)
            trial.apply(step)
        trial.pool.remove(operand)
    return missing


def reference_text(pairs: list[Pair], value=prod) -> str:
    """An independent author's solution in prose, in the author's order: that of `pairs`."""
    parts = [f"{pair[0]} multiplied by {pair[1]} makes {value(pair)}" for pair in pairs]
    return f"first {', then '.join(parts)}, so {sum(map(value, pairs))} is correct"


def author_order(pairs: list[Pair], rng: random.Random, same: float = 0.5) -> list[Pair]:
    """The order in which that author takes the products: the problem's with probability `same`."""
    return list(pairs) if rng.random() < same else rng.sample(pairs, len(pairs))
