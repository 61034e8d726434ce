"""Two processes under torchrun, and batches in parts, train the same weights on the same rollouts as one."""
import json
import os
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from sd import UserError
from sd.run import ranks
from sd.run.ranks import Ranks
from sd.problems import EMBEDDED, write_problems
from tests.conftest import easy_problems
from tests.test_runs import sampled

ROOT = Path(__file__).parent.parent
CONDITIONS = ["grpo", "ref", "critique"]
LR = 2e-5       # where a gradient is all but 0, AdamW makes a step of this size out of rounding
WORKER = """
import json, os, sys, train
import torch.distributed as dist
jobs, address = json.loads(sys.argv[1]), dict(os.environ)
for args, expected, port in jobs:       # torchrun's own store serves one process group: the last job's
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": port} if port else address
    sys.argv = ["train.py", *args]
    code = train.main()
    if not port or code != expected[int(os.environ["RANK"])]:
        sys.exit(code or 99)
    if dist.is_initialized():
        dist.destroy_process_group()
"""


def options(base, name, *more):
    return list(map(str, ["--cond", name.split()[0], "--steps", 3, "--batch", 8, "--group", 4,
                          "--eval-samples", 1, "--lr", LR, "--max-new-tokens", 40 if "grpo" in name else 24,
                          "--data", base / "train.jsonl", "--val", base / "val.jsonl",
                          "--out", base / name.replace(" ", "-"), *more]))


def ahead(base):
    """One torchrun: an --out that exists already, each condition, and a batch too small."""
    problems = easy_problems(29)
    write_problems(base / "train.jsonl", problems[:24])
    write_problems(base / "val.jsonl", problems[24:])           # 5: the two ranks have unequal shares
    (base / "ref-taken").mkdir()
    jobs = [(options(base, "ref taken"), (2, 2)),
            *((options(base, f"{name} two"), (0, 0)) for name in CONDITIONS),
            (options(base, "ref none", "--batch", 1), None)]
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in jobs[1:]]
    ports = [str(s.getsockname()[1]) for s in sockets] + [None]
    for s in sockets:
        s.close()
    (base / "worker.py").write_text(WORKER)
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", base / "worker.py",
         json.dumps([(*job, port) for job, port in zip(jobs, ports)])], cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(ROOT)},
        text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        out, err = process.communicate(timeout=600)     # it is much slower beside other programs
    finally:
        process.terminate()
        process.wait()
    return base, subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.fixture(scope="module")
def two(ahead):
    return ahead["test_ranks"].result()[1]


@pytest.fixture(scope="module")
def base(ahead):
    """Runs of one process: each condition, and one in small parts."""
    base, before = ahead["test_ranks"].result()[0], sys.argv
    for name in [*CONDITIONS, "critique parts"]:
        more = ["--sample-batch", 3, "--micro-batch", 2] if "parts" in name else []
        sys.argv = ["train.py", *options(base, name, *more)]
        assert train.main() == 0
    sys.argv = before
    return base


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same(one, other):
    assert sampled(one) == sampled(other)
    assert len((one / "rollouts.jsonl").read_text().splitlines()) == 12
    for mine, theirs in zip(rows(one), rows(other), strict=True):
        mine.pop("seconds"), theirs.pop("seconds")
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    weights, others = load_file(one / "last/model.safetensors"), load_file(other / "last/model.safetensors")
    initial = load_file(EMBEDDED / "model.safetensors")
    assert max((w - initial[name]).abs().max() for name, w in weights.items()) > 2 * LR     # it has learned
    torch.testing.assert_close(weights, others, atol=1e-6, rtol=0)


@pytest.mark.parametrize("cond", CONDITIONS)
def test_two_processes_train_as_one(base, two, cond):
    assert_same(base / f"{cond}-two", base / cond)


def test_parts_of_a_batch_change_nothing(base):
    assert_same(base / "critique-parts", base / "critique")


def test_only_rank_0_prints(base, two):
    lines = two.stdout.splitlines()
    for cond in CONDITIONS:
        assert len([line for line in lines if line.startswith(f"{cond}: 3 steps of 8")]) == 1
        assert len([line for line in lines if f"python eval.py {base / cond}-two/best --temperature" in line]) == 1
    assert len([line for line in lines if line.startswith("step    2/3  loss")]) == 3


def test_an_error_that_all_find_is_told_in_a_sentence_and_ends_all_processes(base, two):
    """The others, waiting for the one that knew, ended in tracebacks of their own."""
    ours = two.stderr.split("torch/distributed/elastic")[0]
    assert two.returncode != 0 and "Traceback" not in ours, two.stderr
    assert "another process of this run has ended" not in ours
    sentences = [line for line in two.stderr.splitlines() if line.startswith("train.py: ")]
    assert len(sentences) <= 4 and len(set(sentences)) == 2, two.stderr
    assert sentences[0].startswith(f"train.py: --out {base / 'ref-taken'} exists already")
    assert sentences[-1].startswith("train.py: 2 processes are more than --batch")


def test_a_step_without_any_gradient_has_none_with_two_processes_either(monkeypatch):
    """Zeros in its place moved AdamW on by its momentum; one process did nothing in such a step of grpo."""
    both, elsewhere, parameters = (Ranks(torch.device("cpu")), 0.0,
                                   [torch.nn.Parameter(torch.ones(2)) for _ in range(3)])
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, **of: tensor.add_(elsewhere))
    both.world, both.group = 2, None
    both.sum_gradients(parameters)
    assert all(p.grad is None for p in parameters)
    elsewhere, parameters[1].grad = 2.0, torch.ones(2)
    both.sum_gradients(parameters)
    assert [p.grad.tolist() for p in parameters] == [[2, 2], [3, 3], [2, 2]]


def test_a_rank_whose_launcher_has_died_gives_up_soon(monkeypatch):
    """It waited for two hours: as long as for another's longest rollouts."""
    assert ranks.MEET.total_seconds() <= 120
    monkeypatch.setattr(ranks, "MEET", timedelta(seconds=1))
    with socket.create_server(("127.0.0.1", 0)) as taken:       # a port where nobody answers
        address = {"RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": taken.getsockname()[1]}
    for name, value in address.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match="another process of this run has ended"):
        Ranks(torch.device("cpu"))


@pytest.mark.parametrize("world, count", [(1, 7), (2, 7), (3, 7), (4, 3), (8, 64)])
def test_shares_cover_everything_once_and_differ_by_one(monkeypatch, world, count):
    shares = []
    for rank in range(world):
        one = Ranks(torch.device("cpu"))
        one.rank, one.world = rank, world
        shares.append(list(range(count))[one.share(count)])
    assert sum(shares, []) == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
