"""What is known of a context before training, and whether it predicts what training gains.

A context is measured on validation rollouts of the untrained solver:
- lead: how much more often than the solver its self-teacher is right, in percent;
- correct and wrong: KL(teacher || student) in nats per token, on all before the first wrong step,
  and on that step. With the forward KL this is the loss before the first step of training.
- auroc: how well -A_t finds the first wrong token (advantage.py), and its 95 % interval.
"""
import math

import numpy as np
import torch

from sd import losses
from sd.advantage import analyse_rollouts, found, sample_rollouts
from sd.conditions import completion_hidden, feedback, open_critic
from sd.config import Config
from sd.controls import restrict
from sd.llm.checkpoint import load
from sd.llm.model import Transformer
from sd.llm.sampling import uniforms
from sd.llm.tokenizer import Tokenizer
from sd.problems import EMBEDDED, Problem
from sd.rollouts import Rollout, roll
from sd.run.figure import Panel, panels
from sd.study.ledger import Arms, Lines
from sd.task.symbolic import SymbolicCritic

SAMPLES = 4         # rollouts per problem
DRAWS = 10_000      # of the bootstrap over contexts
Known = dict[str, dict[str, float]]     # an arm's name -> what is known of its context
COLOURS = {"critique": "orange", "ref": "blue"}
# A predictor -> its title, and the axis of the figure: from, to, scale, ticks.
PREDICTORS = {
    "lead": ("lead of the self-teacher, percent", -20, 100, float, (0, 50, 100)),
    "correct": ("KL on correct steps", 0.001, 3, math.log10, (0.001, 0.01, 0.1, 1)),
    "auroc": ("AUROC for the first wrong token", 0, 1, float, (0, 0.5, 1)),
}


def before(config: Config, problems: list[Problem]) -> dict[str, float]:
    """What is known of the context of `config` before training."""
    model, tokenizer = load(EMBEDDED)
    critic = open_critic(config, model, tokenizer, problems)
    rollouts = sample_rollouts(model, tokenizer, problems, SAMPLES, config, "before, student")
    contexts = {"truth": (Config("critique"), SymbolicCritic()), "shown": (config, critic)}
    rows = analyse_rollouts(model, model, tokenizer, rollouts, contexts, config)
    auroc = found(rows, [-row.advantage("shown") for row in rows])

    limit = model.config.max_position_embeddings - config.max_new_tokens
    feedback(config, rollouts, critic, tokenizer, limit)
    noise = uniforms(len(rollouts), config.max_new_tokens, config.seed, "before, teacher")
    taught = roll(
        model, tokenizer,
        [r.problem for r in rollouts],
        [r.teacher_prompt for r in rollouts],
        1, config, noise)
    alone = np.mean([r.reward for r in rollouts])
    shown = np.mean([r.reward for r in taught])
    return {
        "lead": 100 * float(shown - alone),
        **divergences(model, tokenizer, rollouts, config.temperature),
        "auroc": auroc["mean"],
        "low": auroc["low"],
        "high": auroc["high"],
    }


@torch.no_grad()
def divergences(model: Transformer, tokenizer: Tokenizer, rollouts: list[Rollout],
                temperature: float) -> dict[str, float]:
    """KL(teacher || student) in nats per token, on the correct steps and on the first wrong one."""
    truth = SymbolicCritic()
    total = {"correct": 0.0, "wrong": 0.0}
    tokens = {"correct": 0.0, "wrong": 0.0}
    for rollout in rollouts:
        rollout.critique = truth(rollout)           # whatever the context said
        logprobs = []
        for prompt in (rollout.prompt, rollout.teacher_prompt):
            hidden = completion_hidden(model, [prompt], [rollout.completion])
            logprobs.append(losses.log_probs(model.lm_head(hidden), temperature))       # (T, V)
        divergence = losses.forward_kl(*logprobs).numpy()                               # (T)
        for part in total:
            restrict(rollout, part, tokenizer)
            total[part] += float(divergence @ np.array(rollout.weights))
            tokens[part] += sum(rollout.weights)
    return {part: total[part] / tokens[part] for part in total}


def gain_of(lines: Lines) -> float:
    """By how much validation Avg has risen at the end, mean over the runs."""
    ends = [(line["curve"][0]["avg"], line["curve"][-1]["avg"]) for line in lines]
    return float(np.diff(ends).mean())


def length_of(lines: Lines) -> float:
    """Mean length in tokens of the rollouts since the last evaluation but one."""
    lengths = []
    for line in lines:
        earlier, last = line["curve"][-2:]
        sampled = last["rollouts"] - earlier["rollouts"]
        lengths.append((last["tokens"] - earlier["tokens"]) / sampled)
    return float(np.mean(lengths))


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's, of two columns (A); equal values share their mean rank."""
    ranks = []
    for values in (x, y):
        below = values[:, None] > values                                                # (A, A)
        level = values[:, None] == values
        ranks.append(below.sum(1) + level.sum(1) / 2)
    with np.errstate(invalid="ignore"):             # NaN if a column is constant
        return float(np.corrcoef(*ranks)[0, 1])


def gap_table(known: Known, arms: Arms) -> str:
    """Each context's predictors and gain, in Markdown; then how well they go together."""
    out = ["| context | lead, % | KL on correct steps | on the wrong step | AUROC | gain in Avg@4 "
           "| length at the end |", "|---|---|---|---|---|---|---|"]
    gain = np.array([gain_of(arms[name]) for name in known])                            # (A)
    for (name, m), gained in zip(known.items(), gain):
        out.append(f"| {name} | {m['lead']:+.1f} | {m['correct']:.4f} | {m['wrong']:.3f} | "
                   f"{m['auroc']:.2f} [{m['low']:.2f}, {m['high']:.2f}] | {gained:+.1f} | "
                   f"{length_of(arms[name]):.0f} |")
    drawn = np.random.default_rng(0).integers(0, len(gain), (DRAWS, len(gain)))
    out.append(f"\nSpearman's rank correlation with the gain, over {len(gain)} contexts:\n")
    for column, (title, *_) in PREDICTORS.items():
        x = np.array([m[column] for m in known.values()])
        low, high = np.nanquantile([rank_correlation(x[i], gain[i]) for i in drawn],
                                   [0.025, 0.975])
        out.append(f"- {title}: {rank_correlation(x, gain):+.2f} ({low:+.2f} to {high:+.2f}); a "
                   f"straight line explains {np.corrcoef(x, gain)[0, 1] ** 2:.0%} of the variance")
    return "\n".join(out) + "\n"


def figure(known: Known, arms: Arms) -> str:
    """Gain against each predictor, a point per context, an SVG."""
    row = []
    for column, (title, low, high, scale, ticks) in PREDICTORS.items():
        dots = []
        for name, m in known.items():
            at = max(m[column], low)
            dots.append((COLOURS[name.split()[0]], (at, gain_of(arms[name]))))
        row.append(Panel(title, low, high, ticks, [], dots, scale=scale))
    return panels("Gain in validation Avg@4 after training, a point for each context", COLOURS,
                  [row], 200, 260, lowest=-20)
