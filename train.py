"""Trains a solver in one of three conditions that differ in feedback alone (Kara & Ersoy, arXiv 2606.11173).

    python train.py --cond ref

Read `train` top to bottom: sample, feedback, loss, step, log. It writes a run folder:
    config.json  metrics.jsonl (a line a step)  rollouts.jsonl (samples)  best/ (by validation)  last/
"""
import json
import math
import random
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

from sd import UserError
from sd.answers import equal, final_answer
from sd.checkpoint import EMBEDDED, load, save_model, write_atomic
from sd.conditions import Teacher, accumulate, feedback
from sd.config import Config, parse_config
from sd.critic import SymbolicCritic
from sd.metrics import evaluate
from sd.problems import Problem, embedded
from sd.sampling import sample, uniforms

LOGGED = 4      # rollouts per step that go to rollouts.jsonl


def data_order(config: Config, count: int) -> list[int]:
    """The order of the training problems over all epochs: a new shuffle each, one stream across their borders."""
    rng = random.Random(f"{config.seed} order")
    return [i for _ in range(config.epochs) for i in rng.sample(range(count), count)]


def train(config: Config, run: "RunFolder") -> None:
    student, tokenizer, _ = load(config.model or EMBEDDED)
    teacher = Teacher(config.teacher, student, config.ema_decay)
    critic = SymbolicCritic(config.quoting)
    problems, validation = embedded("train"), embedded("val")
    optimizer = torch.optim.AdamW(student.parameters(), lr=config.lr, weight_decay=0.0)
    order = data_order(config, len(problems))
    steps = len(order) // config.batch
    steps = min(config.steps, steps) if config.steps else steps
    if steps == 0:
        raise UserError(f"--batch {config.batch} is more than all epochs hold ({len(order)} problems); lower it")
    run.begin(student, steps)

    for step in range(steps + 1):
        if step % config.eval_every == 0 or step == steps:
            run.evaluated(step, student, evaluate(student, tokenizer, validation, config.eval_samples,
                                                  config.temperature, config.max_new_tokens, config.seed))
        if step == steps:
            break

        # 1. sample: the student answers, alone
        batch = [problems[i] for i in order[step * config.batch:(step + 1) * config.batch]]
        prompts = [tokenizer.student_prompt(p.problem) for p in batch]
        group = config.rollouts_per_problem
        rollouts = sample(student, prompts, tokenizer.eos, config.max_new_tokens, config.temperature, group,
                          uniforms(len(prompts) * group, config.max_new_tokens, config.seed, "rollouts", step))

        if not torch.isfinite(rollouts.logprobs).all():     # grpo's loss would be 0: nothing is right, so no gradient
            raise FloatingPointError(f"step {step + 1}: the solver's probabilities are not finite; nothing was updated. "
                                     "Lower --lr, or look at the weights of --model")

        # 2. feedback: the one place where the conditions differ
        owners = [p for p in batch for _ in range(group)]
        completions, truncated = rollouts.completions(), rollouts.truncated.tolist()
        texts = [tokenizer.decode(c) for c in completions]
        rewards = [float(equal(final_answer(text, cut), p.answer)) for text, cut, p in zip(texts, truncated, owners)]
        told = feedback(config.cond, owners, texts, truncated, rewards, group, critic, tokenizer)

        # 3. loss: the student against its self-teacher on the student's own tokens, or GRPO's policy gradient
        optimizer.zero_grad()
        prompts = [prompt for prompt in prompts for _ in range(group)]
        loss = accumulate(student, teacher, prompts, completions, told, config)
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), config.clip)
        if not math.isfinite(loss) or not torch.isfinite(norm):
            raise FloatingPointError(f"step {step + 1}: the loss is {loss} and its gradient norm {norm:.3g}; nothing was "
                                     f"updated. Lower --lr, or look at {run.path}/rollouts.jsonl")

        # 4. step
        optimizer.step()
        teacher.update(student)

        # 5. log
        run.stepped(step + 1, {
            "loss": loss, "reward": sum(rewards) / len(rewards),
            "entropy": -rollouts.logprobs.sum().item() / sum(map(len, completions)),   # unbiased: mean -log p(y_t)
            "length": sum(map(len, completions)) / len(completions), "truncated": sum(truncated) / len(truncated),
            "grad_norm": norm.item(), "rollouts": (step + 1) * len(completions)},
            [{"id": p.id, "problem": p.problem, "trace": text, "reward": reward,
              **({"critique": told.critiques[i].text, "case": told.critiques[i].case} if told.critiques else {})}
             for i, (p, text, reward) in enumerate(zip(owners[:LOGGED], texts, rewards))])


