r"""Final answers: extract one from a trace, decide whether two are equal. Nothing is ever run.

A small parser computes what the LaTeX of a short answer says, at three points: at each of them, a
letter has another random, fixed value. Two answers are equal if they are at all points. Fractions
are exact; roots, pi and functions are floats that agree to twelve digits. What cannot be read, or
leaves the range of floats, is compared as text.

Conventions: percent signs, currencies, degrees and common units are dropped; lists, sets and unions
are one thing, without order or repetition; `5` may stand for `x = 5`, and `52` for `52_8`, but
`y = 5` differs from `x = 5`; a rounded number differs from the exact one. `(x+1)^2` is `x^2+2x+1`,
but a sum or product of plain numbers is unfinished and equals no number: otherwise the problem
`7*8 + 6*9` would be its own answer.

Simplified: letters are positive, so the root of x^2 is x; odd roots of negative numbers are real;
three letters in a row are a word, as two capitals are; equations are not rearranged.
"""
import cmath
import math
import operator
import re
from dataclasses import dataclass
from fractions import Fraction
from random import Random
from unicodedata import normalize

from sd.steps import Trace

LENGTH, POINTS, BITS = 400, 3, 4096     # longest text that is read; size of the largest exact power
TOLERANCE = 1e-12                       # between equal floats, relative

# A brace, perhaps of a box, perhaps escaped; or all of `\boxed 3`.
BRACES = (r"(?P<open>(?P<box>\\(?:boxed|fbox|framebox)\s*)?\{)|\\[{}\\]|\}"
          r"|\\boxed\s+(?P<bare>-?\d+(?:[.,/]\d+)*)(?=[.,]?[\s$])")
BETWEEN = r"\$?,? ?(?:[,;]|and|or) ?\$?(?:\w ?= ?)?"    # between boxes that are one answer
MENTION = r"[\s.…]*|\\l?dots"           # in a box that is only mentioned
HASHES = r"####([^#\n]*)\n"             # the last line of an answer in GSM8K
# **bold**, or a formula between $…$, \(…\), \[…\].
WRAPPED = r"(?s)\A(?:\*\*([^*]+)\*\*|\$+([^$]+)\$+|\\\((.+)\\\)|\\\[(.+)\\\])\Z"

FUNCTIONS = {name: getattr(cmath, name.replace("arc", "a"))
             for name in "sin cos tan arcsin arccos arctan".split()}
FUNCTIONS |= {"ln": cmath.log, "log": cmath.log10, "sec": lambda x: 1 / cmath.cos(x),
              "csc": lambda x: 1 / cmath.sin(x), "cot": lambda x: 1 / cmath.tan(x)}
CONSTANTS = {"pi": complex(math.pi), "e": complex(math.e), "i": 1j}
# Each row is the usual spelling, also with a backslash, and others.
SPELLINGS = {}
for row in r"""
* \cdot \times × ⋅ | / \div ÷ ⁄ | - − – | , ; and or \cup ∪ | = \approx ≈ | ± \pm | ^ ** | { | }
<= \le \leq ≤ | >= \ge \geq ≥ | != \ne \neq ≠ | \in ∈ | ⌊ \lfloor | ⌋ \rfloor | ⌈ \lceil | ⌉ \rceil
frac \dfrac \tfrac \cfrac | binom \dbinom \tbinom | emptyset \varnothing | infty inf ∞ | pi π
theta θ | sin | cos | tan | cot | sec | csc | arcsin asin | arccos acos | arctan atan | ln | log
alpha | beta | gamma | delta | lambda | mu | phi | psi | rho | sigma | tau | omega
""".strip().replace("\n", "|").split("|"):
    usual, *others = row.split()
    SPELLINGS |= dict.fromkeys([rf"\{usual}", *others], usual)
KNOWN = f"(?:{'|'.join(filter(str.isalpha, [*SPELLINGS, *SPELLINGS.values()]))})(?![A-Za-z])"
# A number, a command, a word or several, a letter with an index, any other character.
TOKEN = (r"(?a)(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d{1,3}(?![\d.]))?|\\[A-Za-z]+|\\[{}]|\*\*|[<>:]="
         rf"|{KNOWN}|[A-Za-z]{{3,}}(?: (?!{KNOWN})[A-Za-z]+)*|[A-Z]{{2}}|[Nn]o(?![A-Za-z])"
         r"|[A-Za-z]_(?:\d+|[A-Za-z])|\S")

