"""Trains a solver in one of three conditions that differ in feedback alone (arXiv 2606.11173).

    python train.py --cond ref
    python train.py --preset paper --cond critique --model Qwen3-1.7B --data TRAIN --val VAL
    torchrun --nproc-per-node 2 train.py --cond grpo      rollouts split over processes
    python train.py --resume runs/ref-seed0               goes on where that run stopped

Read `train` top to bottom: sample, feedback, loss, step, log.
"""
import argparse
import math
import random
import shlex
import signal
import sys
from pathlib import Path

import torch

from sd import UserError, command
from sd.conditions import Teacher, accumulate, feedback, open_critic
from sd.config import Config, parse_config
from sd.critic import Critic
from sd.llm.checkpoint import load
from sd.llm.lora import add_lora
from sd.llm.model import Transformer
from sd.llm.sampling import uniforms
from sd.llm.tokenizer import Tokenizer
from sd.metrics import evaluate
from sd.problems import EMBEDDED, Problem, check_lengths, check_solutions, embedded, read_problems
from sd.prompts import student_prompt, teacher_prompt
from sd.rollouts import roll
from sd.run.ranks import Ranks
from sd.run.runs import RunFolder
from sd.run.stop import Stopped, StopRequest

LOGGED = 4      # rollouts per step that go to rollouts.jsonl


def train(config: Config, run: RunFolder, ranks: Ranks) -> None:
    """The whole method. Raises Stopped, with everything saved, if the user asked for it."""
    student, tokenizer = open_student(config)
    limit = student.config.max_position_embeddings - config.max_new_tokens      # tokens of a prompt
    problems, validation = read_data(config, tokenizer, limit)
    teacher, critic = open_feedback(config, student, tokenizer, problems)
    parameters = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=0.0)
    order = data_order(config, len(problems))
    steps = count_steps(config, len(order), len(validation), ranks)
    group, share = config.rollouts_per_problem, ranks.share(config.batch)
    begin = run.begin(student, tokenizer, optimizer, teacher, steps, problems + validation)
    if tokenizer.chat_model and not config.data:
        run.say("note: without --data, this chat model trains on the embedded problems, such as "
                f"{problems[0].problem}; --preset paper has the options for one")

    with StopRequest() as stop:
        for step in range(begin, steps + 1):
            if ranks.total(stop.number):
                break
            if (step % config.eval_every == 0 or step == steps) and run.evaluated_at != step:
                scores = evaluate(student, tokenizer, validation, config.eval_samples, config,
                                  ranks=ranks)
                run.evaluated(step, scores)
            if step == steps:
                break

            # 1. sample: the student answers alone; each rank takes its share of the batch
            indices = order[step * config.batch:(step + 1) * config.batch][share]
            batch = [problems[i] for i in indices]
            prompts = [student_prompt(tokenizer, p.problem) for p in batch]
            noise = uniforms(config.batch * group, config.max_new_tokens, config.seed, "rollouts",
                             step)[share.start * group:share.stop * group]
            rollouts = roll(student, tokenizer, batch, prompts, group, config, noise)

            # 2. feedback: what the condition tells of these rollouts
            feedback(config, rollouts, critic, tokenizer, limit)

            # 3. loss: the student against its self-teacher on the student's own tokens, or GRPO's
            tokens = ranks.total(sum(len(r.completion) for r in rollouts if r.in_normaliser))
            loss = ranks.total(accumulate(student, teacher, rollouts, config, tokens))
            ranks.sum_gradients(parameters)
            norm = torch.nn.utils.clip_grad_norm_(parameters, config.clip).item()
            rows = ranks.gather([r.row() for r in rollouts])
            rows.sort(key=lambda row: row["id"])        # so the same problems are logged again
            run.log_rollouts(step + 1, rows[:LOGGED])
            refuse_nonsense(run, step + 1, loss, norm, rows)

            # 4. step
            optimizer.step()
            optimizer.zero_grad()           # now: frees the gradients before the next step samples
            if teacher is not None:
                teacher.update(student)

            # 5. log
            run.stepped(step + 1, {"loss": loss, **averages(rows), "grad_norm": norm,
                                   "rollouts": (step + 1) * len(rows)})
        run.close()
    if run.evaluated_at != steps:
        raise Stopped(stop.number or signal.SIGTERM)        # or another process was told


def open_student(config: Config) -> tuple[Transformer, Tokenizer]:
    """The model to train, with its adapter if it has one, and its tokenizer."""
    student, tokenizer = load(config.model or EMBEDDED, config.torch_dtype, config.torch_device)
    if config.lora_rank:
        alpha = config.lora_alpha or 2.0 * config.lora_rank
        add_lora(student, config.lora_rank, alpha, config.seed)
    student.recompute = config.recompute
    return student, tokenizer


