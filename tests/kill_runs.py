"""Kills a run by SIGKILL again and again, resumes it and compares its end with a run left alone, bit for bit.

    python -m tests.kill_runs 20

Two kills of three come at a random moment; the third as soon as a file is half written.
"""
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.conftest import ROOT
from tests.test_runs import assert_same

OPTIONS = ["--cond", "critique", "--lora-rank", "4", "--teacher", "ema", "--batch", "8",
           "--eval-samples", "1", "--eval-every", "2"]


def start(log, *args):
    return subprocess.Popen([sys.executable, "-u", "train.py", *map(str, args)], cwd=ROOT,
                            stdout=log, stderr=log)


def half_written(folder):
    return next((p.name for p in folder.rglob("*tmp*")), None) if folder.exists() else None


def main(kills: int) -> int:
    base, rng = Path(tempfile.mkdtemp(prefix="kill_runs-")), random.Random()
    steps, whole, out, log = ["--steps", 3 * kills], base / "whole", base / "run", base / "log"
    begin = time.time()
    with open(log, "w") as file:
        assert start(file, *OPTIONS, *steps, "--out", whole).wait() == 0, log.read_text()
    seconds = time.time() - begin
    print(f"left alone: {3 * kills} steps in {seconds:.0f} s", flush=True)
    n = 0
    while n < kills:
        resume = any(out.glob("state-*.safetensors"))
        if not resume:
            shutil.rmtree(out, ignore_errors=True)              # killed before it was a run
        begin, moment = time.time(), rng.uniform(1, 5 + seconds / kills)
        with open(log, "w") as file:
            process = start(file, *(["--resume", out] if resume else [*OPTIONS, *steps, "--out", out]))
        half = None
        while process.poll() is None and (time.time() - begin < moment or n % 3 == 2 and not half):
            half = half_written(out) if n % 3 == 2 and time.time() - begin > moment else None
            time.sleep(0.0005)
        half = half or half_written(out)
        process.kill()
        code, lines = process.wait(), log.read_text().splitlines() or ["(nothing said yet)"]
        if code == 0:                                           # it was faster: once more from the beginning
            assert_same(out, whole)
            shutil.rmtree(out)
            continue
        assert code == -9, lines
        n += 1
        half = f"half written: {half}" if half else "no file half written"
        print(f"kill {n:2d} after {time.time() - begin:5.2f} s, {half:45s} last said: {lines[-1][:40]}",
              flush=True)
    with open(log, "w") as file:
        assert start(file, "--resume", out).wait() == 0, log.read_text()
    assert_same(out, whole)
    print(f"{n} kills: parameters, state, metrics and rollouts are those of the run that was left alone, "
          "bit for bit")
    shutil.rmtree(base)
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])) if sys.argv[1:] and sys.argv[1].isdecimal() else __doc__)
