"""The run folder: all that a run writes and prints, and the state that it is resumed from.

    config.json  metrics.jsonl (a line per step and per evaluation)  rollouts.jsonl (samples)
    best/ (by validation)  last/  state-NNNNNN.safetensors  report.html

The state holds what the next step depends on and the other files lack: the trained weights, AdamW's
moments, the ema teacher, the best score, and how long the two logs were (a resumed run cuts off
what was written later). Random numbers need no state: they are made from the seed and the step. Two
states are kept, each with a checksum; the older one serves if the newer is damaged. Every file but
the logs is replaced in one atomic rename, so a run may be killed at any moment.
"""
import hashlib
import json
import os
import shlex
import signal
import sqlite3
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sd import Stopped, UserError
from sd.config import Config
from sd.llm.checkpoint import atomic, reading, save_model, write_json
from sd.llm.lora import plain_weights, save_adapter
from sd.metrics import Scores
from sd.problems import EMBEDDED, Problem
from sd.report import write_report
from sd.run.ranks import Ranks

SAVE_EVERY = 60.0       # seconds between states, besides those saved at evaluations
LOGS = ("metrics.jsonl", "rollouts.jsonl")
FACTS = ("done", "seconds", "best", "best_at", "evaluated_at", "data", "logs",  # of a state
         "useless_steps")


