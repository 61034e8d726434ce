"""The run folder: all that a run writes and prints, and the state that it is resumed from.

    config.json  metrics.jsonl (a line per step and per evaluation)  rollouts.jsonl (samples)
    best/ (by validation)  last/  state-NNNNNN.safetensors  report.html

The state holds what the next step depends on and the other files lack: the trained weights, AdamW's
moments, the ema teacher, and how long the two logs were (a resumed run cuts off what was written
later). Random numbers need no state: they are made from the seed and the step. Two states are kept,
each with a checksum; the older one serves if the newer is damaged. best/ itself says which step it
holds and its score. Every file but the logs is replaced in one atomic rename, and the logs are on
the disk before a state that counts on them, so a run may be killed at any moment.
"""
import hashlib
import json
import os
import shlex
import sqlite3
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from sd import UserError
from sd.config import MACHINE, Config
from sd.llm.checkpoint import append_rows, reading, save_model, save_tensors, write_json, writing
from sd.llm.lora import plain_weights, save_adapter
from sd.metrics import Scores
from sd.problems import EMBEDDED, Problem
from sd.report import write_report
from sd.run.ranks import Ranks

SAVE_EVERY = 60.0       # seconds between states, besides those saved at evaluations
LOGS = ("metrics.jsonl", "rollouts.jsonl")
FACTS = ("done", "seconds", "evaluated_at", "useless_steps", "origin", "logs")      # of a state


