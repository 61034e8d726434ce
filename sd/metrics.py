"""Avg@k, Maj@k, Pass@k with bootstrap intervals over problems, mean length, truncated share; and how to measure them.

For one problem with k sampled answers: Avg@k is the share that is right; Pass@k is 1 if any is right; Maj@k is 1 if the
most frequent answer is right, and its share of the tie if several are equally frequent (the expectation of breaking the
tie at random). A rollout without a final answer is wrong and has no vote.
"""
from dataclasses import dataclass

import numpy as np

from sd.answers import equal, final_answer
from sd.critic import SymbolicCritic
from sd.model import Transformer
from sd.problems import Problem
from sd.sampling import sample, uniforms
from sd.tokenizer import Tokenizer

ROWS = 400      # rollouts sampled at once: bounds the memory of an evaluation


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
        return out | {"mean_length": self.lengths.mean(), "truncated": 100 * self.truncated.mean()}


def majority(answers: list[str | None], truth: str) -> float:
    """Maj@k of one problem: 1, 0, or 1 / (number of tied answers) where the right one is among them."""
    votes: list[tuple[str, int]] = []
    for answer in answers:
        if answer is None:
            continue
        for i, (known, count) in enumerate(votes):
            if equal(answer, known):
                votes[i] = (known, count + 1)
                break
        else:
            votes.append((answer, 1))
    top = [answer for answer, count in votes if count == max(c for _, c in votes)]
    return sum(equal(answer, truth) for answer in top) / len(top) if top else 0.0


def bootstrap(values: np.ndarray, draws: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the mean of `values` (P), resampling problems."""
    rng = np.random.default_rng(seed)
    means = values[rng.integers(0, len(values), (draws, len(values)))].mean(1)
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def evaluate(model: Transformer, tokenizer: Tokenizer, problems: list[Problem], samples: int, temperature: float,
             max_new_tokens: int, seed: int, context: str | None = None) -> Scores:
    """Samples every problem `samples` times. With `context`, the self-teacher's prompt: "ref" shows the solution,
    "critique" the symbolic critique of a rollout that is sampled first."""
    per_call = max(1, ROWS // samples)
    answers, lengths, truncated = [], [], []
    for start in range(0, len(problems), per_call):
        part = problems[start:start + per_call]
        noise = uniforms(len(part) * samples, max_new_tokens, seed, "evaluate", start)
        if context is None:
            prompts, group = [tokenizer.student_prompt(p.problem) for p in part], samples
        elif context == "ref":
            prompts, group = [tokenizer.teacher_prompt(p.problem, "ref", p.solution) for p in part], samples
        else:
            first = sample(model, [tokenizer.student_prompt(p.problem) for p in part], tokenizer.eos, max_new_tokens,
                           temperature, samples, uniforms(*noise.shape, seed, "evaluate first", start))
            owners = [p for p in part for _ in range(samples)]
            texts = map(tokenizer.decode, first.completions())
            critiques = map(SymbolicCritic(), owners, texts, first.truncated.tolist())
            prompts, group = [tokenizer.teacher_prompt(p.problem, "critique", c.text)
                              for p, c in zip(owners, critiques)], 1
        rollouts = sample(model, prompts, tokenizer.eos, max_new_tokens, temperature, group, noise)
        cut = rollouts.truncated.tolist()
        answers += [final_answer(tokenizer.decode(c), t) for c, t in zip(rollouts.completions(), cut)]
        lengths += rollouts.lengths.tolist()
        truncated += cut
    return scores([answers[i:i + samples] for i in range(0, len(answers), samples)], problems,
                  np.array(lengths).reshape(-1, samples), np.array(truncated).reshape(-1, samples))


def scores(answers: list[list[str | None]], problems: list[Problem], lengths: np.ndarray,
           truncated: np.ndarray) -> Scores:
    right = np.array([[equal(a, p.answer) for a in row] for row, p in zip(answers, problems)], dtype=float)   # (P, k)
    majorities = np.array([majority(row, p.answer) for row, p in zip(answers, problems)])
    return Scores(right.mean(1), majorities, right.max(1), lengths, truncated)
