"""Trains a solver in one of three conditions that differ in feedback alone (Kara & Ersoy, arXiv 2606.11173).

    python train.py --cond ref
    python train.py --preset paper --cond critique --model Qwen3-1.7B --data train.jsonl --val val.jsonl
    torchrun --nproc-per-node 2 train.py --cond grpo      rollouts split over processes
    python train.py --resume runs/ref-seed0               goes on where that run stopped, to the same numbers

Read `train` top to bottom: sample, feedback, loss, step, log.
"""
import math
import os
import random
import shlex
import sys
from contextlib import suppress
from pathlib import Path

import torch

from sd import UserError, out_of_memory
from sd.answers import equal, final_answer
from sd.llm.checkpoint import load
from sd.conditions import Teacher, accumulate, feedback, initial_policy
from sd.config import Config, parse_config
from sd.critic import Critic
from sd.task.symbolic import SymbolicCritic
from sd.llm.lora import add_lora
from sd.metrics import evaluate
from sd.run.plan import plan
from sd.problems import EMBEDDED, Problem, check_lengths, embedded, read_problems
from sd.run.ranks import Lost, Ranks
from sd.run.runs import RunFolder, Signals, Stop
from sd.llm.sampling import sample_in_parts, uniforms
from sd.scribe import language_critic
from sd.llm.tokenizer import Tokenizer

LOGGED = 4      # rollouts per step that go to rollouts.jsonl


def data_order(config: Config, count: int) -> list[int]:
    """The training problems' order over all epochs: a new shuffle each, one stream across their borders."""
    rng = random.Random(f"{config.seed} order")
    return [i for _ in range(config.epochs) for i in rng.sample(range(count), count)]


def read_data(config: Config, tokenizer: Tokenizer, limit: int) -> tuple[list[Problem], list[Problem]]:
    """Training and validation problems. Raises UserError if a prompt is too long or `ref` lacks solutions.

    `limit`: tokens a prompt may have, the self-teacher's too, which then has no context left.
    """
    if limit < 1:
        raise UserError(f"--max-new-tokens {config.max_new_tokens} leaves the model no position "
                        "for a prompt; lower it")
    problems = read_problems(Path(config.data)) if config.data else embedded("train")
    validation = read_problems(Path(config.val)) if config.val else embedded("val")
    if both := {p.problem for p in problems} & {p.problem for p in validation}:
        raise UserError(f"{len(both)} problems are in both --data and --val, the first is "
                        f"{ascii(min(both)[:60])}; remove them from one: --val must choose the checkpoint by "
                        "problems that it was not trained on")
    every = problems + validation
    check_lengths(every, [tokenizer.student_prompt(p.problem) for p in every], limit)
    if config.cond != "grpo":
        prompts = [tokenizer.teacher_prompt(p.problem, config.cond, "") for p in problems]
        check_lengths(problems, prompts, limit)
    if config.cond == "ref" and (without := sum(not p.solution for p in problems)):
        raise UserError(f"--cond ref: {without} of {len(problems)} problems in --data have "
                        "no solution to show")
    return problems, validation


def open_critic(config: Config, student, teacher: Teacher, tokenizer: Tokenizer,
                problems: list[Problem]) -> Critic | None:
    """The frozen critic; `self`, the initial policy, shares what it can with student and self-teacher."""
    if config.cond != "critique":
        return None
    if config.critic == "symbolic":
        critic = SymbolicCritic(config.quoting, config.critic_noise)
        critic.batch(problems, [""] * len(problems), [False] * len(problems))  # tells now what it cannot read
        return critic
    policy = student
    if config.critic == "self":
        policy = teacher.model if config.teacher == "base" else initial_policy(student)
    return language_critic(config.critic, policy, tokenizer, config.critic_tokens, config.critic_slots,
                           config.compile)


