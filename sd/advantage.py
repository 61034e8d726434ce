r"""Where the feedback falls: the per-token advantage of each context on a solver's errors.

    python -m sd.advantage                      the embedded solver, validation problems
    python -m sd.advantage runs/ref-seed0/best --teacher sd/task/assets --html advantage.html
    python -m sd.advantage Qwen3-1.7B --data hard.jsonl --critic self --problems 20 --samples 4 \
                           --sample-batch 32 --dtype bfloat16

A rollout y of problem x is read again under context c. At the rollout temperature, in float32,

    A_t = log teacher(y_t | x, c, y_<t) - log student(y_t | x, y_<t)

Under the reverse KL, self-distillation is a policy gradient with this advantage (`sampled`
estimates it). Under the forward KL, the default, the gradient with respect to the logits is
softmax(student) - softmax(teacher), and A_t only shows where the two disagree, and how.

c is the critique as partial copy, full quote or omission, or the reference solution. Beside them
stands grpo's constant A_i = (r_i - mean(r)) / std(r). A rollout counts as wrong if its answer is
wrong and the critic finds a first wrong step (case D).

Simplified: only the sampled token counts, whereas the loss sums over the vocabulary. Where a step
departs from its correction is decided by comparing characters.
"""
import argparse
import json
import sys
from dataclasses import asdict, dataclass, replace
from math import ceil
from os.path import commonprefix
from pathlib import Path

import numpy as np
import torch

from sd import UserError, command, losses
from sd.conditions import completion_hidden, feedback, open_critic
from sd.config import Config, open_solver, sampling_options
from sd.critic import Critic, words
from sd.llm.checkpoint import load, write_atomic
from sd.llm.model import Transformer
from sd.llm.sampling import uniforms
from sd.llm.tokenizer import Tokenizer
from sd.metrics import auroc, ratio
from sd.problems import EMBEDDED, Problem, read_problems
from sd.prompts import student_prompt
from sd.report import script_json
from sd.rollouts import Critique, Rollout, roll
from sd.run.figure import bars
from sd.steps import TAGS, Step, Trace, parse, token_span

KINDS = ("correct steps before", "wrong step up to error", "first wrong token", "after it")
FOUND = "finds the wrong token"
SHOWN = 12              # rollouts on the page
INTERVAL = "{mean:z.2f} [{low:z.2f}, {high:z.2f}]"      # z: no -0.00
COLUMNS = dict.fromkeys(KINDS, INTERVAL + " {below:5.0%}") | {FOUND: INTERVAL}
TEMPLATE = Path(__file__).parent / "run/pages/advantage.html"
Conditions = dict[str, tuple[Config, Critic | None]]    # a context's condition and critic


@dataclass
class Row:
    """A wrong rollout of T tokens, and how each context judges them."""
    rollout: Rollout
    views: dict[str, Rollout]   # context -> the rollout with that feedback, and logprobs under it
    pieces: list[str]           # (T) the texts of its tokens
    entropy: list[float]        # (T) of the student at each of them, in nats
    start: int                  # the wrong step is [start, end)
    first: int                  # the first wrong token
    end: int

    def places(self) -> np.ndarray:
        """(T) indices into KINDS; what comes after the wrong step has 4, not 3."""
        tokens = np.arange(len(self.pieces))
        return np.digitize(tokens, [self.start, self.first, self.first + 1, self.end])

    def advantage(self, name: str) -> np.ndarray:
        """A_t (T) of a context, or of grpo."""
        if name == "grpo":
            return np.full(len(self.pieces), self.rollout.advantage)
        return (self.views[name].logprobs - self.rollout.logprobs).numpy()


def sample_rollouts(model: Transformer, tokenizer: Tokenizer, problems: list[Problem],
                    samples: int, config: Config, purpose: str) -> list[Rollout]:
    """`samples` rollouts of every problem, side by side, as the seed and `purpose` determine."""
    prompts = [student_prompt(tokenizer, p.problem) for p in problems]
    noise = uniforms(len(problems) * samples, config.max_new_tokens, config.seed, purpose)
    return roll(model, tokenizer, problems, prompts, samples, config, noise)


