r"""Final answers: extract one from a trace, decide whether two are equal. Nothing a model wrote is ever run.

A small reader for the LaTeX of short answers gives each a canonical string. A formula becomes its value
modulo a prime, with a fixed random number for each letter: two formulas that are equal everywhere are equal
there too, two others almost never (chance 1e-60), and 9^{999} costs no more than 9. Lists, intervals,
matrices, equations and words are strings built around such values. What cannot be read is compared as text.

Conventions, following the answers in the MATH and GSM8K data: percent signs, currencies, degrees and units
are dropped; lists and sets have no order, tuples have one; `5` may stand for `x = 5`, and `52` for `52_8`,
but `y = 5` differs from `x = 5`; a rounded number differs from the exact one. Values count, not forms:
`(x+1)^2` is `x^2+2x+1`. But unlike in a computer algebra system, a sum or product of plain numbers is
unfinished and equals no number: otherwise the problem `7*8 + 6*9` would be its own answer.

Simplified: letters under a root count as positive, and sqrt(-1) is the letter i. Whether a formula, or a
multiple of a prime > 170, is a square modulo PRIME is left to chance: a product of two roots of such values
may fail to equal the root of their product. sin and log are not evaluated, equations not rearranged.
"""
import re
from fractions import Fraction
from hashlib import sha256
from math import prod

from sd.steps import parse

# It is -1 modulo 8 and modulo each odd prime q < 170. Hence, modulo PRIME, 2 and these q are squares, -1 is
# not, and every square has exactly one root that is itself a square, as one expects of positive numbers.
PRIME = 12 * prod(q for q in range(2, 170) if all(q % d for d in range(2, q))) - 1
LENGTH, DEPTH = 400, 25             # longer or more deeply nested answers are compared as text
BINDING = {r"\cup": 1, "+": 2, "-": 2, "*": 3, "/": 3, "^": 4}
RELATIONS = {"=", "<", ">", r"\le", r"\ge", r"\ne", r"\in", ":"}
FUNCTIONS = {"\\" + name for name in "sin cos tan cot sec csc arcsin arccos arctan log ln exp".split()}
NAMES = {"\\" + name
         for name in "alpha beta gamma delta theta lambda mu phi pi psi rho sigma omega infty".split()}
FACTORS = {"(", "{", r"\frac", r"\sqrt"} | FUNCTIONS | NAMES       # a `*` before these may be omitted
SPELLINGS = {"**": "^", "<=": r"\le", ">=": r"\ge", r"\leq": r"\le", r"\geq": r"\ge", r"\neq": r"\ne",
             r"\cdot": "*", r"\times": "*", r"\div": "/", r"\dfrac": r"\frac", r"\tfrac": r"\frac", ";": ",",
             "and": ",", "or": ",", "−": "-", "–": "-", "×": "*", "·": "*", "π": r"\pi", "θ": r"\theta",
             "√": r"\sqrt", "±": r"\pm", "∞": r"\infty", "∪": r"\cup", "≤": r"\le", "≥": r"\ge",
             "sqrt": r"\sqrt", "inf": r"\infty", **{name[1:]: name for name in FUNCTIONS | NAMES}}
TEXT = r"\\(?:text[a-z]*|mbox|mathrm)\s*\{"
NO_UNIT = (r"(?!\s*(?:[ap]\.?\s*m\b|(?:hundred|thousand|[mb]illion|trillion|" +
           "|".join(filter(str.isalpha, SPELLINGS)) + r")\b))")
