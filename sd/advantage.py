r"""Where the feedback falls: the per-token advantage of each context on the solver's own wrong rollouts.

    python -m sd.advantage                          the embedded solver, validation problems
    python -m sd.advantage runs/ref-seed0/best --teacher sd/task/assets --html advantage.html
    python -m sd.advantage Qwen3-1.7B --data hard.jsonl --critic self --problems 20 --samples 4 \
                           --sample-batch 32 --dtype bfloat16

A rollout y of problem x is reread under context c; self-distillation is a policy gradient with the advantage

    A_t = log teacher(y_t | x, c, y_<t) - log student(y_t | x, y_<t)    at the rollout temperature, in float32

Strictly, this holds for the reverse KL's gradient (`sampled` estimates it). The forward KL's, with respect to
the logits, is softmax(student) - softmax(teacher): there A_t shows where the two disagree, and which way.

c is the critique as partial copy, full quote or omission, or the reference solution; beside them stands
grpo's constant A_i = (r_i - mean(r)) / std(r). A rollout counts as wrong if its answer is wrong and the
critic finds a first wrong step (case D). Simplified: only the sampled token counts, whereas the loss sums
over the vocabulary; where a step departs from its correction is decided by comparing characters.
"""
import json
import re
import sys
from dataclasses import dataclass, field
from html import escape
from math import copysign, log1p
from os.path import commonprefix
from pathlib import Path

import numpy as np
import torch

from sd import UserError, command, losses
from sd.answers import equal, final_answer
from sd.llm.checkpoint import load, write_atomic
from sd.conditions import CHUNK, completion_hidden, feedback
from sd.config import Config, check_sampling, pick_device, sampling_options, sizes
from sd.critic import QUOTING, Critic
from sd.task.symbolic import SymbolicCritic
from sd.metrics import bootstrap
from sd.llm.model import Transformer
from sd.problems import EMBEDDED, Problem, embedded, read_problems
from sd.report import script_json
from sd.llm.sampling import sample_in_parts, uniforms
from sd.scribe import language_critic, words
from sd.steps import TAGS, Step, Trace, parse, token_span
from sd.llm.tokenizer import Tokenizer

KINDS, MASS = (("correct steps before", "wrong step up to error", "first wrong token", "after it"),
               "A<0: share on wrong step")
LINEAR = 0.1            # figures are linear near 0, logarithmic beyond: A_t goes from +0.1 to below -10
SHOWN = 12              # rollouts on the page
MICRO = 16              # rollouts read at once
INTERVAL, MINUS = "{mean:.2f} [{low:.2f}, {high:.2f}]", "\u2212"
TEMPLATE = Path(__file__).parent / "run/pages/advantage.html"


@dataclass
class Row:
    """A wrong rollout of T tokens; `first` is the first wrong token, [start, end) spans the wrong step."""
    problem: Problem
    ids: list[int]
    pieces: list[str]
    start: int
    first: int
    end: int
    grpo: float                     # A_i
    contexts: dict[str, str]        # name -> what the self-teacher is shown
    prompts: dict[str, list[int]]   # "student" and each context -> the prompt
    logp: dict[str, np.ndarray] = field(default_factory=dict)   # same names -> (T) log-probabilities of y

    def kinds(self) -> np.ndarray:
        """(T) indices into KINDS."""
        return np.digitize(np.arange(len(self.ids)), [self.start, self.first, self.first + 1])

    def advantages(self) -> dict[str, np.ndarray]:
        """Context -> A_t (T)."""
        told = {name: logp - self.logp["student"] for name, logp in self.logp.items() if name != "student"}
        return told | {"grpo": np.full(len(self.ids), self.grpo)}


def corrected(trace: Trace, wrong: int, critique: Trace) -> str | None:
    """What the critique says instead of step `wrong`: the step after its copies of those before, if any.

    Not simply the critique's step `wrong`: the critic may have inserted missing steps among the copied ones.
    """
    if wrong == len(trace.steps):
        return critique.answer.text if critique.answer else None
    rest = iter(critique.steps)
    for step in trace.steps[:wrong]:
        any(words(copy.text) == words(step.text) for copy in rest)      # takes all up to the copy
    return next((step.text for step in rest), None)