def contexts_of(config: Config, critic: Critic, problems: list[Problem]) -> Conditions:
    """The critique, in three ways of quoting if it is symbolic, and the reference."""
    shown = replace(config, cond="critique")
    contexts = {"critique": (shown, critic)}
    if config.critic == "symbolic":
        contexts = {name: (shown, replace(critic, quoting=name))
                    for name in ("partial", "full", "omit")}
    if all(p.solution for p in problems):
        contexts["ref"] = replace(config, cond="ref"), None
    return contexts


def analyse_rollouts(student: Transformer, teacher: Transformer, tokenizer: Tokenizer,
                     rollouts: list[Rollout], contexts: Conditions, config: Config) -> list[Row]:
    """Scores the wrong rollouts under every context; those without a first wrong step are left out.

    `contexts` has the condition of each, and its critic if it needs one. The first one says which
    step is wrong and what it should be, so it must be a critic that quotes partially.
    """
    limit = teacher.config.max_position_embeddings - config.max_new_tokens
    rollouts = [rollout for rollout in rollouts if not rollout.reward]
    views = {}
    for name, (shown, critic) in contexts.items():
        views[name] = [replace(rollout) for rollout in rollouts]
        feedback(shown, views[name], critic, tokenizer, limit)
    rows = []
    for rollout, *copies in zip(rollouts, *views.values()):
        critique = copies[0].critique
        if critique.case != "D" or not all(copy.teacher_prompt for copy in copies):
            continue
        step, right = correction(rollout.trace, critique)
        if step:
            entropy = read_again(student, rollout, config.temperature)
            for copy in copies:
                read_again(teacher, copy, config.temperature)
            pieces = tokenizer.pieces(rollout.completion)
            place = locate(pieces, step, right)
            rows.append(Row(rollout, dict(zip(views, copies)), pieces, entropy, *place))
    return rows


def correction(trace: Trace, critique: Critique) -> tuple[Step | None, str]:
    """The step or answer that the critique corrects, and what it says instead, "" if nothing.

    That is the critique's step after its copies of those before. It need not have the same number,
    as the critic may have inserted missing steps. An answer in a box, without tags, is no step.
    """
    wrong, corrected = critique.wrong, parse(critique.text)
    if wrong == len(trace.steps):
        return trace.answer, corrected.answer.text
    copies = [words(step.text) for step in corrected.steps]
    at = 0
    for step in trace.steps[:wrong]:
        at = copies.index(words(step.text), at) + 1
    following = corrected.steps[at:]
    return trace.steps[wrong], following[0].text if following else ""


def locate(pieces: list[str], step: Step, right: str) -> tuple[int, int, int]:
    r"""The wrong step's first token, first wrong token and one past its last token.

    The first wrong token holds the first character that departs from `right`, what the step should
    say. Step.start and end include the tags. A token across a border belongs to the step where it
    begins. With right = "4*7=28" it is token 12:

        trace <step_1> 3*3=9 </step_1>\n<step_2> 4*7=29 </step_2>\n<answer> 38 </answer>
        token "<step_1> " 3*3=9 " </step_1>\n<step_2> " 4*7=  2  9 " </step_2>\n<answer> " 38 ...
        index      0       1-5            6            7-10 11 12            13           14 15
        step  [----- step 1, correct ------] [---- step 2, wrong: (7, 12, 14) ----] [- answer -]
        kind  correct steps before ......... up to error ... 12 after it .......................
    """
    written = "".join(pieces)
    start, end = token_span(pieces, step.start, step.end)
    after_tag = TAGS.match(written, step.start).end()
    departs = written.index(step.text, after_tag) + len(commonprefix([step.text, right]))
    first = token_span(pieces, 0, departs + 1)[1] - 1   # the last token that begins at or before it
    return min(start, first), first, max(end, first + 1)