UNIT_END = r"\s*(?:\^\s*\{?[23]\}?)?(?=[\s.]*(?:$|[,;)\]]|\\\}))"
# First, regular expressions remove or unify what makes no difference: raised digits, thousands separators
# as in 1{,}000 and 1,\!000, bracket sizes, units (in \text, then plain), \text itself, matrices (written as
# [[1, 2], [3, 4]]), degrees, spacing, currencies.
CLEANING = [(re.compile(pattern), replacement) for pattern, replacement in [
    ("²", "^2"), ("³", "^3"), (r"(?<=\d)(?:\{,\}|,\s*\\!|\\,|\\ )\s*(?=\d{3}(?!\d))", ""),
    (r"\\(?:left|right|[bB]igg?[lr]?|math(?:bf|it)|displaystyle|phantom)(?![A-Za-z])", ""),
    (r"(?<=[\w)\]}])(?:\s|\\[,;:! ]|~)*" + TEXT + NO_UNIT + r"[^{}()\d,;]*\}" + UNIT_END, ""),
    (r"(?<=\d)\s+" + NO_UNIT + r"(?:[A-Za-z]{3,}|[ckm]?m|m[gLl]|ft|in|k?g|lb|oz|yd|hr)(?:[ /]+[A-Za-z]+)*" +
     UNIT_END, ""),
    (TEXT + r"([^{}]*)\}", r" \1 "),
    (r"\\begin\{\w+\}(?:\{\w*\})?", "[["), (r"(?:\\\\\s*)?\\end\{\w+\}", "]]"), (r"\\\\", "],["), ("&", ","),
    (r"\\(?:emptyset|varnothing)(?![A-Za-z])", r"\\{\\}"),
    (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)|\\q?quad(?![A-Za-z])|\\[,;:!>()\[\] ]|~|\\?[$%]|[°€£]", " "),
    (r"^\s*\\approx|(?<![.,;:\s])\s*[.,;:]\s*$", ""),
]]
TOKEN = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+|\\[A-Za-z]+|\\[{}]|[A-Za-z]+|\*\*|[<>]=|\S)", re.ASCII)
THOUSANDS = re.compile(r"\s*([1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?)(?!,?\d)", re.ASCII)
# What may stand before `=`: x, S_{10}, Area, \theta, f(x), (x,y).
SYMBOL = re.compile(r"[A-Za-z]+(_\w|_\{\w+\})?|[A-Za-z]\([A-Za-z]\)|\([A-Za-z](,[A-Za-z])+\)|\\[a-z]+")
BOXES = re.compile(r"(?P<box>\\f?box(?:ed)?\s*\{)|\\boxed\s+(?P<bare>[^\s{$][^$\n]*)[$\n]|\\[{}\\]|[{}]")
HASHES = re.compile(r"^[ \t]*####(.*)\n", re.MULTILINE)
WRAPPED = re.compile(r"\*\*([^*]+)\*\*|\$+([^$]+)\$+|\\\((.+)\\\)|\\\[(.+)\\\]", re.DOTALL)
# The value of a piece of an answer: a Fraction if it is plain, that is, a number written out (12, -3.5, 3/4);
# an int modulo PRIME for any other formula; a list for a set; a str for all that cannot be calculated with.
Value = Fraction | int | list | str


def final_answer(trace: str, truncated: bool) -> str | None:
    r"""A trace's last `<answer>`, or else `\boxed{…}`, or else `#### …` line; None if none is complete."""
    answer = parse(trace).answer
    if answer is not None:
        found = "" if truncated and not answer.closed else boxed(answer.text + "\n") or answer.text
    else:
        trace += "" if truncated else "\n"              # a line cut off might have continued
        found = boxed(trace) or (HASHES.findall(trace) or [""])[-1]
    wrapped = WRAPPED.fullmatch(found.strip())
    return (wrapped[wrapped.lastindex] if wrapped else found).strip() or None


def boxed(text: str) -> str:
    r"""What the last `\boxed{…}` (or `\boxed 3`, to the line's end) holds; "" if there is none. One pass."""
    found, starts = "", []                              # per open brace: its box's start, or None if no box
    for match in BOXES.finditer(text):
        if match["bare"]:
            found = match["bare"]
        elif match["box"] or match[0] == "{":
            starts.append(match.end() if match["box"] else None)
        elif match[0] == "}" and starts and (start := starts.pop()) is not None:
            found = text[start:match.start()]
    return found


def equal(answer: str | None, truth: str) -> bool:
    """Whether two answers are the same one, where `5` may stand for `x = 5` and `52` for `52_8`."""
    if answer is None:
        return False
    left, right = canonical(answer), canonical(truth)
    return left == right or any(canonical(answer, bare) == canonical(truth, bare) in (left, right)
                                for bare in (1, 2))