def locate(pieces: list[str], step: Step, right: str | None) -> tuple[int, int, int]:
    r"""The wrong step's first token, first wrong token and one past the last; `right` is what it should say.

    The first wrong token holds the first character that departs from `right`; without `right`, it is the
    step's first. Step.start and end include the tags; a token across a border belongs to the step where it
    begins:

        trace <step_1> 3*3=9 </step_1>\n<step_2> 4*7=29 </step_2>\n<answer> 38 </answer>      right = "4*7=28"
        token "<step_1> " 3 * 3 = 9 " </step_1>\n<step_2> " 4 * 7 =  2  9 " </step_2>\n<answer> " 3  8 ... eos
        index      0      1 2 3 4 5            6            7 8 9 10 11 12          13            14 15 16  17
        step  [------------- step 1, correct -------------] [--- step 2, wrong: (7, 12, 14) ----] [- answer -]
        kind  correct steps before ........................ up to error 12 after it ..........................
    """
    text, (start, end) = "".join(pieces), token_span(pieces, step.start, step.end)
    if right is None or right == step.text:
        return start, start, max(end, start + 1)
    at = text.index(step.text, TAGS.match(text, step.start).end()) + len(commonprefix([step.text, right]))
    first = token_span(pieces, 0, at + 1)[1] - 1    # the last token that begins at or before that character
    return min(start, first), first, max(end, first + 1)


