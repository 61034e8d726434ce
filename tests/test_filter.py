"""`python -m sd.filter`: counts of right rollouts, what is kept, and going on after a stop."""
import json
import re
import shutil
import sys
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file

from sd import filter
from sd.llm.checkpoint import load
from sd.llm.sampling import sample, uniforms
from sd.problems import EMBEDDED, read_problems
from sd.prompts import student_prompt
from tests.conftest import easy_problems

PROBLEMS = easy_problems(12)
OPTIONS = ["--samples", "8", "--max-correct", "0", "--sample-batch", "16"]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    def run(*args, problems=12):
        data = tmp_path / "data.jsonl"
        data.write_text("".join(json.dumps({"id": p.id, "problem": p.problem, "answer": p.answer}) + "\n"
                                for p in PROBLEMS[:problems]))
        monkeypatch.setattr(sys, "argv", ["sd.filter", "--data", str(data),
                                          "--out", str(tmp_path / "hard.jsonl"), *OPTIONS, *args])
        return filter.main(), *capsys.readouterr()
    return run


def test_it_keeps_what_is_never_solved_when_sampled_one_problem_at_a_time(run, tmp_path):
    status, shown, _ = run()
    assert status == 0 and "12 of 12  kept " in shown
    model, tokenizer = load(EMBEDDED)
    kept = {p.id for p in read_problems(tmp_path / "hard.jsonl")}
    for p in PROBLEMS:
        out = sample(model, [student_prompt(tokenizer, p.problem)], tokenizer.eos, 128, 1.1, 8,
                     uniforms(8, 128, 0, "filter", filter.key(p)))
        right = sum(tokenizer.decode(c).endswith(f"<answer> {p.answer} </answer>") for c in out.completions())
        assert (p.id in kept) == (right == 0)
    assert 0 < len(kept) < 12       # the test's own premise


def test_a_stopped_run_goes_on_and_ends_the_same(run, tmp_path):
    run()
    whole, counts = (tmp_path / "hard.jsonl").read_bytes(), tmp_path / "hard.jsonl.counts.jsonl"
    lines = counts.read_text().split("\n")
    counts.write_text("\n".join(lines[:6]) + "\n" + lines[6][:9])       # killed in the middle of a line
    (tmp_path / "hard.jsonl").unlink()
    status, shown, _ = run()
    assert status == 0 and (tmp_path / "hard.jsonl").read_bytes() == whole
    assert counts.read_text().split("\n") == lines


def test_a_changed_problem_is_counted_anew_though_its_id_stays(run, tmp_path):
    run(problems=3)
    data, counts = tmp_path / "data.jsonl", tmp_path / "hard.jsonl.counts.jsonl"
    text = data.read_text().splitlines()
    text[1] = json.dumps(json.loads(text[1]) | {"answer": "-1"})
    data.write_text("\n".join(text))
    assert filter.main() == 0
    assert [json.loads(line)["id"] for line in counts.read_text().splitlines()[1:]] == [
        "easy-0", "easy-1", "easy-2", "easy-1"]


def test_what_a_critic_can_solve_is_kept_by_its_least_count(run, tmp_path):
    run("--max-correct", "8")
    everything = {json.loads(line)["id"]: json.loads(line)["correct"]
                  for line in (tmp_path / "hard.jsonl.counts.jsonl").read_text().splitlines()[1:]}
    run("--max-correct", "8", "--min-correct", "1")
    kept = {p.id for p in read_problems(tmp_path / "hard.jsonl")}
    assert kept == {name for name, count in everything.items() if count} and 0 < len(kept) < 12


def test_hard_means_at_most_a_quarter_right_unless_told(run, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "OPTIONS", ["--samples", "8"])
    assert "with 0 to 2 right of 8" in run(problems=2)[1]


@pytest.mark.parametrize("text", ["\udcff", "[" * 100_000, "{}\n{}\n", "",
                                  '{}\n{"problem": "x", "correct": "many"}\n', "null\n3\n"])
