"""Every option of a training run, in one dataclass: the command line comes from it, and each run saves it."""
import argparse
import json
import os
import re
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch

from sd import UserError
from sd.llm.compile import check_compile
from sd.critic import QUOTING
from sd.losses import DIVERGENCES
from sd.scribe import check_url
from sd.llm.tokenizer import Tokenizer


# tokens assumed of a problem with its instruction, and of the critic's rules and example
PROMPT, SCRIBE = 256, 500
# These change no result but by rounding, which in bfloat16 may turn a rollout another way.
MACHINE = {"device", "micro_batch", "sample_batch", "recompute", "compile"}


def option(default, help: str, choices=None, group=""):
    """A field that is also an option; `group` begins a new one in --help."""
    return field(default=default, metadata={"help": help, "choices": choices, "group": group})


@dataclass(frozen=True)
class Config:
    cond: str = option("", "what the self-teacher sees: nothing (grpo, a binary reward instead), a reference "
                           "solution (ref), a critique of this rollout (critique)",
                       ("grpo", "ref", "critique"), group="run")
    seed: int = option(0, "seed of the data order, the adapter and all sampling")
    out: str = option("", "run folder; must not exist yet (default: runs/COND-seedSEED, numbered if taken)")
    model: str = option("", "checkpoint folder of the solver (default: the embedded solver)",
                        group="what is trained, on what")
    data: str = option("", "training problems, JSONL (default: the embedded ones)")
    val: str = option("", "validation problems, JSONL; they choose best/")
    critic: str = option("symbolic",
                         "symbolic (exact, embedded task only), self (the initial policy), a checkpoint "
                         "FOLDER, or the URL of an OpenAI-compatible server, URL#MODEL")
    critic_tokens: int = option(2048, "most tokens of a critique, thoughts included (not for symbolic)")
    divergence: str = option("forward", "forward KL(teacher||student), reverse KL(student||teacher), jsd "
                                        "(beta), or sampled: policy gradient on the sampled token",
                             tuple(DIVERGENCES), group="method")
    beta: float = option(0.5, "weight of the teacher in jsd, between 0 and 1")
    term_clamp: float = option(0.0, "cut each vocabulary term of the divergence off here; OPSD takes 0.05 "
                                    "(0: not at all)")
    teacher: str = option("base", "the self-teacher's weights: base (initial), ema (moving average), "
                                  "live (the student's own)", ("base", "ema", "live"))
    ema_decay: float = option(0.95, "decay per step of the ema teacher")
    quoting: str = option("partial", "how a symbolic critique quotes the rollout's steps", QUOTING)
    critic_noise: float = option(0.0, "share of the symbolic critic's corrections made wrong on purpose")
    group: int = option(8, "rollouts per problem for grpo (self-distillation uses one)")
    temperature: float = option(1.1, "of all rollouts, also in evaluations, and of the loss's distributions")
    max_new_tokens: int = option(80, "most tokens of a rollout")
    lr: float = option(4e-4, "AdamW's learning rate, constant", group="optimisation")
    batch: int = option(32, "problems per step")
    epochs: int = option(7, "passes over the training problems")
    steps: int = option(0, "stop after so many steps (0: after the epochs)")
    clip: float = option(1.0, "largest gradient norm")
    lora_rank: int = option(0, "rank of the LoRA adapter (0: train all weights)")
    lora_alpha: float = option(0.0, "the adapter is scaled by alpha / rank (0: alpha is twice the rank)")
    device: str = option("", "cpu or cuda (default: cuda if there is one)", group="memory and speed")
    dtype: str = option("float32", "of the weights; bfloat16 needs an adapter, which stays in float32",
                        ("float32", "bfloat16"))
    micro_batch: int = option(64, "rollouts scored at once")
    sample_batch: int = option(512, "rollouts sampled at once")
    recompute: bool = option(False, "recompute activations in the backward pass, for less memory")
    compile: bool = option(False, "compile the decode step and the loss: CUDA graphs, "
                                  "or C++ on a CPU (needs g++)")
    eval_every: int = option(10, "steps between evaluations",
                             group="evaluation on validation problems, which chooses best/")
    eval_samples: int = option(4, "rollouts per validation problem")
    keep: bool = option(False, "keep the checkpoint of every evaluation, as step-N/")

    @property
    def rollouts_per_problem(self) -> int:
        return self.group if self.cond == "grpo" else 1

    @property
    def critic_batch(self) -> int:
        """Critiques written at once; prompt, trace and thoughts make one about four rollouts long."""
        return max(1, self.sample_batch // 4)

    @property
    def critic_slots(self) -> int:
        """The tokens of these critiques and all that they read; longer prompts are answered fewer at once."""
        return self.critic_batch * (SCRIBE + PROMPT + 2 * self.max_new_tokens + self.critic_tokens)

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def torch_device(self) -> torch.device:
        return pick_device(self.device)

    def check(self) -> None:
        """Raises UserError naming the flag whose value makes no sense."""
        for f in fields(self):
            if (choices := f.metadata["choices"]) and getattr(self, f.name) not in choices:
                raise UserError(f"--{f.name.replace('_', '-')} must be one of {', '.join(choices)}")
        if not re.fullmatch(r"|cpu|cuda(:\d{1,3})?", self.device):
            raise UserError(f"--device must be cpu, cuda or cuda:N, not {self.device[:40]!r}")
        if not 0 <= self.seed < 2 ** 63:
            raise UserError(f"--seed must be 0 or more and below 2**63, not {str(self.seed)[:40]}")
        for name in ("temperature", "max_new_tokens", "critic_tokens", "lr", "batch", "epochs", "clip",
                     "micro_batch", "sample_batch", "eval_every", "eval_samples"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(f"--{name.replace('_', '-')} must be above 0, not {getattr(self, name)}")
        for name in ("steps", "lora_rank", "lora_alpha", "term_clamp"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(f"--{name.replace('_', '-')} must be 0 or more, not {getattr(self, name)}")
        if self.divergence == "jsd" and not 0 < self.beta < 1:
            raise UserError("--beta must be between 0 and 1; its ends are --divergence forward and reverse")
        for name in ("ema_decay", "critic_noise"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"--{name.replace('_', '-')} must be between 0 and 1, "
                                f"not {getattr(self, name)}")
        if "://" in self.critic:
            check_url(self.critic)          # whatever the condition: it is written into the run folder
        if self.group < 2:
            raise UserError("--group must be 2 or more: one rollout has no group to compare with")
        if self.dtype == "bfloat16" and not self.lora_rank:
            raise UserError("--dtype bfloat16 needs --lora-rank: "
                            "updates of the usual size are rounded away in bfloat16 weights")
        if bool(self.data) != bool(self.val):
            raise UserError("--data and --val go together: problems to train on, "
                            "and others that choose the best checkpoint")


def pick_device(name: str) -> torch.device:
    """`name`, or cuda if there is one, under torchrun each rank's own. Raises UserError if it is missing."""
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    name = name or ("cuda" if there else "cpu")
    name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name
    known = ["cpu", *(f"cuda:{i}" for i in range(there))]
    if name not in known:
        raise UserError(f"--device {name}: not available here; there is {', '.join(known)}")
    return torch.device(name)


# What the paper lists, but for its critic of 32 billion weights: here the initial policy, so that one GPU is
# enough. eval_samples is its Avg@12; micro_batch, sample_batch and recompute are for 24 GB.
PRESETS = {"paper": dict(temperature=1.1, max_new_tokens=2048, lr=5e-6, batch=32, epochs=7, group=8,
                         lora_rank=64, lora_alpha=128.0, divergence="forward", teacher="base",
                         dtype="bfloat16", eval_every=10, eval_samples=12, critic="self", critic_tokens=8192,
                         micro_batch=2, sample_batch=32, recompute=True)}
# for the embedded solver and for a chat model: --max-new-tokens, and a --sample-batch for 24 GB in float32
TOKENS, ROWS = (Config.max_new_tokens, 2048), (Config.sample_batch, 16)


def sampling_options(parser: argparse.ArgumentParser, samples: int) -> None:
    """What eval.py, sd.advantage and sd.filter share; to be checked by `check_sampling`."""
    for name, default, text in (("samples", samples, "rollouts per problem"),
                                ("temperature", Config.temperature, "of the rollouts"),
                                ("seed", 0, "of the rollouts")):
        parser.add_argument(f"--{name}", type=type(default), default=default,
                            help=f"{text} (default: {default})")
    for name, (default, chat), text in (("max-new-tokens", TOKENS, "most tokens of a rollout"),
                                        ("sample-batch", ROWS, "rollouts sampled at once")):
        parser.add_argument(f"--{name}", type=int, metavar="N",
                            help=f"{text} (default: {default}, for a chat model {chat})")
    parser.add_argument("--device", default="", help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--compile", action="store_true", help="compile the decode step, as in train.py")


def check_sampling(parser: argparse.ArgumentParser, args: argparse.Namespace, least: int = 1) -> None:
    """Ends the command if a number makes no sense; `least` is for --samples."""
    given = [args.samples - least + 1, args.sample_batch, args.max_new_tokens]
    if (any(n is not None and n < 1 for n in given)
            or not 0 <= args.temperature < float("inf")):
        parser.error(f"--samples must be {least} or more, --sample-batch and --max-new-tokens 1 or more, "
                     "--temperature 0 or more")
    if args.compile:
        check_compile(pick_device(args.device))


def sizes(args: argparse.Namespace, tokenizer: Tokenizer) -> tuple[int, int]:
    """--max-new-tokens and --sample-batch; their defaults depend on the model."""
    chat = tokenizer.chat_model
    return args.max_new_tokens or TOKENS[chat], args.sample_batch or ROWS[chat]


def parse_config(description: str, argv: list[str] | None = None) -> tuple[Config, argparse.Namespace]:
    """The command line -> Config and the rest (resume, plan); argparse exits with status 2 on its errors."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage="%(prog)s --cond {grpo,ref,critique} [option ...]")
    parser.add_argument("--preset", choices=tuple(PRESETS),
                        help="defaults from the paper's list; other options still count")
    parser.add_argument("--resume", metavar="RUN", type=Path, help="go on with this run folder; its own "
                        "options count, but those of memory and speed may be given anew")
    parser.add_argument("--plan", metavar="GIB", type=float, nargs="?", const=24.0, help="print the memory "
                        "that this would need and whether it fits GIB (default 24); train nothing")
    for f in fields(Config):
        kind = ({"action": argparse.BooleanOptionalAction} if f.type is bool else
                {"type": f.type, "choices": f.metadata["choices"],
                 "metavar": {int: "N", float: "X"}.get(f.type)})
        shown = f.metadata["help"] + ("" if f.default == "" else f" (default: {f.default})")
        if f.metadata["group"]:
            group = parser.add_argument_group(f.metadata["group"])
        group.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS, help=shown, **kind)
    args = parser.parse_args(argv)
    given = {f.name: getattr(args, f.name) for f in fields(Config) if f.name in args}
    if args.resume:
        if args.preset or not given.keys() <= MACHINE:
            parser.error("--resume keeps the run's options; only these may be given anew: " +
                         ", ".join("--" + name.replace("_", "-") for name in sorted(MACHINE)))
        config = replace(read_config(args.resume / "config.json"), **given)
    elif "cond" not in given:
        parser.error("the following arguments are required: --cond")
    else:
        config = Config(**PRESETS.get(args.preset, {}) | given)
    config.check()
    if args.preset and not (config.model and (config.data or args.plan is not None)):
        raise UserError(f"--preset {args.preset} needs --model, the folder of a checkpoint such as "
                        "Qwen3-1.7B, and, unless to --plan, your problems: --data and --val")
    if args.plan is None:
        device = config.torch_device  # raises UserError if it is not there; a plan may be for another machine
        if config.compile:
            check_compile(device)
    return config, args


def read_config(path: Path) -> Config:
    """The options of an earlier run. Raises UserError if there is none, or one of another version."""
    if not path.exists():
        raise UserError(f"{path.parent}: no run to resume is there (no config.json)")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(values, dict) and "model_type" in values:
            raise ValueError(f"this is a checkpoint; its run is {path.parent.parent}")
        wanted = {f.name: f.type for f in fields(Config)}
        if not isinstance(values, dict) or values.keys() != wanted.keys() or any(
                type(values[name]) is not kind for name, kind in wanted.items()):
            raise ValueError("its entries are not those of this version")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: no run to resume ({str(error)[:200]})") from None
    return Config(**values)
