"""The corpus that the embedded solver learns from: its tokenizer, and one example after another.

The solver plays the part of the paper's pretrained language model: it must solve some problems
alone and be able to use a context that it is shown. An example without a context has the solver's
own mistakes on the hard pairs (`times_table.belief`); the others show a reference solution or a
critique. A chat model gets the same in words, in the prompts of its family, and plays the critic
too (`scribe`): shown a trace with slips and the ground truth, it writes the critique. Four things
make the corpus what the method needs:
- The values in a context are arbitrary for hard pairs and for a third of the easy ones, so that
  only copying the context is right.
- Half of the traces with a context have slips (wrong values or misread factors, which are not
  targets) and go on consistently. A self-teacher is asked about the student's own prefix, errors
  included, and must stay sane.
- A quarter of the traces under a reference follow its order, as a language model that has just read
  one does. The others keep the solver's own order, since a teacher must be able to use a reference
  whose path the trace does not follow.
- Every step is worded anew, by preferences of the solver's own, and leans towards the wording that
  it has just read: a little under a reference, nearly always under a critique. A chat model has one
  wording, so that few examples teach it.
"""
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from random import Random

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

from sd import scribe
from sd.llm.checkpoint import write_atomic
from sd.llm.tokenizer import Tokenizer
from sd.problems import Problem
from sd.prompts import student_prompt, teacher_prompt
from sd.rollouts import Rollout
from sd.steps import parse, render, token_span
from sd.task import times_table as tt

SLIP_TRACES = {"ref": 0.5, "critique": 0.5, "scribe": 1}       # share of traces with slips
SLIP_PRODUCTS = {"ref": 0.4, "critique": 0.4, "scribe": 0.7}    # of their products
MISREAD = 0.3       # share of these that misread a factor, so that the value is true of it
FOLLOW = 0.25       # share of traces under a reference that follow its order
OPERATORS = {"*": 0.7, " times ": 0.2, " multiplied by ": 0.1}
EQUALS = {"=": 0.65, " is ": 0.15, " makes ": 0.1, " gives ": 0.1}
SWAP = 0.2          # share of products with their factors in the other order
LEAN = {"ref": 0.35, "critique": 0.9, "scribe": 1}      # of steps that are worded as the context
FEW = [(a, b) for a, b in tt.PAIRS if 3 <= a and b <= 9]        # a chat model's: 16 of 28 are hard
STEPS = 16          # step numbers with a tag
SPECIAL = ["<eos>", "<unk>", "<problem>", "<reference>", "<critique>", "<solution>"]


