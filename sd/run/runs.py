"""The run folder: all that a run writes and prints, and the state to resume from as if it had never stopped.

    config.json  metrics.jsonl (a line per step and per evaluation)  rollouts.jsonl (samples)
    best/ (by validation)  last/  state-N.safetensors

The state holds what the next step depends on and the other files lack: the trained weights, AdamW's moments,
the ema teacher, the best score, and how long the two logs were (a resumed run cuts off what was written
later). Random numbers need no state: they are made from the seed and the step. Two states are kept, each
with a checksum; the older one serves if the newer is damaged. One process at a time may write a run.
"""
import fcntl
import hashlib
import json
import os
import shlex
import signal
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sd import UserError
from sd.llm.checkpoint import atomic, save_model, write_atomic
from sd.config import Config
from sd.llm.lora import plain_weights, save_adapter
from sd.metrics import Scores
from sd.problems import EMBEDDED, Problem
from sd.run.ranks import Ranks
from sd.report import write_report

SAVE_EVERY = 60.0       # seconds between states, besides those saved at evaluations


class Stop(BaseException):
    """Ctrl-C or SIGTERM."""

    def __init__(self, number: int):
        self.number = number


class Signals:
    """Turns SIGINT and SIGTERM into a Stop: at once or, inside a `shielded` block, at its end.

    Only the first signal counts: a second Ctrl-C does not interrupt the shutdown.
    """

    def __init__(self):
        self.depth, self.waiting = 0, 0
        self.before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
        for number, handler in self.before.items():
            if handler != signal.SIG_IGN:               # ignored for a script's background job: leave it so
                signal.signal(number, self._caught)

    def _caught(self, number: int, frame) -> None:
        self.waiting = number
        self._stop()

    def _stop(self) -> None:
        if self.waiting and not self.depth:
            self.depth = 1
            raise Stop(self.waiting)

    @contextmanager
    def shielded(self) -> Iterator[None]:
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1
        self._stop()

    def restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


