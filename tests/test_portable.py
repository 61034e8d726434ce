"""sd/, train.py and eval.py run where POSIX's own calls are missing: on Windows, say."""
import subprocess
import sys

from safetensors.torch import load_file

from tests.conftest import ROOT, few_problems
from tests.test_hostile import SOURCES
from tests.test_runs import sampled

ELSEWHERE = """
import importlib, os, pkgutil, signal, sys
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None                            # its import fails
for name in ("fork", "forkpty", "kill", "killpg", "geteuid", "mkfifo", "O_DIRECTORY"):
    delattr(os, name)
opened = os.open
def no_folders(path, *args, **more):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", str(path))
    return opened(path, *args, **more)
os.open = no_folders

import eval, sd, train
for module in pkgutil.walk_packages(sd.__path__, "sd."):
    importlib.import_module(module.name)
base, step = sys.argv[1], train.accumulate
def asked_to_stop(*args):
    signal.raise_signal(signal.SIGTERM)
    return step(*args)
short = ["--cond", "critique", "--steps", "2", "--batch", "4", "--eval-samples", "1", *sys.argv[2:]]
def run(*args):
    sys.argv = ["train.py", *args]
    return train.main()
assert run(*short, "--out", f"{base}/whole") == 0
train.accumulate = asked_to_stop
assert run(*short, "--out", f"{base}/run") == 143
train.accumulate = step
assert run("--resume", f"{base}/run") == 0
sys.argv = ["eval.py", f"{base}/run/best", "--test", f"{base}/val.jsonl", "--samples", "1",
            "--json", f"{base}/n.json"]
assert eval.main() == 0
"""


def ahead(base):
    return base, subprocess.run([sys.executable, "-c", ELSEWHERE, base, *few_problems(base)], cwd=ROOT, text=True,
                                capture_output=True, stdin=subprocess.DEVNULL)


def test_without_posix_calls_everything_is_imported_and_a_run_is_trained_stopped_and_resumed(ahead):
    """Each atomic write opened its folder, which Windows refuses: no run got beyond its first file."""
    base, result = ahead["test_portable"].result()
    assert result.returncode == 0, result.stdout + result.stderr
    assert "after step 1; go on with: " in result.stderr and "from step 1\n" in result.stdout
    one, other = (load_file(base / name / "last/model.safetensors") for name in ("run", "whole"))
    assert all(one[name].equal(other[name]) for name in one) and one.keys() == other.keys()
    assert sampled(base / "run") == sampled(base / "whole")


def test_no_source_file_reads_what_linux_alone_has():
    for path in SOURCES:
        assert "/proc/" not in path.read_text() and "/dev/" not in path.read_text(), path