class RunFolder:
    """Rank 0 writes and prints; the others hold the same object and are silent.

    If an exception ends the run, the context manager says how to go on. It saves nothing then: the
    weights may be half updated, and the last state is whole.
    """

    steps = done = 0            # of the whole run (0 until it has begun); those that are done
    seconds = 0.0               # from the start to the last line in metrics.jsonl
    best, best_at = -1.0, 0     # the best validation Avg@k, and its step
    evaluated_at = -1           # the step of the last evaluation
    useless_steps = 0           # the last ones, all of whose critiques were malformed
    lock = None
    checksum = ""               # of the state that the run goes on from

    def __init__(self, config: Config, ranks: Ranks, resume: Path | None = None):
        self.config, self.ranks = config, ranks
        self.writes = ranks.rank == 0
        self.path = resume
        if not resume and config.out and Path(config.out).exists():
            raise UserError(f"--out {config.out} exists already; choose another folder")
        self.started = self.saved = time.monotonic()

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind and self.steps and self.writes:
            print(f"after step {self.done}; go on with: "
                  f"python train.py --resume {shlex.quote(self.path.as_posix())}", file=sys.stderr)
        if self.lock:
            self.lock.close()

    def begin(self, student, tokenizer, optimizer, teacher, steps: int,
              problems: list[Problem]) -> int:
        """Called once all that the user gave has been checked. Returns the step to continue from.

        Raises UserError if another process is writing the run, if the run to resume has no intact
        state or was begun with something else, or if the ranks do not begin with the same.
        """
        self.student = student
        self.origin = origin(self.config, problems, student, tokenizer)
        self.tensors = live_tensors(student, optimizer, teacher)
        resumed = self.path is not None
        if resumed:
            self._lock()
            self._load_state()
        mine = [self.origin, self.checksum, self.best]
        if any(other != mine for other in self.ranks.gather([mine])):
            raise UserError("the processes do not all find the same run, problems and weights; "
                            "give every machine the same files")
        if self.writes:
            if not resumed:
                self.path = make_folder(self.config)
                self._lock()
            # on resuming too: options of memory and speed may be new
            write_json(self.path / "config.json", asdict(absolute(self.config, self.path)))
            if resumed:
                self._cut_off()
            else:
                self._save_state()      # the first evaluation may be long, and be interrupted
        self.steps = steps
        self.say(f"{self.config.cond}: {steps} steps of {self.config.batch} problems x "
                 f"{self.config.rollouts_per_problem} rollouts, to {self.path}, "
                 f"from step {self.done}")
        return self.done

    def _lock(self) -> None:
        """One process at a time may write a run.

        SQLite has the standard library's only lock that works on every system and that the system
        releases when the process dies.
        """
        if not self.writes:
            return
        try:
            self.lock = sqlite3.connect(self.path / "lock", timeout=0, isolation_level=None)
            self.lock.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError as error:
            if "locked" in str(error):          # else it is a file system without locks
                raise UserError(f"{self.path}: another process is writing this run") from None

    def log_rollouts(self, step: int, rows: list[dict]) -> None:
        """Logs samples of a step's rollouts, which may be what tells why the step is refused."""
        self._append("rollouts.jsonl", [{"step": step, **row} for row in rows])

    def stepped(self, step: int, numbers: dict) -> None:
        """Logs an optimiser step; saves the state now and then."""
        self.done = step
        self._log(step, numbers)
        left = self.seconds / step * (self.steps - step)
        self.say(f"step {step:4d}/{self.steps}  loss {numbers['loss']:8.4f}  "
                 f"reward {numbers['reward']:.3f}  entropy {numbers['entropy']:.3f}  "
                 f"length {numbers['length']:5.1f}  truncated {numbers['truncated']:5.1%}  "
                 f"rollouts {numbers['rollouts']:6d}  {self.seconds:6.1f} s, {left:6.1f} s left")
        if time.monotonic() - self.saved > SAVE_EVERY:
            self._save_state()

    def evaluated(self, step: int, scores: Scores) -> None:
        """Logs an evaluation, keeps the checkpoint if it is the best so far, saves the state.

        In this order: a run that ends in between evaluates once more.
        """
        mean = scores.avg.mean()
        name = f"avg@{self.config.eval_samples}"
        note = ""
        self._log(step, {f"val_{name}": 100 * mean, "val_length": scores.length,
                         "val_truncated": scores.truncated})
        if mean > self.best:
            self._checkpoint("best", step=step, score=mean)
            self.best, self.best_at = mean, step
            note = "  best so far"
        self.say(f"step {step:4d}/{self.steps}  validation {name.capitalize()} "
                 f"{100 * mean:5.2f}{note}")
        self.evaluated_at = step
        self._save_state()

    def close(self) -> None:
        """Writes the state, last/ and the report: at the end, or when the run was asked to stop."""
        self._save_state()
        self._checkpoint("last", step=self.done)
        if self.writes and self.evaluated_at >= 0:
            write_report([self.path], self.path / "report.html")

    def say(self, text: str) -> None:
        if self.writes:
            print(text, flush=True)

    def _log(self, step: int, numbers: dict) -> None:
        self.seconds = time.monotonic() - self.started
        row = {"step": step, **numbers, "seconds": round(self.seconds, 2)}
        self._append("metrics.jsonl", [row])

    def _append(self, name: str, rows: list[dict]) -> None:
        if self.writes:
            append_rows(self.path / name, rows)

    def _checkpoint(self, name: str, **facts) -> None:
        if self.writes:
            source = self.config.model or str(EMBEDDED)
            save_adapter(self.path / name, self.student, source)
            save_model(self.path / name, plain_weights(self.student), source, **facts)

    def _save_state(self) -> None:
        if not self.writes:
            return
        self.logs = []
        for name in LOGS:
            with writing(self.path / name), open(self.path / name, "ab") as log:
                os.fsync(log.fileno())
                self.logs.append(log.tell())
        facts = {name: getattr(self, name) for name in FACTS}
        tensors = {name: tensor.cpu() for name, tensor in self.tensors.items()}
        save_tensors(self.path / f"state-{self.done:06d}.safetensors", tensors,
                     header(tensors, facts))
        for old in sorted(self.path.glob("state-*.safetensors"))[:-2]:
            old.unlink()
        self.saved = time.monotonic()

    def _load_state(self) -> None:
        """Goes back to the newest intact state, and to the score of best/."""
        self.damaged = []
        for path in sorted(self.path.glob("state-*.safetensors"), reverse=True):
            try:
                facts = self._read_state(path)
                break
            except UserError as error:
                self.say(f"damaged: {error}; looking for the state before it")
                self.damaged.append(path)
        else:
            raise UserError(f"{self.path}: has no intact state to resume from")
        for what, digest in self.origin.items():
            if facts.get("origin", {}).get(what) != digest:
                raise UserError(f"{self.path}: {what} are not those that this run began with; "
                                "restore the original files")
        vars(self).update(facts)
        self.started = time.monotonic() - self.seconds
        if self.evaluated_at >= 0:
            self._read_best()

    def _read_best(self) -> None:
        path = self.path / "best/model.safetensors"
        try:
            with reading(path), safe_open(path, "pt") as file:
                facts = file.metadata()
                self.best, self.best_at = float(facts["score"]), int(facts["step"])
        except UserError as error:
            self.say(f"lost: {error}; the next evaluation chooses it anew")
            self.evaluated_at = -1

    def _cut_off(self) -> None:
        """What was written after the state goes, and what we or safetensors wrote by half."""
        for name, size in zip(LOGS, self.logs):
            log = self.path / name
            whole = log.read_bytes()[:size].rfind(b"\n") + 1
            os.truncate(log, whole)
        for path in [*self.damaged, *self.path.rglob("*.tmp*")]:
            path.unlink()

    def _read_state(self, path: Path) -> dict:
        """Takes over a state's tensors, returns its facts. Raises UserError if it is damaged."""
        with reading(path), safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in self.tensors}
            facts = json.loads(file.metadata()["facts"])
            if file.metadata() != header(tensors, facts):
                raise ValueError("its checksum is wrong")
            self.checksum = file.metadata()["sha256"]
        for name, tensor in self.tensors.items():
            tensor.copy_(tensors[name])
        return facts