@torch.no_grad()
def read_again(model: Transformer, rows: list[Row], name: str, temperature: float) -> None:
    """Sets all rows' logp[name]: log model(y_t | prompts[name], y_<t) at rollout temperature, in float32."""
    chunk = max(1, CHUNK // model.config.vocab_size)
    for some in (rows[at:at + MICRO] for at in range(0, len(rows), MICRO)):
        hidden = completion_hidden(model, [row.prompts[name] for row in some],
                                   [row.ids for row in some])                                       # (M, C)
        ids = torch.tensor([token for row in some for token in row.ids], device=hidden.device)      # (M)
        logp = torch.cat([losses.of_token(losses.log_probs(model.lm_head(h), temperature), y)
                          for h, y in zip(hidden.split(chunk), ids.split(chunk))])                  # (M)
        if not logp.isfinite().all():
            raise UserError("the model's probabilities are not finite, so there is no advantage to look at")
        for row, y in zip(some, logp.split([len(row.ids) for row in some])):
            row.logp[name] = y.cpu().numpy()


def look(student: Transformer, teacher: Transformer, tokenizer: Tokenizer, problems: list[Problem],
         ids: list[list[int]], cut: list[bool], grpo: list[float], critics: dict[str, Critic],
         temperature: float) -> list[Row]:
    """Scores rollouts, one per problem, under every context; those without a first wrong step are left out.

    The first of `critics` says which step is wrong and what it should be, so it must quote partially.
    """
    pieces = [tokenizer.pieces(y) for y in ids]
    texts, limit = (["".join(p) for p in pieces],
                    teacher.config.max_position_embeddings - max(map(len, ids), default=0))
    told = {name: feedback("critique", problems, texts, cut, [], 1, critic, tokenizer, limit)
            for name, critic in critics.items()}
    rows, critiques = [], next(iter(told.values())).critiques
    if all(p.solution for p in problems):
        told["ref"] = feedback("ref", problems, texts, cut, [], 1, None, tokenizer, limit)
    for i, (problem, critique) in enumerate(zip(problems, critiques)):
        prompts = {name: of.teacher_prompts[i] for name, of in told.items()}
        if critique.case != "D" or None in prompts.values():        # None: malformed, or no room
            continue
        trace = parse(texts[i])
        if critique.wrong == len(trace.steps) and trace.answer is None:     # boxed, not tagged: no step
            continue
        place = locate(pieces[i], [*trace.steps, trace.answer][critique.wrong],
                       corrected(trace, critique.wrong, parse(critique.text)))
        shown = {name: of.critiques[i].text if of.critiques else problem.solution
                 for name, of in told.items()}
        prompts["student"] = tokenizer.student_prompt(problem.problem)
        rows.append(Row(problem, ids[i], pieces[i], *place, grpo[i], shown, prompts))
    for name in rows[0].prompts if rows else ():
        read_again(student if name == "student" else teacher, rows, name, temperature)
    return rows


def analyse(student: Transformer, teacher: Transformer, tokenizer: Tokenizer, problems: list[Problem],
            critics: dict[str, Critic], samples: int = 8, temperature: float = Config.temperature,
            max_new_tokens: int = Config.max_new_tokens, seed: int = 0,
            at_once: int = Config.sample_batch, compile: bool = False) -> list[Row]:
    """Samples `samples` rollouts of every problem, as one grpo group, and analyses the wrong ones."""
    owners, prompts = ([p for p in problems for _ in range(samples)],
                       [tokenizer.student_prompt(p.problem) for p in problems])
    rollouts = sample_in_parts(student, prompts, tokenizer.eos, max_new_tokens, temperature, samples,
                               uniforms(len(owners), max_new_tokens, seed, "advantage"), at_once,
                               compile)
    if not rollouts.logprobs.isfinite().all():
        raise UserError("the solver's probabilities are not finite, so there is nothing to look at")
    ids, cut = rollouts.completions(), rollouts.truncated.tolist()
    right = [equal(final_answer(tokenizer.decode(y), c), p.answer) for p, y, c in zip(owners, ids, cut)]
    grpo = losses.group_advantages(torch.tensor(right).float().view(-1, samples)).flatten().tolist()
    some = [[of[i] for i, good in enumerate(right) if not good] for of in (owners, ids, cut, grpo)]
    return look(student, teacher, tokenizer, *some, critics, temperature)


def ratio(above: np.ndarray, below: np.ndarray, draws: int = 10_000) -> dict | None:
    """sum(above) / sum(below) of sums per problem (P), with its 95 % interval; None if all below are 0."""
    if not below.any():
        return None
    low, high = bootstrap(above, below, draws)  # of problems: their rollouts share facts, group and errors
    return {"mean": float(above.sum() / below.sum()), "low": low, "high": high}


def summarise(rows: list[Row]) -> dict[str, dict]:
    """context -> kind -> mean with interval, median, shares beyond -0.5 and +0.5, tokens; and the share of
    the negative mass, the sum of min(A_t, 0), that falls on the wrong step."""
    lengths, advantages = [len(row.ids) for row in rows], [row.advantages() for row in rows]
    owner = np.repeat(np.unique([row.problem.id for row in rows], return_inverse=True)[1], lengths)     # (M)
    kinds = np.concatenate([row.kinds() for row in rows])                                               # (M)
    inside = np.concatenate([np.digitize(np.arange(n), [r.start, r.end]) == 1 for r, n in zip(rows, lengths)])
    out: dict[str, dict] = {}
    for name in advantages[0]:
        a = np.concatenate([told[name] for told in advantages]).astype(float)                       # (M)
        mass = np.minimum(a, 0)
        out[name] = {MASS: ratio(np.bincount(owner, mass * inside), np.bincount(owner, mass))}      # (P), (P)
        for i, kind in enumerate(KINDS):
            of, some = kinds == i, a[kinds == i]
            out[name][kind] = ratio(np.bincount(owner, a * of), np.bincount(owner, of))
            if len(some):
                out[name][kind] |= {"median": float(np.median(some)), "below": float((some < -0.5).mean()),
                                    "above": float((some > 0.5).mean()), "tokens": len(some)}
    return out


def table(summary: dict[str, dict]) -> str:
    """Contexts x kinds: mean A_t, its interval, the share of tokens below -0.5; the rest is in the JSON."""
    lines = [" " * 8 + "".join(title.rjust(28) for title in (*KINDS, MASS))]
    for name, of in summary.items():
        cells = [(INTERVAL + " {below:5.0%}").format(**of[k]) if of[k] else "-" for k in KINDS]
        cells.append("{mean:.0%} [{low:.0%}, {high:.0%}]".format(**of[MASS]) if of[MASS] else "-")
        lines.append(name.ljust(8) + "".join(cell.rjust(28) for cell in cells))
    return "\n".join(lines)


def figure(summary: dict[str, dict]) -> str:
    """The means as a separate SVG: bars with intervals, on a card in the reader's light or dark scheme."""
    scale = lambda value: copysign(log1p(abs(value) / LINEAR), value)
    x = lambda value: 84 + 224 * (scale(value) - lowest) / (highest - lowest)
    means = [of[kind] for of in summary.values() for kind in KINDS if of[kind]]
    lowest, highest = (scale(min(m["low"] for m in means) - LINEAR),
                       scale(max(m["high"] for m in means) + LINEAR))
    bars, y = "", 30
    for kind in KINDS:
        bars += f'<text x="16" y="{y}" class="kind">{kind}</text>'
        for name, of in summary.items():
            y += 18
            bars += f'<text x="76" y="{y}" class="end">{escape(name)}</text>'
            if m := of[kind]:
                left, right = sorted((x(0), x(m["mean"])))
                bars += (f'<rect x="{left:.1f}" y="{y - 11}" width="{max(right - left, 1):.1f}" height="13" '
                         f'class="{"above" if m["mean"] > 0 else "below"}"/>'
                         f'<path d="M{x(m["low"]):.1f} {y - 8}v7m0 -3.5H{x(m["high"]):.1f}m0 -3.5v7" '
                         f'class="interval"/><text x="424" y="{y}" class="end">'
                         f'{INTERVAL.format(**m).replace("-", MINUS)}</text>')
        y += 34
    for tick in [v for v in (-10, -3, -1, -0.3, 0, 0.3, 1, 3, 10) if lowest <= scale(v) <= highest]:
        bars = (f'<path d="M{x(tick):.1f} 34V{y - 26}" class="{"grid" if tick else "zero"}"/>'
                f'<text x="{x(tick):.1f}" y="{y - 12}" class="tick">'
                f'{f"{tick:g}".replace("-", MINUS)}</text>') + bars
    svg = TEMPLATE.read_text().split("<!--FIGURE-->")[1].strip()
    return svg.replace("HEIGHT", str(y + 30)).replace("NOTE", str(y + 6)).replace("<!--BARS-->", bars) + "\n"


def page(rows: list[Row], summary: dict[str, dict], facts: dict) -> str:
    """The template with the figure, and all else as JSON in which no character can end the script element."""
    firsts = {row.problem.id: row for row in reversed(rows)}.values()       # the first of each problem
    spread = sorted(firsts, key=lambda row: row.grpo)                       # most are 0: show others too
    chosen = [spread[int(i)] for i in np.linspace(0, len(spread) - 1, min(SHOWN, len(spread)))]
    rollouts = [{"problem": r.problem.problem, "truth": r.problem.answer, "tokens": r.pieces, "grpo": r.grpo,
                 "kinds": r.kinds().tolist(), "start": r.start, "first": r.first, "end": r.end,
                 "contexts": r.contexts, "logp": {name: [round(float(v), 4) for v in logp]
                                                  for name, logp in r.logp.items()}} for r in chosen]
    data = {"facts": facts, "kinds": KINDS, "mass": MASS, "linear": LINEAR, "summary": summary,
            "rollouts": rollouts}
    before, _, between, after = re.split("<!--(?:FIGURE|DATA)-->", TEMPLATE.read_text())
    return before + figure(summary) + between + script_json(data) + after


@command("sd.advantage", __doc__)
def main(parser) -> None:
    parser.add_argument("folder", nargs="?", type=Path, default=EMBEDDED, metavar="FOLDER",
                        help="the student (default: the embedded solver)")
    parser.add_argument("--teacher", type=Path, metavar="FOLDER",
                        help="the self-teacher (default: the student)")
    parser.add_argument("--split", choices=("train", "val", "test"), default="val",
                        help="which of the embedded problems (default: %(default)s)")
    parser.add_argument("--data", type=Path, metavar="FILE",
                        help="problems, JSONL, instead of the embedded ones")
    parser.add_argument("--critic", default="symbolic", help="symbolic (embedded problems only; it quotes in "
                        "three ways), self (the teacher), a checkpoint FOLDER or a server's URL")
    parser.add_argument("--critic-tokens", type=int, default=Config.critic_tokens,
                        help="most tokens of a critique (default: %(default)s)")
    parser.add_argument("--problems", type=int, default=10 ** 6, metavar="N",
                        help="only the first N (default: all)")
    sampling_options(parser, samples=8)         # a group of grpo's
    for name, what in (("json", "all numbers"), ("html", "a page to look at, token by token"),
                       ("svg", "the figure")):
        parser.add_argument(f"--{name}", type=Path, metavar="FILE", help=f"write {what} to FILE")
    args = parser.parse_args()
    args.teacher = args.teacher or args.folder
    check_sampling(parser, args, least=2)
    if args.data and args.split != "val":
        parser.error("--split chooses among the embedded problems; leave it out beside --data")
    if min(args.problems, args.critic_tokens) < 1 or not args.temperature:
        parser.error("--problems and --critic-tokens must be 1 or more, --temperature above 0")
    where = getattr(torch, args.dtype), pick_device(args.device)
    student, tokenizer = load(args.folder, *where)
    teacher, other = load(args.teacher, *where) if args.teacher != args.folder else (student, tokenizer)
    if tokenizer.fast.to_str() != other.fast.to_str():
        raise UserError(f"{args.teacher}: its tokenizer.json is not that of {args.folder}")
    problems = (read_problems(args.data) if args.data else embedded(args.split))[:args.problems]
    args.max_new_tokens, args.sample_batch = sizes(args, tokenizer)
    if args.critic == "symbolic":
        critics = {quoting: SymbolicCritic(quoting) for quoting in QUOTING}
    else:
        slots = Config("critique", sample_batch=args.sample_batch, max_new_tokens=args.max_new_tokens,
                       critic_tokens=args.critic_tokens).critic_slots
        critics = {"critique": language_critic(args.critic, teacher, tokenizer, args.critic_tokens, slots,
                                               args.compile)}
    rows = analyse(student, teacher, tokenizer, problems, critics, args.samples, args.temperature,
                   args.max_new_tokens, args.seed, args.sample_batch, args.compile)
    if not rows:
        raise UserError(f"{args.folder}: no wrong rollout with a usable critique among "
                        f"{len(problems) * args.samples} of {len(problems)} {args.data or args.split} "
                        "problems, so there is no error to look at; try more --samples")
    summary = summarise(rows)
    facts = {name: value for name, value in vars(args).items() if name not in ("json", "html", "svg", "data")}
    facts |= {"problems": len(problems), "wrong": len(rows), "split": str(args.data or args.split)}
    for name in ("folder", "teacher"):
        facts[name] = "the embedded solver" if facts[name] == EMBEDDED else str(facts[name])
    print("student {folder}, teacher {teacher}: {wrong} wrong rollouts of {problems} {split} problems, "
          "{samples} rollouts each\nmean A_t [95 % interval], share of tokens below -0.5".format(**facts))
    print(table(summary))
    for file, text in ((args.json, lambda: json.dumps(facts | {"contexts": summary}, indent=1) + "\n"),
                       (args.html, lambda: page(rows, summary, facts)), (args.svg, lambda: figure(summary))):
        if file:
            write_atomic(file, text())
            print(f"written: {file}")


if __name__ == "__main__":
    sys.exit(main())
