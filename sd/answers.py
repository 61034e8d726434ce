r"""Final answers: extract one from a trace, decide whether two are equal. Nothing is ever run.

A small reader for the LaTeX of short answers gives each a canonical string. A formula becomes its
value modulo a prime, with a fixed random number for each letter: two formulas that are equal
everywhere are equal there too, two others almost never (chance 1e-60), and 9^{999} costs no more
than 9. Lists, intervals, matrices, equations and words are strings built around such values. What
cannot be read is compared as text.

Conventions, following the answers in the MATH and GSM8K data: percent signs, currencies, degrees
and units are dropped; lists and sets have no order, tuples have one; `5` may stand for `x = 5`, and
`52` for `52_8`, but `y = 5` differs from `x = 5`; a rounded number differs from the exact one.
Values count, not forms: `(x+1)^2` is `x^2+2x+1`. But unlike in a computer algebra system, a sum or
product of plain numbers is unfinished and equals no number: otherwise the problem `7*8 + 6*9` would
be its own answer.

Simplified: letters under a root count as positive, and sqrt(-1) is the letter i, whose square is
not -1. Whether a formula, or a multiple of a prime > 170, is a square modulo PRIME is left to
chance: a product of two roots of such values may fail to equal the root of their product. sin and
log are not evaluated, equations are not rearranged.
"""
import re
from dataclasses import dataclass
from fractions import Fraction
from hashlib import sha256

from sd.steps import Trace

# 12 times the product of all primes below 170, minus 1: so it is -1 modulo 8 and modulo each odd
# prime q < 170. Hence, modulo PRIME, 2 and these q are squares, -1 is not, and every square has
# exactly one root that is itself a square, as positive numbers have.
PRIME = 11555369048831807124683354590813613150357029567274556904991561895239
LENGTH, DEPTH = 400, 25             # longer or more deeply nested answers are compared as text
BINDING = {r"\cup": 1, "+": 2, "-": 2, "*": 3, "/": 3, "^": 4}
RELATIONS = r"= < > \le \ge \ne \in :".split()
OPENING, CLOSING = r"( [ \{".split(), r") ] \}".split()
ENDS = [*CLOSING, "}", ""]              # what ends a list of items
FUNCTIONS = r"\sin \cos \tan \cot \sec \csc \arcsin \arccos \arctan \log \ln \exp".split()
NAMES = r"""\alpha \beta \gamma \delta \theta \lambda \mu \phi \pi \psi \rho \sigma \omega
            \infty""".split()
FACTORS = ["(", "{", r"\frac", r"\sqrt", *FUNCTIONS, *NAMES]    # a `*` before these may be omitted

SPELLINGS = {name[1:]: name for name in FUNCTIONS + NAMES}
for row in r"""
    ^       **
    *       \cdot \times × ·
    /       \div
    -       − –
    ,       ; and or
    \frac   \dfrac \tfrac
    \sqrt   sqrt √
    \pm     ±
    \cup    ∪
    \pi     π
    \theta  θ
    \infty  inf ∞
    \le     \leq <= ≤
    \ge     \geq >= ≥
    \ne     \neq
""".strip().splitlines():
    usual, *others = row.split()
    SPELLINGS |= dict.fromkeys(others, usual)

# The beginning of \text{…}.
TEXT = r"\\(?:text[a-z]*|mbox|mathrm)\s*\{"
# What follows is part of the answer, not a unit: 8 p.m., 5 million, 2 or 3.
WORDS = "|".join(filter(str.isalpha, SPELLINGS))
NO_UNIT = rf"(?!\s*(?:[ap]\.?\s*m\b|(?:hundred|thousand|[mb]illion|trillion|{WORDS})\b))"
# A unit may be squared or cubed, and ends an item of the answer.
UNIT_END = r"\s*(?:\^\s*\{?[23]\}?)?(?=[\s.]*(?:$|[,;)\]]|\\\}))"
# What makes no difference is removed or unified first, in this order.
CLEANING = {
    # raised digits
    "²": "^2",
    "³": "^3",
    # thousands separators, as in 1{,}000 and 1,\!000
    r"(?<=\d)(?:\{,\}|,\s*\\!|\\,|\\ )\s*(?=\d{3}(?!\d))": "",
    # sizes of brackets, fonts
    r"\\(?:left|right|[bB]igg?[lr]?|math(?:bf|it)|displaystyle|phantom)(?![A-Za-z])": "",
    # units in \text, after anything
    rf"(?<=[\w)\]}}])(?:\s|\\[,;:! ]|~)*{TEXT}{NO_UNIT}[^{{}}()\d,;]*\}}{UNIT_END}": "",
    # plain units, after a number: any word of three letters, or a short one from this list
    rf"(?<=\d)\s+{NO_UNIT}(?:[A-Za-z]{{3,}}|[ckm]?m|m[gLl]|ft|in|k?g|lb|oz|yd|hr)"
    rf"(?:[ /]+[A-Za-z]+)*{UNIT_END}": "",
    # \text itself
    TEXT + r"([^{}]*)\}": r" \1 ",
    # matrices, which become [[1, 2], [3, 4]]
    r"\\begin\{\w+\}(?:\{\w*\})?": "[[",
    r"(?:\\\\\s*)?\\end\{\w+\}": "]]",
    r"\\\\": "],[",
    "&": ",",
    # the empty set
    r"\\(?:emptyset|varnothing)(?![A-Za-z])": r"\\{\\}",
    # degrees, spacing, percent signs, currencies
    r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)|\\q?quad(?![A-Za-z])|\\[,;:!>()\[\] ]|~|\\?[$%]|[°€£]": " ",
    # a leading "approximately", a final full stop
    r"^\s*\\approx|(?<![.,;:\s])\s*[.,;:]\s*$": "",
}
CLEANING = {re.compile(pattern): replacement for pattern, replacement in CLEANING.items()}

