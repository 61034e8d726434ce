"""Measures Avg@k, Maj@k, Pass@k with bootstrap intervals over problems, and length and truncation.

For one problem with k sampled answers: Avg@k is the share that is right; Pass@k is 1 if any is
right; Maj@k is 1 if the most frequent answer is right, and its share of the tie if several are
equally frequent (the expectation of breaking the tie at random). A rollout without a final answer
is wrong and has no vote.
"""
from dataclasses import dataclass, replace

import numpy as np

from sd.answers import equal
from sd.conditions import feedback
from sd.config import Config
from sd.llm.model import Transformer
from sd.llm.sampling import uniforms
from sd.llm.tokenizer import Tokenizer
from sd.problems import Problem
from sd.prompts import student_prompt, teacher_prompt
from sd.rollouts import Rollout, roll
from sd.run.ranks import Ranks
from sd.task.symbolic import SymbolicCritic

DRAWS = 10_000      # of the bootstrap


@dataclass
class Scores:
    """Per problem (P) in [0, 1]; the mean length in tokens, and the share that was truncated."""
    samples: int
    avg: np.ndarray
    maj: np.ndarray
    passed: np.ndarray
    length: float
    truncated: float

    def summary(self) -> dict:
        """Percent with 95 % bootstrap intervals over problems: what eval.py prints and writes."""
        out = {"problems": len(self.avg), "samples": self.samples, "mean_length": self.length,
               "truncated": 100 * self.truncated, "values": {}}
        for name, values in (("avg", self.avg), ("maj", self.maj), ("pass", self.passed)):
            low, high = bootstrap(100 * values)
            out[f"{name}@{self.samples}"] = {"mean": 100 * values.mean(), "low": low, "high": high}
            out["values"][name] = values.tolist()
        return out


def majority(answers: list[str | None], truth: str) -> float:
    """Maj@k of a problem: 1, 0, or 1 / (number of tied answers) if the right one is one of them."""
    votes: dict[str, int] = {}
    for answer in answers:
        if answer is None:
            continue
        for known in votes:
            if equal(answer, known) or (equal(answer, truth) and equal(known, truth)):
                votes[known] += 1
                break
        else:
            votes[answer] = 1
    most = max(votes.values(), default=0)
    top = [answer for answer, count in votes.items() if count == most]
    return sum(equal(answer, truth) for answer in top) / len(top) if top else 0.0


def bootstrap(values: np.ndarray, counts: np.ndarray | None = None) -> tuple[float, float]:
    """95 % percentile interval over problems of mean(values), or of sum(values) / sum(counts)."""
    counts = np.ones(len(values)) if counts is None else counts
    drawn = np.random.default_rng(0).integers(0, len(values), (DRAWS, len(values)))     # (DRAWS, P)
    with np.errstate(invalid="ignore"):         # a draw whose counts are all 0 is left out
        means = values[drawn].sum(1) / counts[drawn].sum(1)                             # (DRAWS)
    low, high = np.nanquantile(means, [0.025, 0.975])
    return float(low), float(high)


def ratio(above: np.ndarray, below: np.ndarray, problem: np.ndarray) -> dict[str, float]:
    """sum(above) / sum(below) over tokens (M), with its 95 % interval; `problem` numbers theirs.

    The interval is over problems, since a problem's rollouts share facts, group and errors.
    """
    above, below = np.bincount(problem, above), np.bincount(problem, below)             # (P)
    low, high = bootstrap(above, below)
    return {"mean": above.sum() / below.sum(), "low": low, "high": high}


def auroc(signal: np.ndarray, first: int) -> float:
    """The share of the other entries (T - 1) below the one at `first`; a tie counts half."""
    others = np.delete(signal, first)
    return float(np.mean(others < signal[first]) + np.mean(others == signal[first]) / 2)


def evaluate(model: Transformer, tokenizer: Tokenizer, problems: list[Problem], samples: int,
             config: Config, context: str | None = None, ranks: Ranks | None = None) -> Scores:
    """Samples every problem `samples` times, each rank its share of the problems.

    With `context`, the self-teacher is measured: "ref" shows it the solution, "critique" the
    symbolic critique of a rollout that is sampled first. Raises UserError if a prompt is too long.
    """
    share = ranks.share(len(problems)) if ranks else slice(0, len(problems))
    mine = problems[share]
    rows, total = slice(share.start * samples, share.stop * samples), len(problems) * samples
    limit = model.config.max_position_embeddings - config.max_new_tokens

    def draw(problems: list[Problem], prompts: list[list[int]], group: int,
             purpose: str) -> list[Rollout]:
        noise = uniforms(total, config.max_new_tokens, config.seed, purpose)[rows]      # (P * k, T)
        return roll(model, tokenizer, problems, prompts, group, config, noise)

    if context == "ref":
        prompts = [teacher_prompt(tokenizer, p.problem, "ref", p.solution) for p in mine]
    else:
        prompts = [student_prompt(tokenizer, p.problem) for p in mine]
    purpose = "evaluate, first" if context == "critique" else "evaluate"
    rollouts = draw(mine, prompts, samples, purpose)
    if context == "critique":       # each rollout has a critique, and so a prompt, of its own
        feedback(replace(config, cond="critique"), rollouts, SymbolicCritic(), tokenizer, limit)
        prompts = [r.teacher_prompt for r in rollouts]
        rollouts = draw([r.problem for r in rollouts], prompts, 1, "evaluate")
    found = [[r.answer, r.reward, len(r.completion), r.truncated] for r in rollouts]
    return scores(problems, ranks.gather(found) if ranks else found)


def scores(problems: list[Problem], rows: list[list]) -> Scores:
    """`rows` has answer, reward, length and truncated of each rollout, a problem's side by side."""
    k = len(rows) // len(problems)
    answers, rewards, lengths, truncated = zip(*rows)                           # (P * k) each
    rewards = np.reshape(rewards, (-1, k))                                      # (P, k)
    maj = []
    for i, problem in enumerate(problems):
        maj.append(majority(answers[i * k:(i + 1) * k], problem.answer))
    return Scores(
        samples=k,
        avg=rewards.mean(1),
        maj=np.array(maj),
        passed=rewards.max(1),
        length=float(np.mean(lengths)),
        truncated=float(np.mean(truncated)))
