"""`trainer`: runs of train.py in their own processes, but one slow import of PyTorch; `here`: in this one."""
import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")   # for this process, too: the runs beside it have the other cores

import train
from sd.problems import EMBEDDED, Problem
from sd.task import times_table as tt
from sd.task.corpus import random_pairs

ROOT = Path(__file__).parent.parent


def easy_problems(count, seed=0):
    """Of two products, which the embedded solver gets right now and then: grpo has a signal soon."""
    rng, problems = random.Random(seed), []
    for i in range(count):
        pairs = random_pairs(rng, 2)
        answer = str(sum(a * b for a, b in pairs))
        problems.append(Problem(f"easy-{i}", tt.write_problem(pairs), answer, tt.reference_text(pairs)))
    return problems


SERVER = """
import ctypes, json, os, resource, signal, sys, train, torch._dynamo      # once; each line is a run, forked
for line in sys.stdin:
    args, log, measured, room = json.loads(line)
    if (pid := os.fork()) == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for option in (-1, -3) if measured else ():   # M_TRIM_ and M_MMAP_THRESHOLD: freed memory goes back
            ctypes.CDLL(None).mallopt(option, 2 ** 16)
        if room:                            # bytes of address space beside what is taken already
            taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (taken + room, taken + room))
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
        os.dup2(1, 2)
        sys.argv = ["train.py", *args]
        code = train.main()
        sys.stdout.flush()
        os._exit(code)
    print(pid, flush=True)
    sys.stdin.readline()                # only now may the process id be given to another
    _, status, used = os.wait4(pid, 0)
    print(os.waitstatus_to_exitcode(status), used.ru_maxrss * 1024, flush=True)
"""


def few_problems(base):
    """The options for a few of the embedded problems, which are written into the folder `base`."""
    for split, count in (("train", 40), ("val", 8)):
        lines = (EMBEDDED / f"{split}.jsonl").read_text().splitlines(keepends=True)
        (base / f"{split}.jsonl").write_text("".join(lines[:count]))
    return ["--data", str(base / "train.jsonl"), "--val", str(base / "val.jsonl")]


class Trainer:
    """trainer(args, when, number) -> exit code and output; `when` says from the output so far when to signal.

    `room` limits its memory, in bytes. With `measured`, `peak` is then the most memory in use at once, in
    bytes. Without --data, a few embedded problems.
    """

    def __init__(self, base):
        self.base, self.data = base, few_problems(base)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        self.server = subprocess.Popen([sys.executable, "-c", SERVER], cwd=ROOT, text=True, env=environment,
                                       stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __call__(self, args, when=lambda text: False, number=signal.SIGKILL, measured=False, room=0):
        (log := self.base / "log").write_text("")
        if not {"--data", "--resume"} & set(args):
            args = [*args, *self.data]
        print(json.dumps([list(map(str, args)), str(log), measured, room]), file=self.server.stdin,
              flush=True)
        pid = int(self.server.stdout.readline())
        assert pid > 1
        while Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[0] != "Z":
            if when(log.read_text()):
                os.kill(pid, number)
                break
            time.sleep(0.002)
        print(file=self.server.stdin, flush=True)
        code, self.peak = map(int, self.server.stdout.readline().split())
        return code, log.read_text()

    def close(self):
        self.server.stdin.close()
        self.server.wait(timeout=60)


@pytest.fixture(scope="session", autouse=True)
def ahead(request, tmp_path_factory):
    """Processes that a test file needs, its `ahead(folder)`, begin at once and run beside earlier tests."""
    modules = {item.module.__name__.split(".")[-1]: item.module for item in request.session.items}
    with ThreadPoolExecutor(1) as pool:
        yield {name: pool.submit(module.ahead, tmp_path_factory.mktemp(name))
               for name, module in modules.items() if hasattr(module, "ahead")}


@pytest.fixture(scope="session")
def trainer(tmp_path_factory):
    trainer = Trainer(tmp_path_factory.mktemp("trainer"))
    yield trainer
    trainer.close()


@pytest.fixture
def here(monkeypatch, capsys):
    """train.py in this process: exit code and what it printed."""
    def run(*args):
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, args)])
        try:
            code = train.main()
        except SystemExit as end:
            code = end.code
        out, err = capsys.readouterr()
        return code, out + err
    return run