@torch.no_grad()
def read_again(model: Transformer, rollout: Rollout, temperature: float) -> list[float]:
    """Sets logprobs (T) to log model(y_t | prompt, y_<t) and returns the model's entropy there (T).

    The prompt is the teacher's, if there is one.
    """
    prompt = rollout.teacher_prompt or rollout.prompt
    hidden = completion_hidden(model, [prompt], [rollout.completion])                   # (T, C)
    logprobs = losses.log_probs(model.lm_head(hidden), temperature)                     # (T, V)
    ids = torch.tensor(rollout.completion, device=hidden.device)
    rollout.logprobs = losses.of_token(logprobs, ids).cpu()                             # (T)
    if not rollout.logprobs.isfinite().all():
        raise FloatingPointError("the model's probabilities are not finite")
    return (logprobs.exp() * -logprobs).sum(-1).tolist()


def summarise(rows: list[Row]) -> dict:
    """context -> kind -> mean with interval, median, shares beyond -0.5 and +0.5, tokens.

    And how well -A_t finds the first wrong token, with `found`. Kinds without a token are left out.
    M is the number of tokens of all rows.
    """
    ids = [row.rollout.problem.id for row in rows for _ in row.pieces]
    _, problem = np.unique(ids, return_inverse=True)                                    # (M)
    kinds = np.minimum(np.concatenate([row.places() for row in rows]), 3)               # (M)
    summary = {}
    for name in (*rows[0].views, "grpo"):
        a = np.concatenate([row.advantage(name) for row in rows]).astype(float)         # (M)
        summary[name] = {FOUND: found(rows, [-row.advantage(name) for row in rows])}
        for i, kind in enumerate(KINDS):
            chosen = kinds == i
            values = a[chosen]
            if len(values):
                summary[name][kind] = ratio(a * chosen, chosen, problem) | {
                    "median": np.median(values),
                    "below": (values < -0.5).mean(),
                    "above": (values > 0.5).mean(),
                    "tokens": len(values)}
    return summary


def found(rows: list[Row], signals: list[np.ndarray]) -> dict[str, float]:
    """How well a signal, (T) of each row, finds the first wrong token: AUROC, and its interval."""
    _, problem = np.unique([row.rollout.problem.id for row in rows], return_inverse=True)
    values = [auroc(signal, row.first) for row, signal in zip(rows, signals)]
    return ratio(np.array(values), np.ones(len(rows)), problem)


def luck(rollouts: list[Rollout], critic: Critic) -> tuple[int, int]:
    """How many rollouts are right, and how many of these have wrong steps whose errors cancel."""
    critiques = critic.batch([rollout for rollout in rollouts if rollout.reward])
    return len(critiques), sum(critique.case == "D" for critique in critiques)


def table(summary: dict) -> str:
    """Conditions x kinds: mean A_t, its interval, the share of tokens below -0.5."""
    lines = [
        "mean A_t [95 % interval], share of tokens below -0.5; AUROC of -A_t",
        " " * 8 + "".join(title.rjust(28) for title in COLUMNS)]
    for name, numbers in summary.items():
        line = name.ljust(8)
        for column, form in COLUMNS.items():
            cell = form.format(**numbers[column]) if column in numbers else "-"
            line += cell.rjust(28)
        lines.append(line)
    return "\n".join(lines)


def figure(summary: dict) -> str:
    """The means as bars with intervals, an SVG."""
    groups = {}
    for kind in KINDS:
        if kind in summary["grpo"]:
            groups[kind] = {name: numbers[kind] for name, numbers in summary.items()}
    return bars("Mean advantage by kind of token, for each context", groups, INTERVAL,
                "mean A\u209c in nats, 95 % interval over problems;")


