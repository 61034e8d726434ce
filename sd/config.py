"""Every option of a training run, in one dataclass: the command line comes from it, and it is saved with the run."""
import argparse
from dataclasses import dataclass, field, fields

from sd import UserError
from sd.critic import QUOTING
from sd.losses import DIVERGENCES


def option(default, help: str, choices=None):
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class Config:
    cond: str = option("", "what the self-teacher sees: nothing (grpo, a binary reward instead), a reference solution "
                           "(ref), a critique of this rollout (critique)", ("grpo", "ref", "critique"))
    seed: int = option(0, "seed of the data order and of all sampling")
    out: str = option("", "run folder; must not exist yet (default: runs/COND-seedSEED, numbered if taken)")
    model: str = option("", "checkpoint folder of the solver (default: the embedded solver)")
    # the method
    divergence: str = option("forward", "KL(teacher||student), KL(student||teacher), JSD(beta), or the sampled token's "
                                        "policy gradient", tuple(DIVERGENCES))
    beta: float = option(0.5, "weight of the teacher in JSD, between 0 and 1")
    teacher: str = option("base", "the self-teacher's weights: initial, moving average, the student's own",
                          ("base", "ema", "live"))
    ema_decay: float = option(0.95, "decay per step of the ema teacher")
    quoting: str = option("partial", "how a critique quotes the rollout's steps", QUOTING)
    group: int = option(8, "rollouts per problem for grpo (self-distillation uses one)")
    temperature: float = option(1.1, "of the rollouts, and of both distributions in the loss")
    max_new_tokens: int = option(80, "tokens a rollout may have")
    # the optimisation
    lr: float = option(4e-4, "AdamW's learning rate, constant")
    batch: int = option(32, "problems per step")
    epochs: int = option(7, "passes over the training problems")
    steps: int = option(0, "stop after so many steps (0: after the epochs)")
    clip: float = option(1.0, "largest gradient norm")
    micro_batch: int = option(64, "rollouts scored at once; changes memory, not the result")
    # the evaluation on validation problems, which chooses best/
    eval_every: int = option(10, "steps between evaluations")
    eval_samples: int = option(4, "rollouts per validation problem")

    @property
    def rollouts_per_problem(self) -> int:
        return self.group if self.cond == "grpo" else 1

    def check(self) -> None:
        """Raises UserError naming the flag whose value makes no sense."""
        for name in ("temperature", "max_new_tokens", "lr", "batch", "epochs", "clip", "micro_batch", "eval_every",
                     "eval_samples"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(f"--{name.replace('_', '-')} must be above 0, not {getattr(self, name)}")
        if self.steps < 0:
            raise UserError(f"--steps must be 0 or more, not {self.steps}")
        if self.divergence == "jsd" and not 0 < self.beta < 1:
            raise UserError("--beta must be between 0 and 1; its ends are --divergence reverse and forward")
        if not 0 <= self.ema_decay <= 1:
            raise UserError(f"--ema-decay must be between 0 and 1, not {self.ema_decay}")
        if self.group < 2:
            raise UserError("--group must be 2 or more: one rollout has no group to compare with")


def parse_config(description: str, argv: list[str] | None = None) -> Config:
    """The command line -> Config; argparse exits with status 2 on an unknown option or choice."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    for f in fields(Config):
        shown = f.metadata["help"] + ("" if f.default == "" else f" (default: {f.default})")
        parser.add_argument("--" + f.name.replace("_", "-"), type=f.type, default=f.default, help=shown,
                            choices=f.metadata["choices"], required=f.name == "cond")
    config = Config(**vars(parser.parse_args(argv)))
    config.check()
    return config
