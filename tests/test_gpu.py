"""`python -m tests.gpu` on the CPU, with small shapes: every part runs, and a wrong GPU would not pass."""
import json
import os
import subprocess
import sys

import pytest
import torch

import sd.llm.compile
from sd.llm.compile import next_logits
from tests import gpu, gpu_checks
from tests.conftest import ROOT


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Exit status, the parts of the JSON by name, and the table."""
    def run(*args):
        out = tmp_path / "out.json"
        monkeypatch.setattr(sys, "argv", ["tests.gpu", "--device", "cpu", "--tiny", "--json", str(out), *args])
        try:
            status = gpu.main()
        except SystemExit as end:
            status = end.code
        return status, {row["part"]: row for row in json.loads(out.read_text())["rows"]}, capsys.readouterr().out
    return run


PARTS = ["logits bfloat16", "decode bfloat16", "step critique", "train.py critique", "train.py --resume",
         "speed machine", "speed decode 32", "speed step critique", "memory eager"]


def ahead(folder):
    command = [sys.executable, "-m", "tests.gpu", "--device", "cpu", "--tiny", "--parts", ",".join(PARTS),
               "--json", str(folder / "out.json")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"})
    return result, json.loads((folder / "out.json").read_text())["rows"]


def test_a_part_of_each_kind_runs_and_is_in_the_table(ahead):
    """.ci/run runs all."""
    result, rows = ahead["test_gpu"].result()
    rows = {row["part"]: row for row in rows}
    assert {name: row["status"] for name, row in rows.items()} == dict.fromkeys(PARTS, "passed"), result.stdout
    assert result.returncode == 0 and all(f"\n{name} " in result.stdout for name in rows)
    assert rows["train.py --resume"]["numbers"]["resumed"] == 0
    for name in ("eager", "compiled"):
        assert rows["speed decode 32"]["numbers"][name]["tokens/s"] > 0
        assert rows["speed step critique"]["numbers"][name]["seconds"].keys() == {
            "sample", "critic", "student forward", "teacher", "loss and backward", "optimiser"}


@pytest.mark.parametrize("change", [lambda logits: logits.roll(1, -1), lambda logits: logits * torch.nan])
def test_a_captured_step_that_samples_other_tokens_is_found_and_other_parts_still_run(
        change, run, monkeypatch):
    """A largest difference taken with Python's max was 0.0 when it was not a number."""
    def wrong(function):
        assert function is next_logits
        return lambda *inputs: change(function(*inputs))
    monkeypatch.setattr(sd.llm.compile, "traced", wrong)
    status, rows, table = run("--parts", "decode float32,speed machine")
    assert status == 1 and "FAILED" in table
    assert {name: row["status"] for name, row in rows.items()} == {
        "decode float32": "FAILED", "speed machine": "passed"}
    assert "log-probabilities" in rows["decode float32"]["detail"]


def test_a_part_that_cannot_run_says_why_and_is_no_failure(run, monkeypatch):
    monkeypatch.setattr(gpu_checks.Lab, "free", property(lambda lab: 3.0))
    status, rows, _ = run("--parts", "decode bfloat16,speed machine")
    assert status == 0 and rows["decode bfloat16"]["status"] == "skipped"
    assert rows["decode bfloat16"]["detail"] == "needs 12.0 GiB, 3.0 are free"
    status, rows, _ = run("--parts", "logits", "--minutes", "-1")
    assert {row["detail"] for row in rows.values()} == {"no time is left"}


def test_without_a_gpu_one_sentence_says_so(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tests.gpu", "--device", "cuda:7"])
    assert gpu.main() == 2
    assert capsys.readouterr().err.startswith("tests.gpu: --device cuda:7: not available here")
