"""One run of an experiment, and the ledger that keeps what it gave.

A line of the ledger holds what a run's result depends on (the solver's weights, its problems, every
option), its test scores and its validation curve. A run that has a line is never trained again.
"""
import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache
from hashlib import sha256
from pathlib import Path

import numpy as np

from sd import UserError
from sd.config import MACHINE, Config, parse_config
from sd.controls import reference
from sd.llm.checkpoint import load, write_atomic
from sd.pretrain import make_problems
from sd.problems import EMBEDDED, embedded, read_problems, write_problems
from sd.report import read_rows
from sd.task import times_table as tt

FIRST = 30          # steps of the run that one with --after goes on from
METRICS = ("avg@12", "maj@12", "pass@12")
ROOT = Path(__file__).resolve().parent.parent.parent
LEDGER = ROOT / "sd/ledger.jsonl"
Lines = list[dict]              # of the ledger
Arms = dict[str, Lines]         # an arm's name -> its runs, one per seed


@dataclass(frozen=True)
class Job:
    """One run: an arm of ARMS with one seed."""
    arm: str
    seed: int
    config: Config              # without --data and --val
    options: tuple[str, ...]    # what train.py is given
    facts: dict                 # what the run's result depends on, as the ledger has it
    extra: tuple[str, ...]      # those of the options that the user gave to every arm

    def find(self, ledger: Lines) -> dict | None:
        """The ledger's line of this run. An option that is newer than a line had its default."""
        defaults = options_of(Config())
        for row in ledger:
            facts = {name: row.get(name, "") for name in self.facts}
            facts["options"] = defaults | row["options"]
            if facts == self.facts:
                return row
        return None


def options_of(config: Config) -> dict:
    left_out = MACHINE | {"out", "data", "val"}     # `products` and `references` say which data
    return {name: value for name, value in asdict(config).items() if name not in left_out}


def make_job(arm: str, seed: int, extra: Sequence[str]) -> Job:
    """Ends like train.py if it refuses the options."""
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--products", type=int, default=tt.PRODUCTS)
    own.add_argument("--references", default="")
    own.add_argument("--after", default="")
    args, rest = own.parse_known_args(arm.split()[1:])
    options = ("--cond", arm.split()[0], *rest, *extra, f"--seed={seed}")
    config, _ = parse_config(argparse.ArgumentParser("train.py", allow_abbrev=False), options)
    facts = {"solver": solver_digest(), **vars(args), "options": options_of(config)}
    return Job(arm, seed, config, options, facts, tuple(extra))


@cache
def solver_digest() -> str:
    """Of all that ships: weights, architecture, tokenizer, problems. Texts count as parsed."""
    digest = sha256((EMBEDDED / "model.safetensors").read_bytes())
    for name in ("config.json", "tokenizer.json"):
        digest.update(repr(json.loads((EMBEDDED / name).read_bytes())).encode())
    for split in ("train", "val", "test"):
        digest.update(repr(embedded(split)).encode())
    return digest.hexdigest()


def problems_of(job: Job, out: Path) -> Path:
    """The folder of a job's problems; makes it when it is first needed."""
    products, references = job.facts["products"], job.facts["references"]
    made = f"{products}-{job.facts['solver'][:8]}"
    folder = EMBEDDED
    if products != tt.PRODUCTS:
        folder = out / f"problems/{made}"
        if not (folder / "test.jsonl").exists():
            make_problems(folder, *load(EMBEDDED), products)
    if not references:
        return folder
    written = out / f"problems/{made}-{references}"
    if not (written / "test.jsonl").exists():           # the last to be written
        for split in ("train", "val", "test"):
            problems = [replace(p, solution=reference(p, references))
                        for p in read_problems(folder / f"{split}.jsonl")]
            write_problems(written / f"{split}.jsonl", problems)
    return written