def make_folder(config: Config) -> Path:
    """--out, or runs/COND-seedSEED, numbered if it is taken. Raises OSError if --out exists."""
    name = config.out or f"runs/{config.cond}-seed{config.seed}"
    for number in count(1):
        path = Path(name if number == 1 else f"{name}-{number}")
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            if config.out:
                raise


def absolute(config: Config, out: Path) -> Config:
    """The options with absolute paths: a run may be resumed from another folder."""
    paths = {"out": str(out), "model": config.model, "data": config.data, "val": config.val}
    if config.critic not in ("symbolic", "self") and "://" not in config.critic:
        paths["critic"] = config.critic
    return replace(config, **{name: path and os.path.abspath(path)
                              for name, path in paths.items()})


def origin(config: Config, problems: list[Problem], student, tokenizer) -> dict[str, str]:
    """Digests of what a run's numbers depend on, wherever the files lie and the critic's server."""
    options = asdict(replace(config, out="", model="", data="", val="",
                             critic=Path(config.critic).name))
    for name in MACHINE:
        del options[name]
    prompts = [tokenizer.path.read_text(encoding="utf-8"), tokenizer.turns, tokenizer.eos]
    return {"the options in config.json": checksum(json.dumps(options)),
            "the problems in --data or --val": checksum(repr(problems)),
            "the tokenizer and chat template in --model": checksum(repr(prompts)),
            "the weights and config.json in --model":
                checksum(repr(student.config), student.parameters())}


def live_tensors(student, optimizer, teacher) -> dict[str, Tensor]:
    """By name, every tensor that a step changes in place: a state is a copy of them.

    AdamW makes its moments at its first step; here they begin before, just as they would there.
    """
    tensors = {}
    for name, p in student.named_parameters():
        if p.requires_grad:
            moments = {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(p),
                       "exp_avg_sq": torch.zeros_like(p)}
            optimizer.state[p] = moments
            tensors |= {f"{key}.{name}": tensor for key, tensor in moments.items()}
            tensors[f"student.{name}"] = p.detach()
            if teacher and teacher.kind == "ema":
                tensors[f"teacher.{name}"] = teacher.model.get_parameter(name)
    return tensors


def header(tensors: dict[str, Tensor], facts: dict) -> dict[str, str]:
    """What a state says of its run, and the checksum of that and of the tensors."""
    text = json.dumps(facts)
    return {"facts": text, "sha256": checksum(text, tensors.values())}


def checksum(text: str, tensors: Iterable[Tensor] = ()) -> str:
    digest = hashlib.sha256(text.encode())
    for tensor in tensors:
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