def train(config: Config, run: RunFolder, ranks: Ranks, signals: Signals) -> None:
    student, tokenizer = load(config.model or EMBEDDED, config.torch_dtype, ranks.device)
    if config.lora_rank:
        add_lora(student, config.lora_rank, config.lora_alpha or 2.0 * config.lora_rank, config.seed)
    student.recompute = config.recompute
    # grpo asks no teacher; "live" copies nothing
    teacher = Teacher("live" if config.cond == "grpo" else config.teacher, student, config.ema_decay)
    limit = student.config.max_position_embeddings - config.max_new_tokens      # tokens a prompt may have
    problems, validation = read_data(config, tokenizer, limit)
    critic = open_critic(config, student, teacher, tokenizer, problems)
    parameters = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=0.0)
    order = data_order(config, len(problems))
    steps = len(order) // config.batch
    steps = min(config.steps, steps) if config.steps else steps
    if steps == 0 or config.batch < ranks.world:
        raise UserError(f"--batch {config.batch} must be between the number of processes ({ranks.world}) and "
                        f"the problems of all epochs ({len(order)})")
    if len(validation) < ranks.world:
        raise UserError(f"--val holds {len(validation)} problems, fewer than the {ranks.world} processes; "
                        "start fewer")
    begin = run.begin(student, optimizer, teacher, steps, problems + validation)
    group = config.rollouts_per_problem
    if tokenizer.chat_model and not config.data:
        run.say("note: without --data, this chat model trains on the embedded problems, such as "
                f"{problems[0].problem}; --preset paper has the options for one")

    for step in range(begin, steps + 1):
        if (step % config.eval_every == 0 or step == steps) and run.evaluated_at != step:
            scores = evaluate(student, tokenizer, validation, config.eval_samples, config.temperature,
                              config.max_new_tokens, config.seed, rows=config.sample_batch, ranks=ranks,
                              compile=config.compile)
            with signals.shielded():
                run.evaluated(step, scores)
        if step == steps:
            break

        # 1. sample: the student answers, alone; each rank its share of the batch
        share = ranks.share(config.batch)
        batch = [problems[i] for i in order[step * config.batch:(step + 1) * config.batch][share]]
        prompts = [tokenizer.student_prompt(p.problem) for p in batch]
        noise = uniforms(config.batch * group, config.max_new_tokens, config.seed, "rollouts", step)
        rollouts = sample_in_parts(student, prompts, tokenizer.eos, config.max_new_tokens, config.temperature,
                                   group, noise[share.start * group:share.stop * group], config.sample_batch,
                                   config.compile)
        # not left to the loss: grpo's would be 0, as nothing is right
        if ranks.total(float(not torch.isfinite(rollouts.logprobs).all())):
            raise FloatingPointError(f"step {step + 1}: the solver's probabilities are not finite; "
                                     "nothing was updated. Lower --lr, or look at the weights of --model")

        # 2. feedback: what the condition tells of these rollouts
        owners = [p for p in batch for _ in range(group)]
        completions, truncated = rollouts.completions(), rollouts.truncated.tolist()
        texts = [tokenizer.decode(c) for c in completions]
        rewards = [float(equal(final_answer(text, cut), p.answer))
                   for text, cut, p in zip(texts, truncated, owners)]
        told = feedback(config.cond, owners, texts, truncated, rewards, group, critic, tokenizer, limit)
        malformed = [c.malformed for c in told.critiques or []]

        # 3. loss: the student against its self-teacher on the student's own tokens, or GRPO's policy gradient
        prompts = [prompt for prompt in prompts for _ in range(group)]
        tokens = ranks.total(sum(len(c) for i, c in enumerate(completions) if told.counts(i)))
        loss = ranks.total(accumulate(student, teacher, prompts, completions, told, config, tokens))
        ranks.sum_gradients(parameters)
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.clip)
        if not math.isfinite(loss) or not torch.isfinite(norm):
            raise FloatingPointError(f"step {step + 1}: the loss is {loss} and its gradient norm {norm:.3g}; "
                                     f"nothing was updated. Lower --lr, or look at {run.path}/rollouts.jsonl")

        # what will be logged, from all ranks, while nothing has changed yet
        rows = ranks.gather([{"id": p.id, "problem": p.problem, "trace": text, "reward": reward,
                              "tokens": len(c), "cut": cut,
                              **({"critique": told.critiques[i].text, "case": told.critiques[i].case,
                                  "malformed": malformed[i]} if malformed else {})}
                             for i, (p, text, reward, c, cut) in
                             enumerate(zip(owners, texts, rewards, completions, truncated))])
        if step == 0 and len(rows) >= 8 and malformed and all(row["malformed"] for row in rows):
            raise UserError(f"step 1: all {len(rows)} critiques are malformed, the first one: "
                            f"{rows[0]['malformed']}; nothing was updated. "
                            "Raise --critic-tokens or choose another --critic")
        mean = lambda key: sum(row[key] for row in rows) / len(rows)
        surprise, shortened = ranks.total(-rollouts.logprobs.sum().item()), ranks.total(told.shortened)

        # 4. step, 5. log: both or neither, should Ctrl-C come now
        with signals.shielded():
            optimizer.step()
            optimizer.zero_grad()           # now: frees the gradients before the next step samples
            teacher.update(student)
            run.stepped(step + 1, {
                "loss": loss, "reward": mean("reward"), "length": mean("tokens"), "truncated": mean("cut"),
                "entropy": surprise / sum(row["tokens"] for row in rows),       # the mean of -log p(y_t)
                "grad_norm": norm.item(), "rollouts": (step + 1) * len(rows),
                **({"critique_malformed": sum(bool(row["malformed"]) for row in rows)} if malformed else {}),
                **({"context_shortened": int(shortened)} if told.teacher_prompts is not None else {})
            }, rows[:LOGGED])