def page(rows: list[Row], summary: dict, about: str) -> str:
    """The template with the figure, and rows as JSON that cannot end its script element."""
    shown = []
    for row in rows[::ceil(len(rows) / SHOWN)]:
        views = {}
        for name, view in row.views.items():
            views[name] = {
                "critique": view.critique and view.critique.text,
                "logp": view.logprobs.tolist()}
        rollout = asdict(row.rollout.problem) | {
            "advantage": row.rollout.advantage,
            "logp": row.rollout.logprobs.tolist()}
        shown.append(vars(row) | {"rollout": rollout, "views": views})
    data = {"about": about, "kinds": KINDS, "found": FOUND, "summary": summary, "rollouts": shown}
    html = TEMPLATE.read_text(encoding="utf-8").replace("<!--FIGURE-->", figure(summary))
    return html.replace("<!--DATA-->", script_json(data))


@command("sd.advantage", __doc__)
def main(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", nargs="?", type=Path,
                        help="the student (default: the embedded solver)")
    parser.add_argument("--teacher", type=Path,
                        help="folder of the self-teacher (default: the student)")
    parser.add_argument("--data", type=Path, default=EMBEDDED / "val.jsonl",
                        help="problems, JSONL (default: the embedded validation problems)")
    parser.add_argument("--problems", type=int, default=10 ** 6, help="only the first so many")
    parser.add_argument("--critic", default="symbolic",
                        help="symbolic (embedded problems only; it quotes in three ways), self "
                        "(the teacher), a checkpoint FOLDER or a server's URL")
    parser.add_argument("--critic-tokens", type=int, default=Config.critic_tokens,
                        help="most tokens of a critique (default: %(default)s)")
    sampling_options(parser, samples=8)         # a group of grpo's
    parser.add_argument("--json", type=Path, help="file to write all numbers to")
    parser.add_argument("--html", type=Path, help="file for a page that shows A_t token by token")
    parser.add_argument("--svg", type=Path, help="file for the figure")
    args = parser.parse_args()
    student, tokenizer, config = open_solver(args.folder or EMBEDDED, args)
    if args.problems < 1 or not config.temperature:
        parser.error("--problems must be 1 or more, --temperature above 0")
    teacher = student
    if args.teacher:
        teacher, other = load(args.teacher, config.torch_dtype, config.torch_device)
        if tokenizer.fast.to_str() != other.fast.to_str():
            raise UserError(f"{args.teacher}: its tokenizer.json is not the student's")
    teacher.requires_grad_(False)                   # so that `--critic self` need not copy it
    config = replace(config, critic=args.critic, critic_tokens=args.critic_tokens)
    config.check()
    problems = read_problems(args.data)[:args.problems]
    critic = open_critic(config, teacher, tokenizer, problems)
    rollouts = sample_rollouts(student, tokenizer, problems, args.samples, config, "advantage")
    feedback(replace(config, group=args.samples), rollouts, None, tokenizer, 0)
    contexts = contexts_of(config, critic, problems)
    rows = analyse_rollouts(student, teacher, tokenizer, rollouts, contexts, config)
    solver = args.folder or "the embedded solver"
    about = (f"student {solver}, teacher {args.teacher or solver}: {len(rows)} wrong rollouts of "
             f"{len(problems)} {args.data.stem} problems, {args.samples} rollouts each, "
             f"temperature {config.temperature}, seed {config.seed}")
    if not rows:
        raise UserError(f"{about}; try more --samples")
    summary = summarise(rows)
    student = {
        "-log p": found(rows, [-row.rollout.logprobs.numpy() for row in rows]),
        "entropy": found(rows, [np.array(row.entropy) for row in rows]),
    }
    numbers = {"about": about, "contexts": summary, "student": student}
    print(about)
    if args.critic == "symbolic":
        right, lucky = luck(rollouts, critic)
        numbers |= {"right": right, "lucky": lucky}
        print(f"{right} rollouts are right, {lucky} of them with wrong steps whose errors cancel")
    print(f"{table(summary)}\nthe student alone finds it by its "
          + ", by its ".join(f"{name}: {INTERVAL.format(**m)}" for name, m in student.items()))
    for file, content in (
            (args.json, json.dumps(numbers, indent=1) + "\n"),
            (args.html, page(rows, summary, about)),
            (args.svg, figure(summary))):
        if file:
            write_atomic(file, content)
            print(f"written: {file}")


if __name__ == "__main__":
    sys.exit(main())
