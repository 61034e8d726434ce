"""Every option of a run, in one dataclass: the command line is made from it, each run saves it."""
import argparse
import json
import os
import re
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch

from sd import UserError
from sd.llm.checkpoint import load, reading
from sd.llm.compile import check_compile
from sd.llm.model import Transformer
from sd.llm.tokenizer import Tokenizer

# These change no result but by rounding, so a resumed run may be given others.
MACHINE = {"device", "micro_batch", "sample_batch", "recompute", "compile"}
# What eval.py, sd.advantage and sd.filter share with train.py, and their defaults for a chat model.
SAMPLING = ("temperature", "seed", "max_new_tokens", "sample_batch", "device", "dtype", "compile")
CHAT = {"max_new_tokens": 2048, "sample_batch": 16}
ADDRESS = re.compile(r"https?://([\w-]+(?:\.[\w-]+)*|\[[\da-f:]+\])(:\d+)?(/[\w./~%-]*)?",
                     re.ASCII | re.IGNORECASE)


def option(default, help: str, choices=None, group="", zero=False, most=1e15):
    """A field that is also an option; `group` begins a new section of --help.

    A number must be above 0, or may be 0 with `zero`, and at most `most`.
    """
    return field(default=default, metadata={
        "help": help, "choices": choices, "group": group, "zero": zero, "most": most})


