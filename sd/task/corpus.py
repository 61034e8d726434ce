"""The corpus that the embedded solver learns from: its tokenizer, and one example after another.

The solver plays the part of the paper's pretrained language model: it must solve some problems
alone and be able to use a context that it is shown. An example without a context has the solver's
own mistakes on the hard pairs (`times_table.belief`); the others show a reference solution or a
critique. Three things make these contexts worth reading:
- Their values are arbitrary for hard pairs and for a third of the easy ones, so that only copying
  the context is right.
- 40 % of the traces have slips (wrong values or misread factors, which are not targets) and go on
  consistently. A self-teacher is asked about the student's own prefix, errors included, and must
  stay sane.
- A third of the traces under a reference follow it, in its order and in words, as a language model
  that has just read one does. The others keep the solver's own order and notation, since a teacher
  must be able to use a reference whose path the trace does not follow.
"""
from collections.abc import Callable
from functools import partial
from math import prod
from pathlib import Path
from random import Random

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

from sd.llm.checkpoint import write_atomic
from sd.llm.tokenizer import Tokenizer
from sd.prompts import student_prompt, teacher_prompt
from sd.steps import render
from sd.task import times_table as tt

WORDS = 0.2         # share of the solver's traces that are in words and interleaved
SLIP = 0.4          # share of context examples with wrong products in the trace
MISREAD = 0.3       # share of these products that misread a factor, so that the value is true of it
FOLLOW = 1 / 3      # share of traces under a reference that follow its order, in words
STEPS = 12          # step numbers with a tag
CONTROL = ["<eos>", "<unk>", "<problem>", "<reference>", "<critique>", "<solution>"]


def build_tokenizer(path: Path) -> Tokenizer:
    """A fixed list of pieces, matched longest first; all else is unknown. Digits are single tokens,
    so that addition is learned as an algorithm; one tag token closes a step and opens the next."""
    numbers = range(1, STEPS + 1)
    tags = [f"<step_{k}> " for k in numbers] + ["<answer> ", " </answer>"]
    for k in numbers:
        tags += [f" </step_{k}>\n<step_{k + 1}> ", f" </step_{k}>\n<answer> ", f" </step_{k}>"]
    words = " times | is | plus | gives |first |, then | multiplied by | makes |, so |correct"
    pieces = tags + words.split("|") + [" + ", "*", "+", "=", " ", "\n", *"0123456789"]
    longest_first = "|".join(sorted(pieces, key=len, reverse=True))
    pattern = longest_first.replace("*", r"\*").replace("+", r"\+") + "|."
    ids = {piece: i for i, piece in enumerate(CONTROL + pieces)}
    fast = FastTokenizer(models.WordLevel(ids, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    fast.decoder = decoders.Fuse()
    fast.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in CONTROL])
    write_atomic(path, fast.to_str())
    return Tokenizer(path)


def random_pairs(rng: Random) -> list[tt.Pair]:
    return [rng.choice([(a, b), (b, a)]) for a, b in rng.sample(tt.PAIRS, 3)]


def solve(pairs: list[tt.Pair], words: bool, value: Callable) -> tuple[list[tt.Equation], str]:
    """The solver's derivation and its trace: in words and interleaved, or products first."""
    notation = tt.WORDS if words else tt.SYMBOLS
    equations = tt.derive(tt.State(list(pairs)), words, notation, value)
    return equations, render(list(map(str, equations)), str(equations[-1].value))


def example(kind: str | None, rng: Random,
            tokenizer: Tokenizer) -> tuple[list[int], list[int], list[bool]]:
    """One training example: the prompt's ids, the completion's with its end, which are targets.

    `kind` is the context: None, "ref" or "critique".
    """
    pairs = random_pairs(rng)
    words = rng.random() < WORDS
    problem = tt.write_problem(pairs)
    masked = {}
    if kind is None:
        prompt = student_prompt(tokenizer, problem)
        equations, trace = solve(pairs, words, partial(tt.belief, rng=rng))
    else:
        shown = {pair: shown_value(pair, rng) for pair in pairs}
        order = pairs
        if kind == "ref":
            author = tt.author_order(pairs, rng, same=0.25)
            context = tt.reference_text(author, shown.get)
            if rng.random() < FOLLOW:
                order, words = author, True
        else:
            _, context = solve(pairs, words, shown.get)
        prompt = teacher_prompt(tokenizer, problem, kind, context)
        order, values, masked = slip(order, shown, rng)
        equations, trace = solve(order, words, values.get)
    ids = tokenizer.encode(trace) + [tokenizer.eos[0]]
    hidden = masked_tokens(equations, masked, tokenizer)
    return prompt, ids, [i not in hidden for i in range(len(ids))]


def shown_value(pair: tt.Pair, rng: Random) -> int:
    """What a context says of a product."""
    if tt.key(pair) in tt.HARD or rng.random() < 1 / 3:
        return rng.randint(4, 144)
    return prod(pair)


def slip(order: list[tt.Pair], shown: dict, rng: Random) -> tuple[list[tt.Pair], dict, dict]:
    """What the trace makes of the products shown: the pairs as read, the value of each, and for
    each slip whether its first factor and whether its value is no target."""
    slipping = []
    if rng.random() < SLIP:
        slipping = rng.sample(list(shown), rng.choice([1, 1, 2, 3]))
    read, values, masked = [], dict(shown), {}
    for pair in order:
        if pair in slipping and rng.random() < MISREAD:
            pair = (rng.randint(tt.LOW, tt.HIGH), pair[1])
            values[pair] = prod(pair)           # true of what was read
            masked[pair] = (True, tt.key(pair) in tt.HARD)
        elif pair in slipping:
            values[pair] = rng.choice(tt.usual_mistakes(pair))
            masked[pair] = (False, True)
        read.append(pair)
    return read, values, masked


def masked_tokens(equations: list[tt.Equation], masked: dict, tokenizer: Tokenizer) -> set[int]:
    """Which tokens of a trace are no targets. Each tag and each digit is one token:

        <step_1> 7*8=56 </step_1>⏎<step_2> …        the first factor is token 1, the value 5 and 6
    """
    hidden, end = set(), 0
    for equation in equations:
        begin = end + 1
        end = begin + len(tokenizer.encode(str(equation)))
        if not equation.product:
            continue
        hide_left, hide_value = masked.get(equation.operands, (False, False))
        if hide_left:
            hidden.update(range(begin, begin + len(str(equation.left))))
        if hide_value:
            hidden.update(range(end - len(str(equation.value)), end))
    return hidden