def build_tokenizer(path: Path) -> Tokenizer:
    """A fixed list of pieces, matched longest first; all else is unknown. Digits are single tokens,
    so that addition is learned as an algorithm; one tag token closes a step and opens the next."""
    numbers = range(1, STEPS + 1)
    tags = [f"<step_{k}> " for k in numbers] + ["<answer> ", " </answer>"]
    for k in numbers:
        tags += [f" </step_{k}>\n<step_{k + 1}> ", f" </step_{k}>\n<answer> ", f" </step_{k}>"]
    words = " times | multiplied by | plus | is | makes | gives |first |, then |, so |correct"
    pieces = tags + words.split("|") + [" + ", "*", "+", "=", " ", "\n", *"0123456789"]
    longest_first = "|".join(sorted(pieces, key=len, reverse=True))
    pattern = longest_first.replace("*", r"\*").replace("+", r"\+") + "|."
    ids = {piece: i for i, piece in enumerate(SPECIAL + pieces)}
    fast = FastTokenizer(models.WordLevel(ids, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    fast.decoder = decoders.Fuse()
    fast.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    write_atomic(path, fast.to_str())
    return Tokenizer(path)


def random_pairs(rng: Random, products: int, words: bool = False) -> list[tt.Pair]:
    """Different products, in words those of few facts."""
    facts = FEW if words else tt.PAIRS
    return [rng.choice([(a, b), (b, a)]) for a, b in rng.sample(facts, products)]


def steps_of(order: list[tt.Pair], value: Callable) -> list[tt.Equation]:
    return tt.derive(tt.State(list(order)), False, tt.SYMBOLS, value)


def reworded(equation: tt.Equation, rng: Random, words: bool) -> tt.Equation:
    """The same step in words of the solver's own choice; a chat model's are always the same."""
    if equation.product and rng.random() < SWAP:
        equation = replace(equation, left=equation.right, right=equation.left)
    notation = tt.WORDS if words else (pick(OPERATORS, rng), pick(EQUALS, rng))
    return replace(equation, notation=notation)


def pick(shares: dict[str, float], rng: Random) -> str:
    return rng.choices(list(shares), list(shares.values()))[0]


def trace(equations: list[tt.Equation]) -> str:
    return render(list(map(str, equations)), str(equations[-1].value))


def example(kind: str | None, products: int, rng: Random,
            tokenizer: Tokenizer) -> tuple[list[int], list[int], list[bool]]:
    """One training example: the prompt's ids, the completion's with its end, which are targets.

    `kind` is the context: None, "ref" or "critique"; or "scribe", for a chat model as the critic.
    """
    words = tokenizer.chat_model
    pairs = random_pairs(rng, products, words)
    problem = tt.write_problem(pairs, words)
    if kind is None:
        equations = [reworded(e, rng, words) for e in steps_of(pairs, partial(tt.belief, rng=rng))]
        ids = tokenizer.encode(trace(equations)) + [tokenizer.eos[0]]
        return student_prompt(tokenizer, problem), ids, [True] * len(ids)

    shown = {pair: shown_value(pair, rng) for pair in pairs}
    if kind == "ref":
        order, models, context = shown_reference(pairs, shown, rng)
    else:
        order, models, context = shown_critique(pairs, shown, rng, words)
    read, values, masked = slip(order, shown, kind, rng)
    equations = []
    for equation, model in zip(steps_of(read, values.get), models):
        if rng.random() >= LEAN[kind]:
            equation = reworded(equation, rng, words)
        else:
            if equation.operands == model.operands[::-1]:
                equation = replace(equation, left=model.left, right=model.right)
            equation = replace(equation, notation=model.notation)
        equations.append(equation)
    written = trace(equations)
    if kind == "scribe":
        solution = tt.reference_text(tt.author_order(pairs, rng), shown.get)
        told = Problem("", problem, str(models[-1].value), solution)
        rollout = Rollout(told, [], [], None, False, parse(written), None, 0.0)
        ids = tokenizer.encode(context) + [tokenizer.eos[0]]
        return tokenizer.chat(scribe.prompt(rollout)), ids, [True] * len(ids)
    ids = tokenizer.encode(written) + [tokenizer.eos[0]]
    hidden = masked_tokens(equations, masked, tokenizer.pieces(ids))
    prompt = teacher_prompt(tokenizer, problem, kind, context)
    return prompt, ids, [i not in hidden for i in range(len(ids))]


def shown_reference(pairs: list[tt.Pair], shown: dict,
                    rng: Random) -> tuple[list[tt.Pair], list[tt.Equation], str]:
    """The order of the trace, the steps whose wording it may take, and the reference's text."""
    author = tt.author_order(pairs, rng, same=0.25)
    order = author if rng.random() < FOLLOW else pairs
    models = [replace(e, notation=tt.PROSE) for e in steps_of(order, shown.get)]
    return order, models, tt.reference_text(author, shown.get)


def shown_critique(pairs: list[tt.Pair], shown: dict, rng: Random,
                   words: bool) -> tuple[list[tt.Pair], list[tt.Equation], str]:
    """As `shown_reference`: the solver's steps up to a random one, then steps of one wording."""
    equations = steps_of(pairs, shown.get)
    models = [reworded(e, rng, words) for e in equations]
    begin = rng.randrange(len(models))              # from here on the critic writes by itself
    rest = [replace(e, notation=models[begin].notation) for e in equations]
    models[begin + 1:] = rest[begin + 1:]
    return pairs, models, trace(models)


def shown_value(pair: tt.Pair, rng: Random) -> int:
    """What a context says of a product."""
    if tt.key(pair) in tt.HARD or rng.random() < 1 / 3:
        return rng.randint(4, 144)
    return prod(pair)


def slip(order: list[tt.Pair], shown: dict, kind: str,
         rng: Random) -> tuple[list[tt.Pair], dict, dict]:
    """What the trace makes of the products shown: the pairs as read, the value of each, and for
    each slip, by its fact, whether its factors and whether its value are no targets."""
    share = SLIP_PRODUCTS[kind] if rng.random() < SLIP_TRACES[kind] else 0
    read, values, masked = [], dict(shown), {}
    for pair in order:
        if rng.random() < share:
            if rng.random() < MISREAD:
                pair = (rng.randint(tt.LOW, tt.HIGH), pair[1])
                values[pair] = prod(pair)           # true of what was read
                masked[tt.key(pair)] = (True, tt.key(pair) in tt.HARD)
            else:
                values[pair] = rng.choice(tt.usual_mistakes(pair))
                masked[tt.key(pair)] = (False, True)
        read.append(pair)
    return read, values, masked


def masked_tokens(equations: list[tt.Equation], masked: dict, pieces: list[str]) -> set[int]:
    """Which tokens of a trace, cut into `pieces`, are no targets: factors and values that slipped.

        <step_1> 7*8=56 </step_1>⏎<step_2> …    the factors end before the equals sign
    """
    hidden, end = set(), 0
    text = "".join(pieces)
    for equation in equations:
        begin = text.index(str(equation), end)
        end = begin + len(str(equation))
        hide_factors, hide_value = masked.get(tt.key(equation.operands), (False, False))
        value = end - len(str(equation.value))
        if equation.product and hide_factors:
            hidden.update(range(*token_span(pieces, begin, value - len(equation.notation[1]))))
        if equation.product and hide_value:
            hidden.update(range(*token_span(pieces, value, end)))
    return hidden