@dataclass(frozen=True)
class Config:
    cond: str = option(
        "", "what the self-teacher sees: nothing (grpo, a binary reward instead), a reference "
        "solution (ref), or a critique of this rollout (critique)", ("grpo", "ref", "critique"),
        group="run")
    seed: int = option(0, "seed of everything that is random", zero=True)
    out: str = option(
        "", "run folder; must not exist yet (default: runs/COND-seedSEED, numbered if taken)")
    model: str = option(
        "", "checkpoint folder of the solver (default: the embedded solver)",
        group="what is trained, on what")
    data: str = option("", "training problems, JSONL (default: the embedded ones)")
    val: str = option("", "validation problems, JSONL; they choose best/")
    critic: str = option(
        "symbolic", "symbolic (exact, embedded task only), self (the initial policy), a checkpoint "
        "FOLDER, or the URL of an OpenAI-compatible server, URL#MODEL")
    critic_tokens: int = option(2048, "most tokens of a language model's critique, with thoughts")
    divergence: str = option(
        "forward", "forward KL(teacher||student), reverse KL(student||teacher), jsd (beta), or "
        "sampled: policy gradient on the sampled token", ("forward", "reverse", "jsd", "sampled"),
        group="method")
    beta: float = option(0.5, "weight of the teacher in jsd, between 0 and 1", zero=True, most=1)
    teacher: str = option(
        "base", "the self-teacher's weights: base (initial), ema (moving average), live (the "
        "student's own)", ("base", "ema", "live"))
    ema_decay: float = option(0.95, "decay per step of the ema teacher", zero=True, most=1)
    quoting: str = option(
        "partial", "how a symbolic critique quotes the rollout", ("partial", "full", "omit"))
    critic_noise: float = option(
        0.0, "share of the symbolic critic's corrected products that are wrong", zero=True, most=1)
    group: int = option(8, "rollouts per problem for grpo (self-distillation uses one)")
    temperature: float = option(1.1, "of all rollouts, and in the loss", zero=True)
    max_new_tokens: int = option(128, "most tokens of a rollout")
    lr: float = option(4e-4, "AdamW's learning rate, constant", group="optimisation")
    batch: int = option(32, "problems per step")
    epochs: int = option(7, "passes over the training problems")
    steps: int = option(0, "stop after so many steps (0: after the epochs)", zero=True)
    clip: float = option(1.0, "largest gradient norm")
    lora_rank: int = option(0, "rank of the LoRA adapter (0: train all weights)", zero=True)
    lora_alpha: float = option(
        0.0, "the adapter is scaled by alpha / rank (0: twice the rank)", zero=True)
    device: str = option("", "cpu or cuda (default: cuda if there is one)",
                         group="memory and speed")
    dtype: str = option(
        "float32", "of the weights; to train in bfloat16 takes an adapter, which stays in float32",
        ("float32", "bfloat16"))
    micro_batch: int = option(64, "rollouts scored at once")
    sample_batch: int = option(512, "rollouts sampled at once")
    recompute: bool = option(False, "recompute activations in the backward pass, for less memory")
    compile: bool = option(False, "on CUDA: decode step and loss as CUDA graphs")
    eval_every: int = option(
        10, "steps between evaluations",
        group="evaluation on validation problems, which chooses best/")
    eval_samples: int = option(4, "rollouts per validation problem")
    control: str = option(
        "off", "what the self-teacher sees in place of its condition's context (sd/controls.py)",
        ("off", "none", "empty", "answer", "other", "echo", "needless", "plan"),
        group="for sd.experiment alone")
    loss_on: str = option(
        "all", "with a critique, take the loss on a part of the tokens: the first wrong step, all "
        "others, what precedes it and right rollouts (correct), or only one of these two",
        ("all", "wrong", "others", "correct", "before", "right"))

    @property
    def rollouts_per_problem(self) -> int:
        return self.group if self.cond == "grpo" else 1

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def torch_device(self) -> torch.device:
        """The device named, or cuda if there is one. Raises UserError if it is not available."""
        there = torch.cuda.device_count() if torch.cuda.is_available() else 0
        name = self.device or ("cuda" if there else "cpu")
        if name == "cuda":                      # under torchrun, each rank has its own
            name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        known = ["cpu"] + [f"cuda:{i}" for i in range(there)]
        if name not in known:
            raise UserError(f"--device {name}: not available here; there is {', '.join(known)}")
        return torch.device(name)

    def check(self) -> None:
        """Raises UserError naming the first flag whose value makes no sense."""
        for f in fields(self):
            flag, value = flag_of(f.name), getattr(self, f.name)
            choices, zero, most = (f.metadata[key] for key in ("choices", "zero", "most"))
            if choices and value not in choices:
                raise UserError(f"{flag} must be one of {', '.join(choices)}")
            if f.type in (int, float) and not (0 < value <= most or zero and value == 0):
                least = "0 or more" if zero else "above 0"
                raise UserError(f"{flag} must be {least} and at most {most:g}, not {value}")
        if self.divergence == "jsd" and self.beta in (0, 1):
            raise UserError("--beta must be between 0 and 1; "
                            "its ends are --divergence forward and reverse")
        if self.cond != "critique" and (self.control == "needless" or self.loss_on != "all"):
            raise UserError("--control needless and --loss-on go with --cond critique")
        if self.cond == "grpo" and self.control != "off":
            raise UserError("--control goes with --cond ref or critique")
        if self.critic != "symbolic" and (self.quoting != "partial" or self.critic_noise):
            raise UserError("--quoting and --critic-noise go with --critic symbolic")
        if self.group < 2:
            raise UserError("--group must be 2 or more: one rollout has no group to compare with")
        if bool(self.data) != bool(self.val):
            raise UserError("--data and --val go together: problems to train on, "
                            "and others that choose the best checkpoint")
        if "://" in self.critic:        # whatever the condition: it is written into the run folder
            check_url(self.critic)
        if self.compile:
            check_compile(self.torch_device)


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def check_url(url: str) -> re.Match:
    """Raises UserError if it has more than host, port and path. The error does not quote it."""
    match = ADDRESS.fullmatch(url.partition("#")[0])
    if not match:
        raise UserError(
            "the critic's URL must look like http://localhost:8000/v1 or https://HOST/v1#MODEL, "
            "with no user, password or query; "
            "a key goes into the environment variable OPENAI_API_KEY")
    return match


# What the paper lists, except for its critic of 32 billion weights: here it is the initial policy,
# so that one GPU is enough. eval_samples is its Avg@12; micro_batch, sample_batch and recompute are
# for 24 GB.
PRESETS = {"paper": dict(
    critic="self",
    critic_tokens=8192,
    divergence="forward",
    teacher="base",
    group=8,
    temperature=1.1,
    max_new_tokens=2048,
    lr=5e-6,
    batch=32,
    epochs=7,
    lora_rank=64,
    lora_alpha=128.0,
    dtype="bfloat16",
    micro_batch=2,
    sample_batch=32,
    recompute=True,
    eval_every=10,
    eval_samples=12)}