def test_a_file_that_holds_no_counts_is_told(run, tmp_path, text):
    (tmp_path / "hard.jsonl.counts.jsonl").write_bytes(text.encode("utf-8", "surrogateescape"))
    status, _, errors = run(problems=2)
    assert status == 2 and "not the counts of an earlier run" in errors and errors.count("\n") == 1


def test_counts_of_another_setting_are_not_mixed_in(run, tmp_path):
    run(problems=2)
    status, _, errors = run("--seed", "1", problems=2)
    assert status == 2 and "'seed': '1'" in errors and errors.count("\n") == 1


def test_copies_of_a_problem_are_sampled_and_kept_once(run, tmp_path, monkeypatch):
    """Data sets with several solutions per problem have it in several lines, each with another id."""
    rows = [{"id": str(i), "problem": p.problem, "answer": p.answer}
            for i, p in enumerate(PROBLEMS[:3] * 2)]
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, shown, _ = run("--data", str(tmp_path / "all.jsonl"), "--max-correct", "8")
    assert status == 0 and "3 different problems of 6" in shown and "3 of 3  kept 3" in shown
    assert [p.id for p in read_problems(tmp_path / "hard.jsonl")] == ["0", "1", "2"]


def test_it_stops_when_enough_are_kept(run, tmp_path):
    assert run("--max-correct", "8", "--enough", "3")[0] == 0          # two at a time: four were tried
    assert [p.id for p in read_problems(tmp_path / "hard.jsonl")] == [p.id for p in PROBLEMS[:3]]
    assert len((tmp_path / "hard.jsonl.counts.jsonl").read_text().splitlines()) == 1 + 4
    assert run("--max-correct", "8", "--enough", "4")[0] == 0           # these four are just enough
    assert len((tmp_path / "hard.jsonl.counts.jsonl").read_text().splitlines()) == 1 + 4
    assert run("--max-correct", "8")[0] == 0                            # and on
    assert len(read_problems(tmp_path / "hard.jsonl")) == 12


def test_the_time_left_is_that_until_enough_are_kept(run, monkeypatch, tmp_path):
    """Of 12 problems, two in each 10 seconds, of which one is kept."""
    now = [0.0]

    def count(model, tokenizer, problems, *of):
        now[0] += 10
        return [0, 9]

    monkeypatch.setattr(filter, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(filter, "count", count)
    assert re.findall(r"(\d+) s left", run("--enough", "3")[1]) == ["20", "10", "0"]
    (tmp_path / "hard.jsonl.counts.jsonl").unlink()
    assert re.findall(r"(\d+) s left", run("--enough", "9")[1]) == ["50", "40", "30", "20", "10", "0"]
    counts = tmp_path / "hard.jsonl.counts.jsonl"
    counts.write_text("".join(counts.read_text().splitlines(keepends=True)[:5]))
    assert re.findall(r"(\d+) s left", run()[1])[2:] == ["30", "20", "10", "0"]      # four were counted before


def test_a_solver_whose_weights_are_not_finite_counts_nothing(run, tmp_path):
    model = shutil.copytree(EMBEDDED, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"].fill_(float("nan"))
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    status, _, errors = run("--model", str(model), problems=2)
    assert status == 2 and "not finite" in errors and errors.count("\n") == 1
    assert not (tmp_path / "hard.jsonl").exists()
    assert len((tmp_path / "hard.jsonl.counts.jsonl").read_text().splitlines()) == 1


def test_the_counts_file_holds_a_short_line_per_problem(run, tmp_path):
    run(problems=3)
    settings, *rows = map(json.loads, (tmp_path / "hard.jsonl.counts.jsonl").read_text().splitlines())
    assert settings["seed"] == "0" and settings["samples"] == "8"
    assert [row["id"] for row in rows] == ["easy-0", "easy-1", "easy-2"]
    assert all(row.keys() == {"id", "problem", "correct"} and len(row["problem"]) == 16 for row in rows)


def test_data_is_not_overwritten(run, tmp_path):
    with pytest.raises(SystemExit):
        run("--out", str(tmp_path / "data.jsonl"))
    assert len(read_problems(tmp_path / "data.jsonl")) == 12