def open_feedback(config: Config, student: Transformer, tokenizer: Tokenizer,
                  problems: list[Problem]) -> tuple[Teacher | None, Critic | None]:
    """The self-teacher and the critic that the condition needs, made of the initial policy.

    So this comes before a resumed run's weights are loaded into the student.
    """
    teacher = critic = None
    if config.cond != "grpo":
        teacher = Teacher(config.teacher, student, config.ema_decay)
    if config.cond == "critique":
        policy = teacher.model if config.teacher == "base" else student
        critic = open_critic(config, policy, tokenizer, problems)
    return teacher, critic


def read_data(config: Config, tokenizer: Tokenizer,
              limit: int) -> tuple[list[Problem], list[Problem]]:
    """Training and validation problems.

    Raises UserError if they overlap, if `ref` lacks a solution, or if the student's prompt or the
    self-teacher's with an empty context has more than `limit` tokens.
    """
    problems = read_problems(Path(config.data)) if config.data else embedded("train")
    validation = read_problems(Path(config.val)) if config.val else embedded("val")
    both = {p.problem for p in problems} & {p.problem for p in validation}
    if both:
        raise UserError(f"{len(both)} problems are in both --data and --val, such as "
                        f"{ascii(min(both)[:60])}; remove them from one: --val must choose the "
                        "checkpoint by problems that it was not trained on")
    every = problems + validation
    check_lengths(every, [student_prompt(tokenizer, p.problem) for p in every], limit)
    if config.cond != "grpo":
        bare = [teacher_prompt(tokenizer, p.problem, config.cond, "") for p in problems]
        check_lengths(problems, bare, limit)
    if config.cond == "ref":
        check_solutions(problems, "--cond ref")
    return problems, validation


def data_order(config: Config, count: int) -> list[int]:
    """The training problems' order over all epochs, as one stream: each epoch is a new shuffle."""
    rng, order = random.Random(f"{config.seed} order"), []
    for _ in range(config.epochs):
        order += rng.sample(range(count), count)
    return order


def count_steps(config: Config, stream: int, validation: int, ranks: Ranks) -> int:
    """Optimiser steps of the run. Raises UserError if a batch or a rank would be left empty."""
    steps = stream // config.batch
    if steps == 0:
        raise UserError(f"--batch {config.batch} is more than the {stream} problems of all epochs")
    if ranks.world > min(config.batch, validation):
        raise UserError(f"{ranks.world} processes are more than --batch or the problems in --val")
    return min(config.steps or steps, steps)


def refuse_nonsense(run: RunFolder, step: int, loss: float, norm: float, rows: list[dict]) -> None:
    """Nothing is learned from a loss that is not finite, or from a critic that cannot be used.

    Raises FloatingPointError for the one and, at the third step in a row without one usable
    critique, UserError for the other, before the step is taken. A resumed run counts on.
    """
    if not math.isfinite(loss) or not math.isfinite(norm):
        raise FloatingPointError(
            f"step {step}: the loss is {loss} and its gradient norm {norm:.3g}; nothing was "
            "updated. Begin again with a lower --lr, or look at the run's rollouts.jsonl")
    reasons = [row.get("malformed") for row in rows]
    run.useless_steps = run.useless_steps + 1 if all(reasons) else 0
    if run.useless_steps > 2:
        raise UserError(
            f"step {step}: in three steps all critiques were malformed, now because: {reasons[0]}; "
            "look at the run's rollouts.jsonl, then repair the critic and resume, or begin again "
            "with more --critic-tokens or another --critic")


def averages(rows: list[dict]) -> dict:
    """What the log says of a batch of rollouts, from all ranks."""
    def mean(key: str) -> float:
        return sum(row[key] for row in rows) / len(rows)

    numbers = {"reward": mean("reward"), "length": mean("tokens"), "truncated": mean("truncated"),
               "entropy": mean("nats") / mean("tokens"), "signal": mean("signal")}
    for name, key in (("critique_malformed", "malformed"), ("context_shortened", "shortened")):
        if key in rows[0]:
            numbers[name] = sum(bool(row[key]) for row in rows)
    return numbers


@command("train.py", __doc__)
def main(parser: argparse.ArgumentParser) -> None:
    config, args = parse_config(parser)
    ranks = Ranks(config.torch_device)
    with RunFolder(config, ranks, args.resume) as run:
        if config.cond == "critique" and "://" in config.critic:
            run.say(f"the critic, which gets OPENAI_API_KEY if it is set: {config.critic}")
        train(config, run, ranks)
        best = (run.path or Path()) / "best"            # only rank 0 has the folder
        test = (f"python eval.py {shlex.quote(best.as_posix())} "
                f"--temperature {config.temperature} --max-new-tokens {config.max_new_tokens}")
        if config.data:
            test += " --test TEST.jsonl"
        run.say(f"done. best validation Avg@{config.eval_samples} {100 * run.best:.2f}, "
                f"at step {run.best_at}; curves: {run.path}/report.html\n"
                f"now on the test problems:\n  {test}")
    ranks.close()


if __name__ == "__main__":
    sys.exit(main())
