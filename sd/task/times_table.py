"""The embedded task: sums of products, a solver that knows half its times table, and an exact step checker.

A problem is `7*8 + 6*9 + 3*4`. The solver's house notation writes all products first and then running sums,
`<step_1> 7*8=56 </step_1> … <step_4> 56+54=110 </step_4>`; a minority of its corpus is in words and adds as
it goes, `7 times 8 is 56`, `56 plus 54 gives 110`. For half of the pairs ("hard") the corpus is right 5 % of
the time and otherwise makes one of eight usual mistakes: the solver does not know 7*8, and what it learns on
one problem serves all.

Everything here is arithmetic on equations: `derive` continues a derivation from any state (the corpus, the
references and the critic all use it), `check` walks through a trace and says what is wrong with each step.
"""
import random
import re
from dataclasses import dataclass, field

LOW, HIGH = 2, 12                                   # factors
PAIRS = [(a, b) for a in range(LOW, HIGH + 1) for b in range(a, HIGH + 1)]
HARD = frozenset(random.Random(2606).sample(PAIRS, len(PAIRS) // 2))
CHANCE = 0.05                                       # how often the corpus is right on a hard pair

Pair = tuple[int, int]
SYMBOLS, WORDS, SPACED = 0, 1, 2                    # notations: 7*8=56, 7 times 8 is 56, 7 * 8 = 56
# by notation, and whether it is a product or a sum
SIGNS = {(SYMBOLS, True): ("*", "="), (WORDS, True): (" times ", " is "), (SPACED, True): (" * ", " = "),
         (SYMBOLS, False): ("+", "="), (WORDS, False): (" plus ", " gives "), (SPACED, False): (" + ", " = ")}
EQUALS = {"*": "=", "×": "=", "+": "=", "times": "is", "plus": "gives"}
EQUATION = re.compile(r"(\d{1,6})( ?[*×+] ?| times | plus )(\d{1,6})( ?= ?| is | gives )(\d{1,6})")


def key(pair: Pair) -> Pair:
    """7*8 and 8*7 are one fact."""
    return (min(pair), max(pair))


def usual_mistakes(pair: Pair) -> list[int]:
    """The eight nearest wrong values that people write: neighbouring multiples, off by one, off by ten."""
    a, b = pair
    near = ([a * (b + 1), a * (b - 1), (a + 1) * b, (a - 1) * b] +
            [a * b + by for by in (1, -1, 10, -10, 2, -2)])
    return [v for v in dict.fromkeys(near) if v > 1 and v != a * b][:8]


def belief(pair: Pair, rng: random.Random) -> int:
    """What the untrained solver believes: the truth on easy pairs, mostly a usual mistake on hard ones."""
    if key(pair) in HARD and rng.random() >= CHANCE:
        return rng.choice(usual_mistakes(key(pair)))
    return pair[0] * pair[1]


@dataclass(frozen=True)
class Equation:
    left: int
    product: bool       # a product, else a sum
    right: int
    value: int
    notation: int = SYMBOLS

    @property
    def true(self) -> bool:
        return self.value == (self.left * self.right if self.product else self.left + self.right)

    @property
    def fact(self) -> tuple[bool, Pair]:
        """What it says, whatever the notation: a sum's operands have an order, a product's have none."""
        return self.product, key((self.left, self.right)) if self.product else (self.left, self.right)

    def __str__(self) -> str:
        operator, equals = SIGNS[self.notation, self.product]
        return f"{self.left}{operator}{self.right}{equals}{self.value}"


def read_equation(text: str) -> Equation | None:
    """`7*8=56`, `7 * 8 = 56` or `7 times 8 is 56`; None for anything else, mixtures too."""
    match = EQUATION.fullmatch(text)
    if not match or match[4].strip() != EQUALS[match[2].strip()]:
        return None
    operator = match[2].strip()
    notation = WORDS if operator.isalpha() else SPACED if " " in match[2] else SYMBOLS
    return Equation(int(match[1]), operator in ("*", "×", "times"), int(match[3]), int(match[5]), notation)


def read_problem(text: str) -> list[Pair]:
    """The products of `7*8 + 6*9`, or of `What is 7 times 8 plus 6 times 9?`, for a solver not made for this.

    Raises ValueError on any other text: the symbolic critic reads nothing else.
    """
    plain = re.sub(r"What is (.+)\?", r"\1", text).replace(" plus ", " + ").replace(" times ", "*")
    if not re.fullmatch(r"\d{1,2}\*\d{1,2}( \+ \d{1,2}\*\d{1,2})*", plain):
        raise ValueError(f"not a sum of products such as '7*8 + 6*9': {text[:80]!r}")
    return [tuple(int(f) for f in product.split("*")) for product in plain.split(" + ")]


def write_problem(pairs: list[Pair]) -> str:
    return " + ".join(f"{a}*{b}" for a, b in pairs)


def find(pairs: list[Pair], equation: Equation) -> Pair | None:
    """The pair among `pairs` that a product is about, in either order of its factors."""
    return next((pair for pair in pairs if key(pair) == key((equation.left, equation.right))), None)


@dataclass
class State:
    """Where a derivation stands: products still to do, values still to add (a running sum stands first)."""
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

    def copy(self) -> "State":
        return State(list(self.todo), list(self.pool), list(self.done))

    def next(self, interleaved: bool, notation: int, value=lambda pair: pair[0] * pair[1]) -> Equation | None:
        """The next equation of the plan; None when one value is left, which is the answer."""
        if len(self.pool) > 1 and (interleaved or not self.todo):
            return Equation(self.pool[0], False, self.pool[1], self.pool[0] + self.pool[1], notation)
        if self.todo:
            a, b = self.todo[0]
            return Equation(a, True, b, value((a, b)), notation)
        return None

    def justify(self, number: int, notation: int) -> Equation | None:
        """The unwritten equation that would put `number` into the pool, if one true step does."""
        steps = ([Equation(a, True, b, a * b, notation) for a, b in self.todo] +
                 [self.next(True, notation)])           # a sum, last
        return next((step for step in steps if step is not None and step.value == number), None)


def derive(state: State, interleaved: bool, notation: int,
           value=lambda pair: pair[0] * pair[1]) -> list[Equation]:
    """From `state` to the end: all products, then running sums, or (interleaved) sums as soon as possible."""
    start = len(state.done)
    while (equation := state.next(interleaved, notation, value)) is not None:
        state.apply(equation)
    return state.done[start:]


@dataclass(frozen=True)
class Verdict:
    """What the checker says of one step. `missing` are the true steps it relies on that nobody wrote."""
    kind: str                                   # right | again (true, but said before) | wrong
    equation: Equation | None
    missing: tuple[Equation, ...] = ()


def check(state: State, texts: list[str]) -> list[Verdict]:
    """Judges steps in order against `state`, until one is found wrong; `state` is left before that one.

    A step is right if its arithmetic is true and its operands are the problem's: a product still to do, or
    values that stand in the pool. Order, notation and grouping are the solver's own choice.
    """
    verdicts = []
    for text in texts:
        equation = read_equation(text)
        true = equation is not None and equation.true
        missing = _missing(state, equation) if true else None
        said = true and equation.fact in [done.fact for done in state.done]
        kind = "right" if missing is not None else "again" if said else "wrong"
        verdicts.append(Verdict(kind, equation, tuple(missing or ())))
        if kind == "wrong":
            break
        for step in [*missing, equation] if kind == "right" else []:
            state.apply(step)
    return verdicts


def _missing(state: State, equation: Equation) -> list[Equation] | None:
    """The unwritten true steps behind a true equation, at most one per operand; None if it does not fit."""
    if equation.product:
        return [] if find(state.todo, equation) else None
    trial, missing = state.copy(), []
    for operand in (equation.left, equation.right):
        if operand not in trial.pool and (step := trial.justify(operand, equation.notation)) is not None:
            missing.append(step)
            trial.apply(step)
        if operand not in trial.pool:
            return None
        trial.pool.remove(operand)
    return missing


def reference_text(pairs: list[Pair], values: list[int]) -> str:
    """An independent author's solution in prose: other wording, and the author's order (that of `pairs`)."""
    parts = [f"{a} multiplied by {b} makes {v}" for (a, b), v in zip(pairs, values)]
    return "first " + ", then ".join(parts) + f", so {sum(values)} is correct"


def author_order(pairs: list[Pair], rng: random.Random, same: float = 0.5) -> list[Pair]:
    """The order in which an independent author takes the products: the problem's with probability `same`."""
    return list(pairs) if rng.random() < same else rng.sample(pairs, len(pairs))