TEXT = r"\\(?:text[a-z]*|mbox|mathrm|operatorname) ?\{"
UNIT = """cm mm km m kg mg g mL ml L hr h min sec s mph USD ft in yd mi oz lb inche inch foot feet
yard mile meter metre centimeter kilometer gram kilogram liter ounce pound gallon acre second minute
hour day week month year cent dollar euro degree radian unit"""
UNIT = rf"(?:(?:square|cubic|sq\.?) ?)?(?:{'|'.join(UNIT.split())})s?\.?"
UNIT += rf"(?: ?(?:/|per) ?{UNIT})?"
# What makes no difference is removed or unified first, in this order.
CLEANING = {
    r"(?:\{,\}|, ?\\!) ?(?=\d{3})": "",                         # 1{,}000 and 1,\!000
    # a matrix becomes [[1, 2], [3, 4]]
    r"\\begin\{\w+\}(?:\{\w*\})?": "[[", r"(?:\\\\ ?)?\\end\{\w+\}": "]]", r"\\\\": "],[", "&": ",",
    # degrees, spacing, percent signs, currencies
    r"\^ ?(?:\{ ?\\circ ?\}|\\circ)|\\q?quad(?![A-Za-z])|\\[,;:!>()\[\] ]|~|\\?[$%]|[°€£]": " ",
    # units, in \text or of at least two letters, perhaps squared
    rf"(?<=[\w)\]}}]) *(?:{TEXT} ?{UNIT} ?\}}|(?<=\d )(?=\w\w){UNIT}(?!\w))"
    r"(?: ?\^ ?(?:[23]|\{[23]\}))?(?! ?\d)": "",
    # \text itself, fonts, and sizes of brackets
    TEXT + r"([^{}]*)\}": r" \1 ",
    r"\\(?:left|right|[bB]igg?[lr]?|(?:math|text|display)\w*|phantom|\w*box(?:ed)?)\b": "",
    r"(\d) (\d+) ?[/⁄] ?(\d+)": r"\1&\\frac{\2}{\3}",           # 2 1/4
    r"(?<![\w.^_}])(\d+) ?(?=\\[dtc]?frac ?(?:\d|\{\d+\}) ?(?:\d|\{\d+\}))": r"\1&",
    r"(?<=\d) (?=\d{3}(?!\d))": "",                             # 15 000
    # 1,000, but not in brackets, where it is two numbers
    r"(?<=\d)(?<!\d{4})(?<!\b0),(?=\d{3}(?!\d|[^(\[]*(?:[)\]]|\\\})))": "",
    r"(?:\\?sqrt|√) ?\[([^]]+)\]": r" root {\1}", r"\\?sqrt(?![a-z])|√": " root 2 ",
    r"\\(sin|cos|tan) ?\^ ?(?:-1|\{ ?-1 ?\})": r"\\arc\1", r"\\?exp(?![a-z])": "e^",
    r"(frac|binom|log_) ?(\d)": r"\1 \2 ",                      # \frac43, \log_25
    r"_ ?\{ ?(\w+) ?\}": r"_\1 ", r"\\\{ ?\\\}": r"\\emptyset",
    r"(?:^\w ?= ?)?(?<![A-Za-z\d])(\d+) ?_ ?(\w+)": r"b_\2 := \1",      # 52_8
    r"^(?:=|\\approx|≈)|[.,;: ]+$": "",
} | {rf"(?<=\d) ?{word}(?![a-z])": f"e{zeros}" for word, zeros in
     dict(hundred=2, thousand=3, million=6, billion=9, trillion=12).items()}
GLYPHS = {"²": "^2", "³": "^3"} | {c: f" {normalize('NFKC', c)}" for c in "¼½¾⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"}
# Between tokens: x = 5 or f(x) = 5, and 3 <= x < 7.
NAME = r"([A-Za-z][\w-]*|\w \( \w \)|\( \w(?: , \w)+ \))"
NAMED = rf"(?:^|(?<=, )){NAME} (?:=|\\in) "
CHAIN = rf"(?:^|(?<=, ))(?=[^,]*[<>])(?:([^<>,]+) ([<>]=?) )?{NAME}(?: ([<>]=?) ([^<>,]+))?(?= ,|$)"

# How tightly operators bind; · is a * that is omitted, & joins the parts of 1\frac{4}{5}.
RELATIONS = dict.fromkeys(r"= := != < <= > >= \in :".split(), 0)
BINDING = RELATIONS | {"+": 1, "-": 1, "*": 2, "/": 2, "·": 3, "^": 4, "!": 5, "&": 5}
# The value of an answer, or of a part, at a point: a list is a set; a tuple is anything else that
# has parts, such as ("[)", 3, 7) and (":=", x, 5).
NUMBER = Fraction | complex
Value = NUMBER | list | tuple


class Plain(Fraction):
    """A number that is written out: 12, -3.5, 3/4. Results of calculations are other Fractions."""