# A number, a command, a brace of a set, a word, an operator, or any other character. Two letters
# that are no name are two tokens: a product.
TOKEN = r"\d+(?:\.\d+)?|\.\d+|\\[A-Za-z]+|\\[{}]|[A-Za-z]{3,}|or|pi|mu|ln|\*\*|[<>]=|\S"
INSIDE = re.compile(rf"(?a)\s*({TOKEN})")
# Outside brackets 1,224.0 is a number; (1,224) is a point.
OUTSIDE = re.compile(rf"(?a)\s*([1-9]\d{{0,2}}(?:,\d{{3}})+(?:\.\d+)?(?!,?\d)|{TOKEN})")
# A whole number, short enough for the reader.
INTEGER = r"(?a)-?\d{1,18}"
# A left side: x =, S_{10} =, Area =, \theta =, f(x) =, (x,y) =, x \in.
NAMED = (r"([A-Za-z]+(_\w|_\{\w+\})?|[A-Za-z]\([A-Za-z]\)|\([A-Za-z](,[A-Za-z])+\)|\\[a-z]+)"
         r"(=|\\in)")
# A brace that opens, maybe a box; a whole `\boxed 3`; an escaped brace; a brace that closes.
BOXES = (r"(?P<open>(?P<box>\\f?box(?:ed)?\s*)?\{)|\\boxed\s+(?P<bare>[^\s{$][^$\n]*)[$\n]"
         r"|\\[{}\\]|\}")
# The last line of an answer in GSM8K.
HASHES = r"(?m)^[ \t]*####(.*)\n"
# **bold**, or a formula between $…$, \(…\), \[…\].
WRAPPED = r"(?s)\A(?:\*\*([^*]+)\*\*|\$+([^$]+)\$+|\\\((.+)\\\)|\\\[(.+)\\\])\Z"

# The value of a piece of an answer: a Fraction if it is plain, that is, a number written out (12,
# -3.5, 3/4); an int modulo PRIME for any other formula; a list for a set; a str for all else.
Value = Fraction | int | list | str


def final_answer(trace: Trace, truncated: bool) -> str | None:
    r"""The last `<answer>`, or else the last `\boxed{…}`, or else the last `#### …` line.

    None if there is none of them, or if the last `<answer>` was cut off.
    """
    answer, text = trace.answer, trace.text
    if answer is None:
        if not truncated:
            text += "\n"                        # a truncated trace's last line might have gone on
        found = boxed(text) or ["", *re.findall(HASHES, text)][-1]
    elif truncated and not answer.closed:
        return None
    else:
        found = boxed(answer.text + "\n") or answer.text
    return re.sub(WRAPPED, r"\1\2\3\4", found.strip()).strip() or None


def boxed(text: str) -> str:
    r"""What the last `\boxed{…}` (or `\boxed 3`, to the line's end) holds; "" if there is none."""
    found = ""
    starts = []                         # per open brace: where its box begins, 0 if it is no box
    for match in re.finditer(BOXES, text):
        if match["bare"]:
            found = match["bare"]
        elif match["open"]:
            starts.append(match.end() if match["box"] else 0)
        elif match[0] == "}" and starts:
            start = starts.pop()
            if start:
                found = text[start:match.start()]
    return found


