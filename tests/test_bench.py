"""The benchmark on the smallest sizes: every part measures something, and the table says it."""
import importlib.util
import json
import sys

import pytest
import torch

from sd import UserError
from tests import bench

SMALL = ["--batch", "3", "--prompt", "4", "--tokens", "5", "--hidden", "8", "--threads", "1", "--repeat", "2"]


def run(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["tests.bench", *map(str, args)])
    return bench.main()


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(bench, "in_a_process", bench.measure)
    for name, value in dict(VOCABULARY=700, LOSS_TOKENS=50, CHUNK=700 * 20, COPIED=2 ** 20, SIDE=256).items():
        monkeypatch.setattr(bench, name, value)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_every_part_is_timed_and_split(small, tmp_path, capsys, monkeypatch):
    assert run(monkeypatch, *SMALL, "--json", tmp_path / "out.json") == 0
    results, table = json.loads((tmp_path / "out.json").read_text()), capsys.readouterr().out
    assert tuple(results) == bench.PARTS
    for name in bench.PARTS[1:]:
        seconds = results[name]["seconds"].values()
        assert (seconds and all(s > 0 for s in seconds) and results[name]["peak bytes"] > 2 ** 26
                and f"\n{name} " in table)
    assert list(results["critique"]["seconds"]) == [
        "sample", "critic", "teacher", "student forward", "loss and backward", "optimiser"]
    assert "teacher" not in results["grpo"]["seconds"] and "critic" not in results["ref"]["seconds"]


def test_transformers_is_measured_in_turns_on_the_same_tokens(small, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    order, measure = [], bench.measure
    monkeypatch.setattr(bench, "in_a_process",
                        lambda args, name: (order.append(name), measure(args, name))[1])
    assert run(monkeypatch, *SMALL, "--parts", "generation", "--peer", "transformers") == 0
    assert order == ["machine", "generation", "transformers generation"] * 2


def test_a_peer_that_is_not_installed_is_told_in_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert run(monkeypatch, "--peer", "trl") == 2
    assert capsys.readouterr().err == (
        "tests.bench: --peer trl is not installed here; pip install trl, or leave it out\n")


def test_a_part_that_fails_says_why_in_one_line():
    args = type("Args", (), {"given": ["--model", "nowhere"]})
    with pytest.raises(UserError, match="^generation: .*nowhere: no such folder"):
        bench.in_a_process(args, "generation")