def final_answer(trace: Trace, truncated: bool) -> str | None:
    r"""The last `<answer>`, or else the last `\boxed{…}`, or else the last `#### …`; or None.

    An `<answer>` that is not closed comes last, and counts only if the trace had ended.
    """
    answer, text = trace.answer, trace.text
    if answer and answer.closed:
        found = boxed(answer.text + "\n") or answer.text
    else:
        unclosed = answer.text if answer and not truncated else ""
        text += "" if truncated else "\n"       # a truncated trace's last line might have gone on
        found = boxed(text) or [unclosed, *re.findall(HASHES, text)][-1]
    return re.sub(WRAPPED, r"\1\2\3\4", found.strip()).strip() or None


def boxed(text: str) -> str:
    r"""What the last box holds; all of several, \boxed{2} and \boxed{3}; "" if there is none."""
    found, begin, end, open_braces = "", 0, 0, []
    for match in re.finditer(BRACES, text):
        brace, content = match, match["bare"] or ""
        if match["open"]:
            open_braces.append(match)
        elif match[0] == "}" and open_braces:
            brace = open_braces.pop()
            content = text[brace.end():match.start()] if brace["box"] else ""
        if re.fullmatch(MENTION, content):
            continue
        if found and re.fullmatch(BETWEEN, text[end:brace.start()]):
            found = text[begin:match.end()]
        else:
            found, begin = content, brace.start()
        end = match.end()
    return found


def equal(answer: str | None, truth: str) -> bool:
    """Whether two answers are the same one, where `5` may stand for `x = 5` and `52` for `52_8`."""
    if answer is None:
        return False
    if answer.isdecimal() and truth.isdecimal() and len(answer + truth) < LENGTH:
        return int(answer) == int(truth)        # soon, as most answers are
    texts = clean(answer), clean(truth)
    if texts[0] == texts[1]:
        return True
    try:
        return all(same(*(read(text, point) for text in texts)) for point in range(POINTS))
    except (ValueError, TypeError, LookupError, ArithmeticError, RecursionError):
        return False            # one is unreadable, unfinished, or beyond the range of floats


def clean(answer: str) -> str:
    """The tokens of an answer in the usual spelling, with spaces between them."""
    text = " ".join(answer.split())
    if len(text) > LENGTH:
        return text
    text = (boxed(text + "\n") or text).translate(str.maketrans(GLYPHS))
    for pattern, replacement in CLEANING.items():
        text = " ".join(re.sub(pattern, replacement, text).split())
    tokens = [SPELLINGS.get(token, token) for token in re.findall(TOKEN, text)]
    text = " ".join(token.lower().replace(" ", "-") if re.match("[A-Za-z]{2}", token) else token
                    for token in tokens).replace(", ,", ",")
    return re.sub(CHAIN, interval, re.sub(NAMED, r"\1 := ", text))


def interval(match: re.Match) -> str:
    r"""3 <= x < 7 is x in [3, 7), x < 7 is x in (-\infty, 7), also from right to left."""
    low, left, name, right, high = match.groups("")
    if ">" in left + right:
        low, left, right, high = high, right, left, low
    opening, closing = "[" if "=" in left else "(", "]" if "=" in right else ")"
    return f"{name} := {opening} {low or '- infty'} , {high or 'infty'} {closing}"


def statements(value: Value, name: Value | None = None) -> list[tuple]:
    """What a set says, as pairs of a name, perhaps None, and a value."""
    if isinstance(value, list):
        return [statement for member in value for statement in statements(member, name)]
    if isinstance(value, tuple) and value[0] == ":=":
        return statements(value[2], value[1])
    return [(name, value)]


def same(a: Value | str | None, b: Value | str | None) -> bool:
    """Lists have no order, tuples have one; a name that is None may be any."""
    if isinstance(a, list) and isinstance(b, list):
        pairs = [[same(x, y) for y in b] for x in a]
        return all(map(any, pairs)) and all(map(any, zip(*pairs)))
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    numbers = isinstance(a, NUMBER) and isinstance(b, NUMBER) and a and b
    if numbers and complex in (type(a), type(b)):
        return cmath.isclose(a, b, rel_tol=TOLERANCE)
    return a == b or None in (a, b)


def read(text: str, point: int) -> list[tuple]:
    """The statements of a text, which stands in braces here."""
    found = []
    for sign in "+-" if "±" in text else "+":
        parser = Parser(["}", *reversed(text.replace("±", sign).split())], point)
        found += statements(parser.bracketed("{"))
        if parser.tokens:
            raise ValueError("a bracket was not open")
    return found