class RunFolder:
    """Everything a run writes and prints."""

    def __init__(self, config: Config):
        name = f"runs/{config.cond}-seed{config.seed}"
        taken = (n for n in range(2, 10_000) if not Path(f"{name}-{n}").exists())
        self.path = Path(config.out or (f"{name}-{next(taken)}" if Path(name).exists() else name))
        if self.path.exists():
            raise UserError(f"--out {self.path} exists already; choose another folder, nothing was changed")
        self.config = replace(config, out=str(self.path))
        self.source = Path(config.model or EMBEDDED)
        self.best, self.done, self.student, self.start = -1.0, 0, None, time.time()

    def begin(self, student, steps: int) -> None:
        """Called when everything that the user can get wrong has been read; creates the folder."""
        self.student, self.steps = student, steps
        write_atomic(self.path / "config.json", json.dumps(asdict(self.config), indent=1) + "\n")
        print(f"{self.config.cond}: {steps} steps of {self.config.batch} problems x "
              f"{self.config.rollouts_per_problem} rollouts, to {self.path}", flush=True)

    def stepped(self, step: int, numbers: dict, samples: list[dict]) -> None:
        self.done, seconds = step, time.time() - self.start
        self._append("metrics.jsonl", {"step": step, **numbers, "seconds": round(seconds, 2)})
        for row in samples:
            self._append("rollouts.jsonl", {"step": step, **row})
        n = numbers
        print(f"step {step:4d}/{self.steps}  loss {n['loss']:8.4f}  reward {n['reward']:5.3f}  entropy {n['entropy']:.3f}  "
              f"length {n['length']:5.1f}  truncated {n['truncated']:5.1%}  rollouts {n['rollouts']:6d}  "
              f"{seconds:6.1f} s, {seconds / step * (self.steps - step):5.1f} s left", flush=True)

    def evaluated(self, step: int, student, scores) -> None:
        avg, better = 100 * scores.avg.mean(), scores.avg.mean() > self.best
        k = self.config.eval_samples
        self._append("metrics.jsonl", {"step": step, f"val_avg@{k}": avg, "val_length": scores.lengths.mean(),
                                       "val_truncated": scores.truncated.mean(),
                                       "seconds": round(time.time() - self.start, 2)})
        if better:
            self.best = scores.avg.mean()
            save_model(self.path / "best", student, self.source, step=step, val_avg=avg)
        print(f"step {step:4d}/{self.steps}  validation Avg@{k} {avg:5.2f}{'  best so far' if better else ''}", flush=True)

    def close(self) -> None:
        if self.student is not None:
            save_model(self.path / "last", self.student, self.source, step=self.done)

    def _append(self, name: str, row: dict) -> None:
        try:
            with open(self.path / name, "a") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise UserError(f"{self.path / name}: cannot be written ({error.strerror}); free the space and run again") \
                from None


def main() -> int:
    run, status, message = None, 0, ""
    try:
        config = parse_config(__doc__.split("\n")[0])
        run = RunFolder(config)
        train(config, run)
        message = (f"done. best validation Avg@{config.eval_samples} {100 * run.best:.2f}; now on the test problems:\n"
                   f"  python eval.py {run.path}/best")
    except UserError as error:
        status, message = 2, f"train.py: {error}"
    except FloatingPointError as error:
        status, message = 1, f"train.py: {error}"
    except KeyboardInterrupt:
        kept = f"; kept what there is in {run.path}" if run and run.student is not None else ""
        status, message = 130, f"\nstopped after step {run.done if run else 0}{kept}"
    try:
        if run is not None:
            run.close()
    except UserError as error:
        if status != 2:                     # else the first failed write has been told
            message += f"\ntrain.py: {error}"
        status = status or 2
    print(message, file=sys.stderr if status else sys.stdout)
    return status


if __name__ == "__main__":
    sys.exit(main())