class RunFolder:
    """Rank 0 writes and prints; the others hold the same object and are silent."""

    def __init__(self, config: Config, ranks: Ranks, resume: Path | None = None):
        self.writes, self.resume = ranks.rank == 0, resume is not None
        path = resume
        if self.writes and path is None:
            name = f"runs/{config.cond}-seed{config.seed}"
            taken = (n for n in range(2, 10_000) if not Path(f"{name}-{n}").exists())
            path = Path(config.out or (f"{name}-{next(taken)}" if Path(name).exists() else name))
            if path.exists():
                raise UserError(f"--out {path} exists already; choose another folder, nothing was changed")
        # rank 0 has chosen the folder, the others learn it here
        self.path = Path(next(p for p in ranks.gather([str(path) if path else None]) if p))
        self.config = config if self.resume else replace(config, out=str(self.path))
        self.source = Path(config.model or EMBEDDED)
        self.best, self.best_at, self.done, self.evaluated_at, self.student = -1.0, 0, 0, -1, None
        self.started = self.saved = time.time()

    def begin(self, student, optimizer, teacher, steps: int, problems: list[Problem]) -> int:
        """Called once all that the user gave has been checked. Returns the step to continue from.

        Raises UserError if the run to resume has no intact state, or was begun with other problems.
        """
        self.optimizer, self.steps = optimizer, steps
        self.data = hashlib.sha256(json.dumps([asdict(p) for p in problems]).encode()).hexdigest()
        self.ema = dict(teacher.model.named_parameters()) if teacher.kind == "ema" else {}
        self.trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
        if self.writes:
            self._claim()
        if self.resume:
            self._load_state()
        if self.writes:                     # on resuming too: memory and speed options may be new
            write_atomic(self.path / "config.json", json.dumps(asdict(self.config), indent=1) + "\n")
        if not self.resume:
            self._save_state()              # the first evaluation may be long, and the run may end during it
        self.student = student              # not before: what `close` writes must be this run's
        self.say(f"{self.config.cond}: {steps} steps of {self.config.batch} problems x "
                  f"{self.config.rollouts_per_problem} rollouts, to {self.path}" +
                  (f", from step {self.done}" if self.resume else ""))
        return self.done

    @property
    def go_on(self) -> str:
        """The command that resumes this run."""
        return f"go on with: python train.py --resume {shlex.quote(str(self.path))}"

    def _claim(self) -> None:
        """Makes the folder, unless to resume, and locks it while this object lives. Raises UserError."""
        try:
            if not self.resume:
                self.path.mkdir(parents=True)
            folder = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror}); "
                            "fix the permissions or choose another --out") from None
        weakref.finalize(self, os.close, folder)            # which unlocks; so does the end of the process
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{self.path}: another process is writing this run; wait for its end, "
                            "or choose another --out") from None
        except OSError:
            pass                                            # a file system without locks

    def stepped(self, step: int, numbers: dict, samples: list[dict]) -> None:
        self.done, seconds = step, time.time() - self.started
        self._append("metrics.jsonl", [{"step": step, **numbers, "seconds": round(seconds, 2)}])
        self._append("rollouts.jsonl", [{"step": step, **row} for row in samples])
        n = numbers
        self.say(f"step {step:4d}/{self.steps}  loss {n['loss']:8.4f}  reward {n['reward']:5.3f}  "
                  f"entropy {n['entropy']:.3f}  length {n['length']:5.1f}  truncated {n['truncated']:5.1%}  "
                  f"rollouts {n['rollouts']:6d}  {seconds:6.1f} s, "
                  f"{seconds / step * (self.steps - step):5.1f} s left" +
                  "".join(f"  {name} {n[name]}" for name in ("critique_malformed", "context_shortened")
                          if n.get(name)))
        if time.time() - self.saved > SAVE_EVERY:
            self._save_state()

    def evaluated(self, step: int, scores: Scores) -> None:
        avg, better, k = 100 * scores.avg.mean(), scores.avg.mean() > self.best, self.config.eval_samples
        self._append("metrics.jsonl", [{
            "step": step, f"val_avg@{k}": avg, "val_length": scores.lengths.mean(),
            "val_truncated": scores.truncated.mean(), "seconds": round(time.time() - self.started, 2)}])
        self.say(f"step {step:4d}/{self.steps}  validation Avg@{k} {avg:5.2f}"
                  f"{'  best so far' if better else ''}")
        if better:
            self.best, self.best_at = scores.avg.mean(), step
            self._checkpoint("best", step=step, val_avg=avg)
        if self.config.keep:
            self._checkpoint(f"step-{step}", step=step, val_avg=avg)
        self.evaluated_at = step
        self._save_state()

    def close(self) -> None:
        """Writes the state, last/ and the report, whatever ended the run, provided that it had begun."""
        if self.student is not None:
            for p in self.trained.values():
                p.grad = None       # left by an unfinished step; if memory ran out, it is needed now
            self._save_state()
            self._checkpoint("last", step=self.done)
            if self.writes and self.evaluated_at >= 0:
                write_report([self.path], self.path / "report.html")

    def _checkpoint(self, name: str, **facts) -> None:
        if self.writes:
            save_model(self.path / name, plain_weights(self.student), self.source, **facts)
            save_adapter(self.path / name, self.student, str(self.source))

    def say(self, text: str) -> None:
        if self.writes:
            with suppress(BrokenPipeError):         # `train.py … | head`: the run goes on
                print(text, flush=True)

    def _append(self, name: str, rows: list[dict]) -> None:
        try:
            if self.writes:
                with open(self.path / name, "a", encoding="utf-8") as file:
                    file.write("".join(json.dumps(row) + "\n" for row in rows))
        except OSError as error:
            raise UserError(f"{self.path / name}: cannot be written ({error.strerror}); free some space, "
                            f"then {self.go_on}") from None

    def _state(self) -> dict[str, torch.Tensor]:
        tensors = {f"student.{name}": p for name, p in self.trained.items()}
        tensors |= {f"teacher.{name}": p for name, p in self.ema.items() if name in self.trained}
        for name, p in self.trained.items():
            tensors |= {f"{key}.{name}": value for key, value in self.optimizer.state.get(p, {}).items()}
        return {name: t.detach().cpu().contiguous().clone()     # tied ones twice: fine
                for name, t in tensors.items()}

    def _save_state(self) -> None:
        if not self.writes:
            return
        logs = {name: (self.path / name).stat().st_size if (self.path / name).exists() else 0
                for name in ("metrics.jsonl", "rollouts.jsonl")}
        tensors = self._state()
        facts = {"step": self.done, "best": float(self.best), "best_at": self.best_at, "logs": logs,
                 "evaluated_at": self.evaluated_at, "seconds": time.time() - self.started, "data": self.data}
        facts["sha256"] = checksum(tensors, facts)
        with atomic(self.path / f"state-{self.done}.safetensors") as temporary:
            save_file(tensors, temporary, {"run": json.dumps(facts)})
        for old in self._states()[2:]:
            old.unlink(missing_ok=True)
        self.saved = time.time()

    def _states(self) -> list[Path]:
        """Newest first."""
        found = [p for p in self.path.glob("state-*.safetensors") if p.stem[6:].isdecimal()]
        return sorted(found, key=lambda p: -int(p.stem[6:]))

    def _load_state(self) -> None:
        """Raises UserError if no state is intact, or if it belongs to another model."""
        damaged: list[Path] = []
        for path in self._states():
            try:
                with safe_open(path, "pt") as file:
                    tensors = {name: file.get_tensor(name) for name in file.keys()}
                    facts = json.loads((file.metadata() or {})["run"])
                if facts.pop("sha256") != checksum(tensors, facts):
                    raise ValueError("its checksum is wrong")
                break
            except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
                self.say(f"{path}: damaged ({error}); looking for the state before it")
                damaged.append(path)
        else:
            raise UserError(f"{self.path}: has no intact state-N.safetensors to resume from")
        if facts.get("data") != self.data:
            raise UserError(f"{self.path}: the problems in --data or --val are not those that "
                            "this run began with; restore the original files")
        try:
            with torch.no_grad():
                for name, p in self.trained.items():
                    p.copy_(tensors[f"student.{name}"])
                    moments = {key: tensors[f"{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")
                               if f"{key}.{name}" in tensors}
                    if moments:
                        self.optimizer.state[p] = {key: value.to("cpu" if key == "step" else p.device)
                                                   for key, value in moments.items()}
                    if name in self.ema:
                        self.ema[name].copy_(tensors[f"teacher.{name}"])
        except (KeyError, RuntimeError) as error:
            raise UserError(f"{path}: is not a state of --model {self.source} ({str(error)[:200]})") from None
        self.done, self.best, self.best_at, self.evaluated_at = (
            facts[name] for name in ("step", "best", "best_at", "evaluated_at"))
        self.started = time.time() - facts["seconds"]
        if not self.writes:
            return
        for name, size in facts["logs"].items():
            if (log := self.path / Path(name).name).exists():
                os.truncate(log, log.read_bytes()[:size].rfind(b"\n") + 1)      # a torn last line goes too
        for path in damaged:                                        # kept, but no longer as a state
            path.rename(path.with_name(path.name + ".damaged"))
        for left in (*self.path.rglob("*.tmp"), *self.path.rglob(".tmp*")):
            left.unlink()                                           # half-written, ours or safetensors'


def checksum(tensors: dict[str, torch.Tensor], facts: dict) -> str:
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