def equal(answer: str | None, truth: str) -> bool:
    """Whether two answers are the same one, where `5` may stand for `x = 5` and `52` for `52_8`."""
    if answer is None:
        return False
    answer, truth = answer.strip(), truth.strip()
    if answer == truth:
        return True
    if re.fullmatch(INTEGER, answer) and re.fullmatch(INTEGER, truth):
        return int(answer) == int(truth)
    left, right = canonical(answer), canonical(truth)
    if left == right:
        return True
    for bare in (1, 2):
        short = canonical(answer, bare)         # at least one of the two must have been this short
        if short in (left, right) and short == canonical(truth, bare):
            return True
    return False


def canonical(answer: str, bare: int = 0) -> str:
    """The same string for equal answers; `bare` 1 drops `x =`, 2 also a number's base."""
    text = (boxed(answer + "\n") or answer).strip()
    if len(text) > LENGTH:
        return text
    tokens = split(text)
    values = []
    try:
        for sign in "+-":               # both readings of ±; the second adds only new values
            chosen = [sign if token == r"\pm" else token for token in tokens]
            found = Reader([*chosen, ""], bare).bracketed("")
            items = found if isinstance(found, list) else [found]
            values += [value for value in items if value not in values]
        return show(values) if tokens else ""
    except (ValueError, ZeroDivisionError):     # not in the subset, or too deep: compared as text
        return " ".join(tokens)


def split(text: str) -> list[str]:
    """The tokens of a text without what makes no difference, in the usual spelling."""
    for _ in range(3):                          # a \text may contain another
        for pattern, replacement in CLEANING.items():
            text = pattern.sub(replacement, " ".join(text.split()))
    text = text.strip()
    tokens, depth = [], 0
    while text:
        match = (INSIDE if depth else OUTSIDE).match(text)
        text = text[match.end():]
        token = match[1].replace(",", "") or ","
        token = SPELLINGS.get(token, token)
        depth += (token in OPENING) - (token in CLOSING)
        tokens.append(token.lower() if len(token) > 2 and token.isalpha() else token)
    return tokens


def show(value: Value) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        return f"#{residue(value)}"
    if len(value) == 1:
        return show(value[0])
    return "{" + ", ".join(sorted(map(show, value))) + "}"


def residue(value: Value) -> int:
    """A number modulo PRIME; ValueError if it is none, or so long that others share its residue."""
    if isinstance(value, int):
        return value
    if not isinstance(value, Fraction):
        raise ValueError("no number")
    over, under = value.as_integer_ratio()
    if 2 * max(abs(over), under) ** 2 > PRIME:
        raise ValueError("too long")
    return over * pow(under, -1, PRIME) % PRIME


def letter(name: str) -> int:
    """A random number, fixed for each name; a square, so that the root of x^2 is x."""
    return int(sha256(name.encode()).hexdigest(), 16) ** 2 % PRIME


def calculate(left: Value, operator: str, right: Value) -> Value:
    if operator == r"\cup":
        return r" \cup ".join(sorted([*show(left).split(r" \cup "), show(right)]))
    a, b = residue(left), residue(right)
    plain = type(left) is type(right) is Fraction
    if operator == "^":
        return left if right == 1 else power(a, right)
    if operator == "/":
        return left / right if plain else a * pow(b, -1, PRIME) % PRIME
    if plain:
        raise ValueError("a sum or product of plain numbers is unfinished")
    results = {"+": a + b, "-": a - b, "*": a * b}
    return results[operator] % PRIME


def power(base: int, exponent: Fraction | int) -> int:
    """The root of a square is the one that is itself a square. Any other number is minus a square:
    odd roots keep the sign, even ones get a letter for the root of -1."""
    if isinstance(exponent, int):
        return letter(f"{base}^{exponent}")     # 2^n: identified by its parts alone
    root, squares = exponent.denominator, (PRIME - 1) // 2
    inverse = pow(root, -1, squares)
    unit = 1
    if pow(base, squares, PRIME) > 1:           # 1: a square; 0: zero itself
        base = -base
        unit = -1 if root % 2 else letter("i" if root == 2 else f"root {root} of -1")
    return pow(unit * pow(base, inverse, PRIME), exponent.numerator, PRIME)