def add_option(parser, f, note: str = "") -> None:
    """Makes a field of Config an option of `parser`; if it is not given, args will lack it."""
    if f.type is bool:
        kind = {"action": argparse.BooleanOptionalAction}
    else:
        metavar = {int: "N", float: "X"}.get(f.type)
        kind = {"type": f.type, "choices": f.metadata["choices"], "metavar": metavar}
    default = "" if f.default == "" else f" (default: {f.default}{note})"
    parser.add_argument(flag_of(f.name), default=argparse.SUPPRESS,
                        help=f.metadata["help"] + default, **kind)


def sampling_options(parser: argparse.ArgumentParser, samples: int) -> None:
    """The options of the commands that sample but do not train; `open_solver` reads them."""
    parser.add_argument("--samples", type=int, default=samples,
                        help=f"rollouts per problem (default: {samples})")
    for f in fields(Config):
        if f.name in SAMPLING:
            chat = f", for a chat model {CHAT[f.name]}" if f.name in CHAT else ""
            add_option(parser, f, chat)


def open_solver(folder: str | Path,
                args: argparse.Namespace) -> tuple[Transformer, Tokenizer, Config]:
    """A checkpoint, and the Config of a command with `sampling_options`, which depends on it.

    Raises UserError naming a wrong flag, or a file that cannot be used.
    """
    config = Config("grpo", **{name: vars(args)[name] for name in SAMPLING if name in args})
    config.check()
    if args.samples < 1:
        raise UserError(f"--samples must be above 0, not {args.samples}")
    model, tokenizer = load(folder, config.torch_dtype, config.torch_device)
    if tokenizer.chat_model:
        config = replace(config, **{name: CHAT[name] for name in CHAT if name not in args})
    return model, tokenizer, config


def parse_config(parser: argparse.ArgumentParser,
                 argv: list[str] | None = None) -> tuple[Config, argparse.Namespace]:
    """train.py's command line -> Config and the rest. Raises UserError naming a wrong flag."""
    parser.usage = "%(prog)s --cond {grpo,ref,critique} [option ...]"
    parser.add_argument("--preset", choices=tuple(PRESETS),
                        help="defaults from the paper's list; other options still count")
    parser.add_argument("--resume", metavar="RUN", type=Path, help="go on with this run folder; "
                        "its own options count, but those of memory and speed may be given anew")
    for f in fields(Config):
        if f.metadata["group"]:
            group = parser.add_argument_group(f.metadata["group"])
        add_option(group, f)
    args = parser.parse_args(argv)
    given = {f.name: getattr(args, f.name) for f in fields(Config) if f.name in args}
    if args.resume:
        if args.preset or not given.keys() <= MACHINE:
            parser.error("--resume keeps the run's options; only these may be given anew: "
                         + ", ".join(map(flag_of, sorted(MACHINE))))
        config = replace(read_run_config(args.resume / "config.json"), **given)
    elif "cond" not in given:
        parser.error("the following arguments are required: --cond")
    else:
        config = Config(**PRESETS.get(args.preset, {}) | given)
    config.check()
    if config.temperature == 0:
        raise UserError("--temperature must be above 0 to train")
    if config.dtype == "bfloat16" and not config.lora_rank:
        raise UserError("--dtype bfloat16 needs --lora-rank to train: updates of the usual size "
                        "are rounded away in bfloat16 weights")
    if args.preset and not config.model:
        raise UserError(f"--preset {args.preset} needs --model, a folder such as Qwen3-1.7B")
    return config, args


def read_run_config(path: Path) -> Config:
    """The options of an earlier run. Raises UserError if there is none, or of another version."""
    with reading(path):
        values = json.loads(path.read_text(encoding="utf-8"))
        kinds = {name: type(value) for name, value in values.items()}
        if kinds != {f.name: f.type for f in fields(Config)}:
            raise ValueError("no run of this version to resume is there")
    return Config(**values)