def canonical(answer: str, bare: int = 0) -> str:
    """The same string for equal answers. `bare` 1 and 2 drop `x =`, 2 also drops a number's base."""
    text = (boxed(answer + "\n") or answer).strip()
    if len(text) > LENGTH:
        return text
    for _ in range(3):                                  # a \text may contain another
        for pattern, replacement in CLEANING:
            text = pattern.sub(replacement, " ".join(text.split()))
    tokens, at, depth = [], 0, 0
    while match := not depth and THOUSANDS.match(text, at) or TOKEN.match(text, at):  # but (1,234) is a point
        token, at = match[1].replace(",", "") or ",", match.end()
        token = SPELLINGS.get(token, token.lower() if token.isalpha() and len(token) > 2 else token)
        depth += (token in ("(", "[", r"\{")) - (token in (")", "]", r"\}"))
        tokens += [token] if len(token) > 2 or not token.isalpha() else token   # ab is a times b, abc a word
    values = []
    try:
        for sign in "+-":                               # both readings of ±; the second adds only new values
            items = Reader([sign if token == r"\pm" else token for token in tokens], bare).items("")
            if not items:
                raise ValueError("empty")
            items = items[0] if len(items) == 1 and isinstance(items[0], list) else items
            values += [value for value in items if value not in values]
        return show(values)
    except (ValueError, ZeroDivisionError):             # not in the subset, or too deep: compared as text
        return " ".join(tokens)


def show(value: Value) -> str:
    if isinstance(value, list):
        return show(value[0]) if len(value) == 1 else "{" + ", ".join(sorted(map(show, value))) + "}"
    return value if isinstance(value, str) else f"#{residue(value)}"


def residue(value: Value) -> int:
    if isinstance(value, int):
        return value
    if not isinstance(value, Fraction) or 2 * max(abs(value.numerator), value.denominator) ** 2 > PRIME:
        raise ValueError("no number, or too long: only below this bound, no two have the same residue")
    return value.numerator * pow(value.denominator, -1, PRIME) % PRIME


def letter(name: str) -> int:
    return int(sha256(name.encode()).hexdigest(), 16) ** 2 % PRIME    # a square, so that the root of x^2 is x


def calculate(left: Value, operator: str, right: Value) -> Value:
    if operator == r"\cup":
        return r" \cup ".join(sorted([*show(left).split(r" \cup "), show(right)]))
    a, b, plain = residue(left), residue(right), isinstance(left, Fraction) and isinstance(right, Fraction)
    if operator == "^":
        return left if right == 1 else power(a, right)
    if operator == "/":
        return left / right if plain else a * pow(b, -1, PRIME) % PRIME
    if plain:
        raise ValueError("unfinished")
    return (a * b if operator == "*" else a + b if operator == "+" else a - b) % PRIME


def power(base: int, exponent: Fraction | int) -> int:
    """The root of a square is the one that is itself a square. Any other number is minus a square: odd roots
    keep the sign, even ones get a letter for the root of -1."""
    if isinstance(exponent, int):
        return letter(f"{base}^{exponent}")             # 2^n: identified by its parts alone
    root, squares = exponent.denominator, (PRIME - 1) // 2
    inverse = pow(root, -1, squares)
    if pow(base, squares, PRIME) < 2:                   # 1: a square; 0: zero itself
        base = pow(base, inverse, PRIME)
    else:
        unit = -1 if root % 2 else letter("i" if root == 2 else f"root {root} of -1")
        base = unit * pow(-base, inverse, PRIME)
    return pow(base, exponent.numerator, PRIME)