def calculate(left: Value, sign: str, right: Value) -> Value:
    plain = isinstance(left, Plain) and isinstance(right, Plain)
    if sign in RELATIONS:
        return sign, left, right
    if plain and sign in "/&":
        return Plain(left / right if sign == "/" else left + right)
    if plain and sign != "^":
        raise ValueError("a sum or product of plain numbers is unfinished")
    result = OPERATORS[sign](left, right)
    if isinstance(result, complex):
        if not cmath.isfinite(result) or not result and left and right and sign not in "+-":
            raise ArithmeticError("beyond the range of floats")
    return result


def power(base: NUMBER, exponent: NUMBER) -> NUMBER:
    """Exact for fractions with whole exponents, unless it is huge; odd roots keep the sign."""
    root = exponent.denominator if isinstance(exponent, Fraction) else 0
    if exponent == 1:
        return base
    if root == 1 and isinstance(base, Fraction):
        if abs(exponent) * max(map(int.bit_length, base.as_integer_ratio())) < BITS:
            return Fraction(base) ** exponent.numerator
    base = complex(base) + 0j                   # not -0.0, where roots jump
    if root % 2 and base.real < 0 == base.imag:
        return (-1) ** exponent.numerator * (-base) ** complex(exponent)
    return base ** complex(exponent)


def binomial(n: Value, k: Value) -> Value:
    k = range(LENGTH).index(k)                  # ValueError unless it is whole, and small enough
    return math.prod((n - i) / Fraction(i + 1) for i in range(k))


OPERATORS = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "·": operator.mul,
    "/": operator.truediv,
    "^": power,
    "!": lambda n, _: complex(math.gamma(n + 1)),
}
PREFIXES = {"frac": lambda a, b: calculate(a, "/", b), "binom": binomial,
            "root": lambda n, x: calculate(x, "^", 1 / n)}


@dataclass
class Parser:
    """Precedence climbing: each method takes what it reads from the end of `tokens`."""
    tokens: list[str]           # backwards
    point: int

    def take(self, *wanted: str) -> str:
        """The next token if it is one of these, or else ""."""
        return self.tokens.pop() if self.tokens[-1] in wanted else ""

    def expression(self, loosest: int = 0) -> Value:
        """Operands with operators that bind as tightly as `loosest` or more."""
        sign = self.take("+", "-")
        value = self.expression(max(loosest, BINDING["*"])) if sign else self.operand()
        if sign == "-":
            value = type(value)(-value)         # a plain number stays one
        while True:
            sign = self.tokens[-1]
            if sign[:1].isalpha() or sign in ["(", "{", "⌊", "⌈"]:
                sign = "*" if sign in FUNCTIONS else "·"        # \sin x stops before \cos x
            if BINDING.get(sign, -1) < loosest:
                return value
            self.take(sign)
            tighter = 4 if sign in "*/" else BINDING[sign] + 1          # 1/2x is x/2
            value = calculate(value, sign, None if sign == "!" else self.expression(tighter))

    def operand(self) -> Value:
        """A number, a letter, a word, a function, or anything in brackets."""
        token = self.tokens.pop()
        if token in PREFIXES:
            return PREFIXES[token](self.operand(), self.operand())
        if token in FUNCTIONS:
            return self.function(FUNCTIONS[token])
        if token[:1].isalpha():
            return CONSTANTS.get(token) or self.letter(token)
        if token[-1:].isdecimal():
            return Plain(token)
        return self.bracketed(token)

    def function(self, function) -> Value:
        r"""\sin x, \sin^2 (x), \log_2 x."""
        scale = function(self.operand()) if self.take("_") else 1
        exponent = self.operand() if self.take("^") else Plain(1)
        bracket = self.tokens[-1] in ("(", "{")
        inside = self.operand() if bracket else self.expression(BINDING["·"])
        return calculate(function(inside) / scale, "^", exponent)

    def bracketed(self, opening: str) -> Value:
        """A group, a set, a point, an interval, a row of a matrix, or something rounded."""
        values = [self.expression()]
        while self.take(","):
            values.append(self.expression())
        kind = opening + self.tokens.pop()
        if kind in ("⌊⌋", "⌈⌉"):
            return self.letter(f"{kind} {complex(values[0]):.9g}")
        if len(values) == 1 and kind in ("()", "{}"):
            return values[0]
        if kind not in "() [] (] [) {}".split():
            raise ValueError("no such brackets")
        return values if kind == "{}" else (kind, *values)

    def letter(self, name: str) -> Fraction:
        """A random number between 0.5 and 1.5, fixed for a name."""
        return Fraction(Random(f"{name} {self.point}").randrange(500_000, 1_500_000), 1_000_000)