class StopRequest:
    """While it is open, Ctrl-C or SIGTERM sets `number`; a second one raises Stopped at once."""

    def __enter__(self) -> "StopRequest":
        self.number = 0
        self.before = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) != signal.SIG_IGN:  # ignored: in a script's background job
                self.before[number] = signal.signal(number, self._caught)
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _caught(self, number: int, frame) -> None:
        if self.number:
            raise Stopped(number)
        self.number = number
        with suppress(OSError):         # not print: the signal may have come within a print
            os.write(2, b"\nthe run stops after this step; a second signal ends it at once\n")


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

    def __init__(self, config: Config, ranks: Ranks, resume: Path | None = None):
        self.config = config
        self.writes = ranks.rank == 0
        self.resume = resume is not None
        path = resume or new_folder(config)
        self.path = Path(ranks.gather([str(path)])[0])          # rank 0 chooses
        self.started = self.saved = time.time()

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind and self.steps and self.writes:
            print(f"after step {self.done}; go on with: "
                  f"python train.py --resume {shlex.quote(str(self.path))}", file=sys.stderr)
        if self.lock:
            self.lock.close()

    def begin(self, student, optimizer, teacher, steps: int, problems: list[Problem]) -> int:
        """Called once all that the user gave has been checked. Returns the step to continue from.

        Raises UserError if another process is writing the run, or if the run to resume has no
        intact state or was begun with other problems.
        """
        self.student = student
        self.data = hashlib.sha256(repr(problems).encode()).hexdigest()
        self.tensors = live_tensors(student, optimizer, teacher)
        if self.writes:
            self.path.mkdir(parents=True, exist_ok=self.resume)
            self._lock()
            # on resuming too: options of memory and speed may be new
            write_json(self.path / "config.json", asdict(self.config))
        if self.resume:
            self._load_state()
        else:
            for name in LOGS:
                self._append(name, [])
            self._save_state()          # the first evaluation may be long, and be interrupted
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
        self.lock = sqlite3.connect(self.path / "lock", timeout=0, isolation_level=None)
        try:
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
        if time.time() - self.saved > SAVE_EVERY:
            self._save_state()

    def evaluated(self, step: int, scores: Scores) -> None:
        """Logs an evaluation, keeps the checkpoint if it is the best so far, saves the state."""
        mean = scores.avg.mean()
        name = f"avg@{self.config.eval_samples}"
        note = ""
        self._log(step, {f"val_{name}": 100 * mean, "val_length": scores.length,
                         "val_truncated": scores.truncated})
        if mean > self.best:
            self.best, self.best_at = mean, step
            self._checkpoint("best", step)
            note = "  best so far"
        self.say(f"step {step:4d}/{self.steps}  validation {name.capitalize()} "
                 f"{100 * mean:5.2f}{note}")
        self.evaluated_at = step
        self._save_state()

    def close(self) -> None:
        """Writes the state, last/ and the report: at the end, or when the run was asked to stop."""
        self._save_state()
        self._checkpoint("last", self.done)
        if self.writes and self.evaluated_at >= 0:
            write_report([self.path], self.path / "report.html")

    def say(self, text: str) -> None:
        if self.writes:
            with suppress(BrokenPipeError):         # `train.py … | head`: the run goes on
                print(text, flush=True)

    def _log(self, step: int, numbers: dict) -> None:
        self.seconds = time.time() - self.started
        row = {"step": step, **numbers, "seconds": round(self.seconds, 2)}
        self._append("metrics.jsonl", [row])

    def _append(self, name: str, rows: list[dict]) -> None:
        if self.writes:
            with open(self.path / name, "a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)

    def _checkpoint(self, name: str, step: int) -> None:
        if self.writes:
            source = self.config.model or str(EMBEDDED)
            save_model(self.path / name, plain_weights(self.student), source, step)
            save_adapter(self.path / name, self.student, source)

    def _save_state(self) -> None:
        if not self.writes:
            return
        self.logs = [(self.path / name).stat().st_size for name in LOGS]
        facts = {name: getattr(self, name) for name in FACTS}
        tensors = {name: tensor.cpu() for name, tensor in self.tensors.items()}
        with atomic(self.path / f"state-{self.done:06d}.safetensors") as temporary:
            save_file(tensors, temporary, header(tensors, facts))
        for old in sorted(self.path.glob("state-*.safetensors"))[:-2]:
            old.unlink()
        self.saved = time.time()

    def _load_state(self) -> None:
        """Goes back to the newest intact state; what was written after it goes."""
        damaged = []
        for path in sorted(self.path.glob("state-*.safetensors"), reverse=True):
            try:
                facts = self._read_state(path)
                break
            except UserError as error:
                self.say(f"damaged: {error}; looking for the state before it")
                damaged.append(path)
        else:
            raise UserError(f"{self.path}: has no intact state to resume from")
        if facts["data"] != self.data:
            raise UserError(f"{self.path}: the problems in --data or --val are not those that "
                            "this run began with; restore the original files")
        vars(self).update(facts)
        self.started = time.time() - self.seconds
        if not self.writes:
            return
        for name, size in zip(LOGS, self.logs):
            log = self.path / name
            whole = log.read_bytes()[:size].rfind(b"\n") + 1    # a power cut may have taken its end
            os.truncate(log, whole)
        for path in [*damaged, *self.path.rglob("*.tmp*")]:     # half written, by us or safetensors
            path.unlink()

    def _read_state(self, path: Path) -> dict:
        """Takes over a state's tensors, returns its facts. Raises UserError if it is damaged."""
        with reading(path), safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in self.tensors}
            facts = json.loads(file.metadata()["facts"])
            if file.metadata() != header(tensors, facts):
                raise ValueError("its checksum is wrong")
        for name, tensor in self.tensors.items():
            tensor.copy_(tensors[name])
        return facts


def new_folder(config: Config) -> Path:
    """--out, or runs/COND-seedSEED, numbered if it is taken. Raises UserError if --out exists."""
    name = config.out or f"runs/{config.cond}-seed{config.seed}"
    path = Path(name)
    number = 1
    while path.exists():
        if config.out:
            raise UserError(f"--out {path} exists already; choose another folder")
        number += 1
        path = Path(f"{name}-{number}")
    return path


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
    digest = hashlib.sha256(text.encode())
    for tensor in tensors.values():
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return {"facts": text, "sha256": digest.hexdigest()}
