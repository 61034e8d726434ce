"""Nothing from a stranger is run, printed raw, or able to break a parser: data, checkpoints, model output."""
import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from sd import UserError
from sd.llm.checkpoint import read_config
from sd.config import read_run_config as read_run
from sd.problems import EMBEDDED, embedded

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*ROOT.glob("sd/**/*.py"), ROOT / "train.py", ROOT / "eval.py"])
FORBIDDEN = {"pickle", "marshal", "shelve", "dill", "socket", "requests", "ctypes", "runpy", "code", "yaml"}
CALLS = {"eval", "exec", "compile", "__import__", "system", "popen", "execv", "load_module", "import_module"}
NETWORK, PROCESSES = {"client.py"}, {"ledger.py"}


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_source_file_can_run_what_it_reads(path):
    """No pickle, eval, exec, shell; network only to the critic's URL; processes only from lists of words."""
    tree = ast.parse(path.read_text())
    tops = {name.split(".")[0] for name in imported(tree)}
    assert not tops & FORBIDDEN
    assert not tops & {"urllib", "http", "ssl"} or path.name in NETWORK
    assert "subprocess" not in tops or path.name in PROCESSES
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            owner = (node.func.value.id if isinstance(node.func, ast.Attribute)
                     and isinstance(node.func.value, ast.Name) else "")
            assert name not in CALLS or owner in ("re", "torch"), f"{path.name}:{node.lineno} {owner}.{name}"
            assert (owner, name) not in {("torch", "load"), ("torch", "save")}, f"{path.name}:{node.lineno}"
            assert not any(k.arg == "shell" for k in node.keywords), f"{path.name}:{node.lineno}"
            assert not any(k.arg == "allow_pickle" for k in node.keywords), f"{path.name}:{node.lineno}"


@pytest.mark.parametrize("entry", [
    {"hidden_size": 10 ** 12}, {"num_hidden_layers": 2 ** 30},
    {"vocab_size": 2 ** 30, "hidden_size": 2 ** 20}, {"intermediate_size": -1}, {"head_dim": "\x1b[31m"},
    {"model_type": "\x1b]0;x\x07"}, {"rope_theta": float("nan")}])
def test_absurd_sizes_in_a_config_are_refused_before_anything_is_allocated(tmp_path, entry):
    raw = json.loads((EMBEDDED / "config.json").read_text()) | entry
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError) as error:
        read_config(tmp_path)
    assert "\x1b" not in str(error.value) and str(error.value).count("\n") == 0


@pytest.mark.parametrize("text", ["[" * 100_000, "{" * 100_000, "null", "[]", "\x00", '{"model_type": {}}',
                                  "1e999"])
def test_a_config_that_is_none_is_told(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    for read in (lambda: read_config(tmp_path), lambda: read_run(tmp_path / "config.json")):
        with pytest.raises(UserError):
            read()


def test_terminal_escapes_in_an_id_are_never_printed_raw(tmp_path, monkeypatch, capsys):
    import train
    row = {"id": "\x1b[2J\x1b]0;owned\x07", "problem": "7*8 " * 300, "answer": "1"}
    for name, more in (("data", ""), ("val", "+ 1")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row | {"problem": row["problem"] + more}) + "\n")
    monkeypatch.setattr("sys.argv", ["train.py", "--cond", "grpo", "--data", str(tmp_path / "data.jsonl"),
                                     "--val", str(tmp_path / "val.jsonl"), "--out", str(tmp_path / "out")])
    assert train.main() == 2
    shown = "".join(capsys.readouterr())
    assert "\x1b" not in shown and "\x07" not in shown and shown.strip() and not (tmp_path / "out").exists()


def test_a_path_in_an_id_writes_no_file_outside_the_run(tmp_path, monkeypatch):
    import train
    for name, split in (("data", "train"), ("val", "val")):
        rows = [p.__dict__ | {"id": f"../../{p.id}/../x\x00"[:-1]} for p in embedded(split)[:8]]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr("sys.argv", ["train.py", "--cond", "ref", "--data", str(tmp_path / "data.jsonl"),
                                     "--val", str(tmp_path / "val.jsonl"),
                                     "--out", str(tmp_path / "in" / "out"), "--batch", "4", "--steps", "1",
                                     "--eval-samples", "1"])
    assert train.main() == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data.jsonl", "in", "val.jsonl"]
    assert [p.name for p in (tmp_path / "in").iterdir()] == ["out"]


def ahead(base):
    options = ["-q", "-p", "no:cacheprovider", f"--basetemp={base}/fuzz"]
    return subprocess.run([sys.executable, "-m", "pytest", *options, "tests/fuzz.py"], cwd=ROOT, text=True,
                          capture_output=True)


def test_parsers_survive_2000_random_inputs_each(ahead):
    pytest.importorskip("hypothesis")
    result = ahead["test_hostile"].result()
    assert result.returncode == 0, result.stdout