def run_command(*command: str) -> None:
    """Runs one of this project's commands. Raises UserError with its last line of stderr."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, text=True,
                            capture_output=True)
    if result.returncode:
        raise UserError(f"{' '.join(command)}: {' '.join(result.stderr.splitlines()[-1:])}")


def run(job: Job, out: Path) -> dict:
    """Trains and measures one arm and seed, unless that is done. Returns the ledger's line."""
    folder = folder_of(job, out)
    problems = problems_of(job, out)
    options = job.options
    begun = []
    if job.facts["after"]:
        first = make_job(f"{job.facts['after']} --steps {FIRST}", job.seed, job.extra)
        begun = run(first, out)["curve"]
        options += (f"--model={folder_of(first, out)}/best",)
    if not (folder / "test.json").exists():
        if any(folder.glob("state-*.safetensors")):
            run_command("train.py", f"--resume={folder}")       # does nothing if finished
        else:
            shutil.rmtree(folder, ignore_errors=True)           # killed before its first state
            data = [f"--data={problems}/train.jsonl", f"--val={problems}/val.jsonl"]
            run_command("train.py", *options, *data, f"--out={folder}")
        run_command(
            "eval.py", f"{folder}/best",
            f"--test={problems}/test.jsonl",
            f"--temperature={job.config.temperature}",          # measured as it was trained
            f"--max-new-tokens={job.config.max_new_tokens}",
            f"--json={folder}/test.json")
        print(f"done: {job.arm}, seed {job.seed}", flush=True)
    test = json.loads((folder / "test.json").read_text())
    return job.facts | {
        "test": {name: round(test[name]["mean"], 3) for name in METRICS},
        "curve": read_curve(folder / "metrics.jsonl", begun)}


def folder_of(job: Job, out: Path) -> Path:
    digest = sha256(json.dumps(job.facts).encode()).hexdigest()[:8]
    return out / f"runs/{job.config.cond}-seed{job.seed}-{digest}"


def read_curve(path: Path, begun: list[dict]) -> list[dict]:
    """A run's evaluations: what was spent until each, and diagnostics averaged since the last.

    It goes on from the curve `begun`, in whose last place it puts the weights that it begins with.
    """
    curve, since, rollouts = [], [], 0
    start = begun[-1] if begun else {"step": 0, "rollouts": 0, "tokens": 0}
    tokens = start["tokens"]
    for row in read_rows(path):
        if "loss" in row:
            tokens += row["length"] * (row["rollouts"] - rollouts)
            rollouts = row["rollouts"]
            since.append(row)
            continue
        avg, = (value for name, value in row.items() if name.startswith("val_avg@"))
        step = start["step"] + row["step"]
        if curve and curve[-1]["step"] == step:         # evaluated once more: best/ was lost
            curve[-1]["avg"] = avg
            continue
        curve.append({"step": step, "avg": avg,
                      "rollouts": start["rollouts"] + rollouts, "tokens": round(tokens)})
        if since:
            for name in ("entropy", "signal", "length"):
                average = np.mean([logged[name] for logged in since])
                curve[-1][name] = round(float(average), 4)
        since = []
    return begun[:-1] + curve


def measure(jobs: dict[str, list[Job]], ledger: Lines, out: Path, at_once: int) -> None:
    """Runs what the ledger lacks, all arms of a seed before the next seed, and adds it."""
    missing = []
    for row in zip(*jobs.values()):
        for job in row:
            if not job.find(ledger) and job.facts not in [other.facts for other in missing]:
                missing.append(job)
    if missing:
        print(f"{len(missing)} runs, {at_once} at a time, to {out}/runs; the same command, if "
              "stopped, goes on", flush=True)
    for job in missing:
        problems_of(job, out)
    with ThreadPoolExecutor(at_once) as pool:           # after a failure, nothing new begins
        for found in pool.map(lambda job: run(job, out), missing):
            ledger.append(found)
            own = [*read_rows(out / "ledger.jsonl"), found]
            write_atomic(out / "ledger.jsonl", "".join(json.dumps(row) + "\n" for row in own))