def main() -> int:
    signals = Signals()
    try:
        return guarded(signals)
    finally:
        signals.restore()


def guarded(signals: Signals) -> int:
    """Trains; however it ends, keeps what there is and says how in one sentence. Returns the exit status."""
    run, ranks, status, message = None, None, 0, ""
    try:
        config, args = parse_config(__doc__)
        if args.plan is not None:
            with suppress(BrokenPipeError):             # `… --plan | head`
                print(plan(config, args.plan), flush=True)
            return 0
        ranks = Ranks(config.torch_device)
        run = RunFolder(config, ranks, args.resume)
        train(config, run, ranks, signals)
        rows = max(1, config.sample_batch * config.torch_dtype.itemsize // 4)   # best/ is in float32
        message = (f"done. best validation Avg@{config.eval_samples} {100 * run.best:.2f}, at step "
                   f"{run.best_at}{'' if run.best_at else ', before training'}; "
                   f"curves: {run.path}/report.html\n"
                   f"now on the test problems:\n  python eval.py {shlex.quote(f'{run.path}/best')}" +
                   (f" --test TEST.jsonl --max-new-tokens {config.max_new_tokens} --temperature "
                    f"{config.temperature} --sample-batch {rows}" if config.data else ""))
    except UserError as error:
        status, message = 2, f"train.py: {error}"
    except FloatingPointError as error:
        status, message = 1, f"train.py: {error}"
    except Lost as error:
        status, message = 1, f"train.py: {error}; {run.go_on}" if run else ""
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        status = 1
        message = (f"train.py: out of memory after step {run.done if run else 0} ({str(error)[:200]!r}). "
                   f"--plan says:\n{plan(config)}\n" +
                   (f"then {run.go_on} "
                    f"--micro-batch {max(1, config.micro_batch // 2)} "
                    f"--sample-batch {max(1, config.sample_batch // 2)}" if run else ""))
    except Stop as stop:
        status, message = 128 + stop.number, f"stopped after step {run.done if run else 0}"
        if run and run.student is not None:
            message += f"; {run.go_on}"
    try:
        if run is not None:
            with signals.shielded():
                run.close()
    except (UserError, Stop) as error:
        if isinstance(error, UserError) and status != 2:        # else the first failed write has been told
            message += f"\ntrain.py: {error}"
        status = status or (2 if isinstance(error, UserError) else 128 + error.number)
    if ranks is not None and status == 0:
        ranks.close()
    first = os.environ.get("RANK", "0") == "0"
    if message and (ranks.first_to_tell(message) if ranks and status in (1, 2) else first):
        print(message, file=sys.stderr if status else sys.stdout)
    return status


if __name__ == "__main__":
    sys.exit(main())
