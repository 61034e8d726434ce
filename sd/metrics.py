"""Measures Avg@k, Maj@k, Pass@k with bootstrap intervals over problems, mean length and truncated share.

For one problem with k sampled answers: Avg@k is the share that is right; Pass@k is 1 if any is right; Maj@k
is 1 if the most frequent answer is right, and its share of the tie if several are equally frequent (the
expectation of breaking the tie at random). A rollout without a final answer is wrong and has no vote.
"""
from dataclasses import dataclass

import numpy as np
import torch

from sd.answers import equal, final_answer
from sd.task.symbolic import SymbolicCritic
from sd.llm.model import Transformer
from sd.problems import Problem, check_lengths
from sd.run.ranks import Ranks
from sd.llm.sampling import sample_in_parts, uniforms
from sd.llm.tokenizer import Tokenizer


@dataclass
class Scores:
    """Per-problem values (P) in [0, 1]; `lengths` (P, k) in tokens, EOS included; `truncated` (P, k)."""
    avg: np.ndarray
    maj: np.ndarray
    passed: np.ndarray
    lengths: np.ndarray
    truncated: np.ndarray

    def summary(self) -> dict:
        """Percent with 95 % bootstrap intervals over problems, as printed and written by eval.py."""
        k = self.lengths.shape[1]
        out = {"problems": len(self.avg), "samples": k}
        for name, values in (("avg", self.avg), ("maj", self.maj), ("pass", self.passed)):
            low, high = bootstrap(values)
            out[f"{name}@{k}"] = {"mean": 100 * values.mean(), "low": 100 * low, "high": 100 * high}
        out["values"] = {"avg": self.avg.tolist(), "maj": self.maj.tolist(),
                         "pass": self.passed.tolist()}      # per problem
        return out | {"mean_length": self.lengths.mean(), "truncated": 100 * self.truncated.mean()}


def majority(answers: list[str | None], truth: str) -> float:
    """Maj@k of one problem: 1, 0, or 1 / (number of tied answers) where the right one is among them."""
    votes: list[tuple[str, int]] = []
    for answer in answers:
        if answer is None:
            continue
        for i, (known, count) in enumerate(votes):
            if equal(answer, known) or equal(answer, truth) and equal(known, truth):
                votes[i] = (known, count + 1)
                break
        else:
            votes.append((answer, 1))
    top = [answer for answer, count in votes if count == max(c for _, c in votes)]
    return sum(equal(answer, truth) for answer in top) / len(top) if top else 0.0


def bootstrap(values: np.ndarray, counts: np.ndarray | None = None,
              draws: int = 10_000) -> tuple[float, float]:
    """95 % percentile interval over problems of the mean of `values` (P), or of sum(values) / sum(counts)."""
    counts = np.ones(len(values)) if counts is None else counts
    drawn = np.random.default_rng(0).integers(0, len(values), (draws, len(values)))             # (draws, P)
    with np.errstate(invalid="ignore"):                 # a draw whose counts are all 0 is left out
        low, high = np.nanquantile(values[drawn].sum(1) / counts[drawn].sum(1), [0.025, 0.975])
    return float(low), float(high)


def evaluate(model: Transformer, tokenizer: Tokenizer, problems: list[Problem], samples: int,
             temperature: float, max_new_tokens: int, seed: int, context: str | None = None,
             rows: int = 400, ranks: Ranks | None = None, compile: bool = False) -> Scores:
    """Samples every problem `samples` times, `rows` rollouts at once, each rank its share of the problems.

    With `context`, the self-teacher's prompt: "ref" shows the solution, "critique" the symbolic critique of a
    rollout sampled first. Raises UserError if a prompt does not fit the model.
    """
    mine = ranks.share(len(problems)) if ranks else slice(0, len(problems))
    part, room = problems[mine], model.config.max_position_embeddings - max_new_tokens

    def draws(*purpose) -> torch.Tensor:
        noise = uniforms(len(problems) * samples, max_new_tokens, seed, *purpose)
        return noise[mine.start * samples:mine.stop * samples]

    prompts, group = [tokenizer.student_prompt(p.problem) for p in part], samples
    check_lengths(part, prompts, room)
    if context == "ref":
        prompts = [tokenizer.teacher_prompt(p.problem, "ref", p.solution) for p in part]
    elif context == "critique":
        first = sample_in_parts(model, prompts, tokenizer.eos, max_new_tokens, temperature, samples,
                                draws("evaluate, first"), rows, compile)
        owners = [p for p in part for _ in range(samples)]
        critiques = SymbolicCritic().batch(owners, list(map(tokenizer.decode, first.completions())),
                                           first.truncated.tolist())
        group = 1                       # each rollout has a critique, and so a prompt, of its own
        prompts = [tokenizer.teacher_prompt(p.problem, "critique", c.text) for p, c in zip(owners, critiques)]
    check_lengths(part, prompts, room)
    out = sample_in_parts(model, prompts, tokenizer.eos, max_new_tokens, temperature, group,
                          draws("evaluate"), rows, compile)
    found = [[final_answer(tokenizer.decode(c), cut), len(c), cut]
             for c, cut in zip(out.completions(), out.truncated.tolist())]
    found = ranks.gather(found) if ranks else found
    answers, lengths, truncated = zip(*found)                                               # (P * k) each
    answers = [answers[i:i + samples] for i in range(0, len(answers), samples)]             # (P, k)
    return scores(answers, problems, np.array(lengths).reshape(-1, samples),
                  np.array(truncated).reshape(-1, samples))


def scores(answers: list[list[str | None]], problems: list[Problem], lengths: np.ndarray,
           truncated: np.ndarray) -> Scores:
    right = np.array([[equal(a, p.answer) for a in row] for row, p in zip(answers, problems)],
                     dtype=float)                                       # (P, k)
    majorities = np.array([majority(row, p.answer) for row, p in zip(answers, problems)])
    return Scores(right.mean(1), majorities, right.max(1), lengths, truncated)