class Reader:
    """Recursive descent. Each method reads from token `at` onwards and returns a value."""

    def __init__(self, tokens: list[str], bare: int):
        self.tokens, self.bare, self.at, self.depth = tokens, bare, 0, 0

    @property
    def next(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self, expected: str = "") -> str:
        token, self.at = self.next, self.at + 1
        if not token or expected not in ("", token):
            raise ValueError(f"{token!r} instead of {expected!r}")
        return token

    def met(self, token: str) -> bool:
        return self.next == token and bool(self.take())

    def items(self, *closing: str) -> list[Value]:
        """Expressions or relations (=, <, …), separated by commas, up to a closing bracket or the end."""
        values = []
        while self.next not in closing:
            begin, value = self.at, self.expression()
            while self.next in RELATIONS:
                name, sign, right = "".join(self.tokens[begin:self.at]), self.take(), self.expression()
                named = sign in ("=", r"\in") and SYMBOL.fullmatch(name)
                value = right if named and self.bare else f"{show(value)} {sign} {show(right)}"
            values.append(value)
            if self.next not in closing:
                self.take(",")
            while self.met(","):                        # 2, 3, and 4
                pass
        return values

    def expression(self, loosest: int = 1, until: set[str] = frozenset()) -> Value:
        """Operands with operators that bind at least as tightly as `loosest`, by precedence climbing."""
        minus = False
        while self.next in ("+", "-"):
            minus ^= self.take() == "-"
        value = self.expression(max(loosest, BINDING["*"])) if minus else self.operand()
        if minus:
            value = -value if isinstance(value, Fraction) else -residue(value) % PRIME
        while True:
            if self.next in until:
                return value
            factor = self.next in FACTORS or len(self.next) == 1 and self.next.isalpha()
            operator = "*" if factor else self.next
            if BINDING.get(operator, 0) < loosest:
                return value
            if not factor:
                self.take()
            right = self.argument() if operator == "^" else self.expression(BINDING[operator] + 1)
            value = calculate(value, operator, right)

    def argument(self, digit: bool = False) -> Value:
        r"""A group or a single token; with `digit`, only a number's first digit, since \frac43 is 4/3."""
        if self.next == "-":
            return self.expression(BINDING["^"] + 1)
        if not self.next[-1:].isdecimal():
            return self.operand()
        if digit and len(self.next) > 1:
            self.tokens[self.at:self.at + 1] = self.next[0], self.next[1:]
        return Fraction(self.take())

    def subscripted(self, name: str) -> str:
        return f"{name}_{show(self.argument())}" if self.met("_") else name

    def operand(self) -> Value:
        """A number, a letter, a word, a function, or anything in brackets."""
        self.depth += 1
        token = self.take()
        if self.depth > DEPTH:
            raise ValueError("too deep")
        if token[-1].isdecimal():
            name = self.subscripted(token)
            value = Fraction(token) if name == token or self.bare == 2 else letter(name)
            if name.isdecimal() and self.next == r"\frac":  # 1\frac{4}{5} is 9/5, but 2\frac{x}{3} a product
                fraction = self.operand()
                value = (value + fraction if isinstance(fraction, Fraction) else
                         calculate(value, "*", fraction))
        elif token in NAMES or len(token) == 1 and token.isalpha():
            value = letter(self.subscripted(token))
        elif token.isalpha():
            value = token
        elif token == r"\frac":
            value = calculate(self.argument(digit=True), "/", self.argument(digit=True))
        elif token == r"\sqrt":
            root = Fraction(2)
            if self.met("["):
                root = self.expression()
                self.take("]")
            value = calculate(self.argument(), "^", calculate(Fraction(1), "/", root))
        elif token in FUNCTIONS:
            name = self.subscripted(token)
            exponent = self.argument() if self.met("^") else Fraction(1)
            inside = self.operand() if self.next == "(" else self.expression(BINDING["*"], FUNCTIONS)
            value = calculate(letter(f"{name}({show(inside)})"), "^", exponent)
        elif token in ("(", "[", "{", r"\{"):
            items = self.items(")", "]", "}", r"\}")
            kind = token[-1] + self.take()[-1]
            if kind == "{}" or kind == "()" and len(items) == 1:
                value = items[0] if len(items) == 1 else items
            elif items and kind in ("()", "[]", "(]", "[)"):
                value = kind[0] + ", ".join(map(show, items)) + kind[1]
            else:
                raise ValueError(f"no kind of brackets: {kind}")
        else:
            raise ValueError(f"no operand: {token}")
        self.depth -= 1
        return value