@dataclass
class Reader:
    """Recursive descent. Each method reads from token `at` onwards and returns a value."""
    tokens: list[str]           # the last one is "", the end
    bare: int
    at: int = 0
    depth: int = 0

    @property
    def next(self) -> str:
        return self.tokens[self.at]

    def take(self) -> str:
        self.at += 1
        return self.tokens[self.at - 1]

    def met(self, token: str) -> bool:
        """Takes the next token if it is this one."""
        found = self.next == token
        self.at += found
        return found

    def items(self) -> list[Value]:
        """Expressions or relations, separated by commas, up to a closing bracket or the end."""
        values = []
        while self.next not in ENDS:
            values.append(self.relation())
            if self.next not in [",", *ENDS]:
                raise ValueError("no comma")
            while self.met(","):                # 2, 3, and 4
                pass
        return values

    def relation(self) -> Value:
        """An expression, or several with =, <, … between them."""
        begin, value = self.at, self.expression()
        while self.next in RELATIONS:
            sign = self.take()
            left, right = "".join(self.tokens[begin:self.at]), self.expression()
            if self.bare and re.fullmatch(NAMED, left):
                value = right
            else:
                value = f"{show(value)} {sign} {show(right)}"
        return value

    def expression(self, loosest: int = 1, until: list[str] = []) -> Value:
        """Operands with operators as tight as `loosest` or tighter, by precedence climbing."""
        minus = False
        while self.next in ("+", "-"):
            minus ^= self.take() == "-"
        if minus:
            value = self.expression(max(loosest, BINDING["*"]))
            value = -value if isinstance(value, Fraction) else -residue(value) % PRIME
        else:
            value = self.operand()
        while self.next not in until:
            omitted = self.next in FACTORS or len(self.next) == 1 and self.next.isalpha()
            operator = "*" if omitted else self.next
            if BINDING.get(operator, 0) < loosest:
                break
            self.met(operator)                  # takes it, unless it was omitted
            if operator == "^":
                right = self.argument()
            else:
                right = self.expression(BINDING[operator] + 1)
            value = calculate(value, operator, right)
        return value

    def argument(self, digit: bool = False) -> Value:
        r"""A group or a single token; with `digit`, only a number's first digit: \frac43 is 4/3."""
        if self.next == "-":
            return self.expression(BINDING["^"] + 1)
        if not self.next[-1:].isdecimal():
            return self.operand()
        if digit and len(self.next) > 1:
            self.tokens[self.at:self.at + 1] = self.next[0], self.next[1:]
        return Fraction(self.take())

    def operand(self) -> Value:
        """A number, a letter, a word, a function, or anything in brackets."""
        self.depth += 1
        if self.depth > DEPTH or not self.next:
            raise ValueError("too deep, or at the end")
        token = self.take()
        if token[-1].isdecimal():
            value = self.number(token)
        elif token in NAMES or len(token) == 1 and token.isalpha():
            value = letter(self.subscripted(token))
        elif token.isalpha():
            value = token
        elif token == r"\frac":
            value = calculate(self.argument(digit=True), "/", self.argument(digit=True))
        elif token == r"\sqrt":
            value = self.root()
        elif token in FUNCTIONS:
            value = self.function(token)
        else:
            value = self.bracketed(token)
        self.depth -= 1
        return value

    def subscripted(self, name: str) -> str:
        return f"{name}_{show(self.argument())}" if self.met("_") else name

    def number(self, token: str) -> Value:
        name = self.subscripted(token)
        if name != token and self.bare < 2:
            return letter(name)                 # 52_8
        value = Fraction(token)
        if name.isdecimal() and self.next == r"\frac":
            fraction = self.operand()
            if isinstance(fraction, Fraction):
                return value + fraction         # 1\frac{4}{5} is 9/5
            return calculate(value, "*", fraction)
        return value

    def root(self) -> Value:
        degree = Fraction(2)
        if self.met("["):
            degree = self.expression()
            if not self.met("]"):
                raise ValueError("no bracket")
        return calculate(self.argument(), "^", calculate(Fraction(1), "/", degree))

    def function(self, token: str) -> Value:
        r"""\sin x or \sin^2 x; it is not evaluated, so each function of each value is a letter."""
        name = self.subscripted(token)
        exponent = self.argument() if self.met("^") else Fraction(1)
        inside = self.operand() if self.next == "(" else self.expression(BINDING["*"], FUNCTIONS)
        return calculate(letter(f"{name}({show(inside)})"), "^", exponent)

    def bracketed(self, opening: str) -> Value:
        """A group, a set, a point or an interval; an `opening` of "" is closed by the end."""
        items = self.items()
        kind = opening[-1:] + self.take()[-1:]
        if kind in ("", "()", "{}") and len(items) == 1:
            return items[0]
        if kind in ("", "{}"):
            return items
        if not items or kind not in "() [] (] [)".split():
            raise ValueError("no such brackets")
        return kind[0] + ", ".join(map(show, items)) + kind[1]
