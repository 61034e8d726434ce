"""The report: numbers of handwritten logs, texts that stay texts, broken folders, the page in a browser."""
import json
import re
import shutil
import subprocess
import sys
from html import unescape

import pytest

import train
from sd import UserError, report
from sd.report import page, read_run, write_report
from sd.problems import EMBEDDED, embedded

EVIL = "<script>alert(1)</script></style>\u2028<!-- & \ud800 \U0001f600"
TRAINED = [
    {"step": 1, "loss": 0.13615114986896515, "reward": 0.03125, "length": 47.75, "truncated": 0.0,
     "entropy": 0.0907, "grad_norm": 0.2358, "rollouts": 32, "critique_malformed": 0, "seconds": 3.93},
    {"step": 2, "loss": -1e-05, "reward": 0.5, "length": 48, "truncated": 0.25, "entropy": 0.08,
     "grad_norm": 7e6, "rollouts": 64, "critique_malformed": 0, "seconds": 4.59}]
VALIDATED = [
    {"step": 0, "val_avg@4": 4.25, "val_length": 48.3, "val_truncated": 0.0, "seconds": 3.18},
    {"step": 2, "val_avg@4": 63.24999999999999, "val_length": 48.1, "val_truncated": 0.0, "seconds": 131.4}]
METRICS = [VALIDATED[0], *TRAINED, VALIDATED[1]]
TRACE = ("<step_1> 7*8=56 </step_1>\n<step_2> 6*9=52 </step_2>\n"
         "<step_3> 56+52=108 </step_3>\n<answer> 108 </answer>")
RIGHT = TRACE.replace("52", "54").replace("108", "110")
WRONG = {"id": "a", "problem": "7*8 + 6*9", "right_answer": "110", "reference": "56 and 54",
         "trace": TRACE, "reward": 0.0, "tokens": 40, "truncated": False,
         "shortened": False}
FED = WRONG | {"critique": RIGHT, "case": "D", "malformed": ""}
GOOD = WRONG | {"trace": RIGHT, "reward": 1.0, "critique": RIGHT, "case": "A", "malformed": ""}


def write_run(folder, metrics=METRICS, rollouts=({"step": 1, **FED}, {"step": 2, **GOOD}), **config):
    folder.mkdir(parents=True)
    config = {"cond": "critique", "seed": 0, "lr": 1e-3, "teacher": "base", "out": str(folder)} | config
    (folder / "config.json").write_text(json.dumps(config))
    for name, rows in ("metrics", metrics), ("rollouts", rollouts):
        (folder / f"{name}.jsonl").write_text("".join(
            (row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return folder


def constant(name):
    raise AssertionError(f"{name} is not JSON")


def data_of(html):
    text, = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)
    return json.loads(text, parse_constant=constant)["runs"]


def told(folder):
    """The page's only run."""
    run, = data_of(page([read_run(folder)]))
    return run


def test_the_page_holds_the_numbers_of_the_logs(tmp_path):
    run = told(write_run(tmp_path / "a", seed=3))
    for key in ("step", "loss", "reward", "length", "truncated", "entropy", "grad_norm", "rollouts"):
        assert run["train"][key] == [row[key] for row in TRAINED]
    assert run["val"] == {"step": [0, 2], "rollouts": [0, 64], "avg": [4.25, 63.24999999999999]}
    assert (run["name"], run["cond"], run["seed"], run["k"], run["seconds"]) == (
        "a", "critique", 3, "4", 131.4)
    assert run["samples"] == [[[{key: row[key] for key in report.SAMPLE}]
                               for row in ({"step": 1, **FED}, {"step": 2, **GOOD})]]


@pytest.mark.parametrize("logged, shown", [     # problem and step of each rollout
    ("c1 a1 b1 b2 c2 a4 c4 c4 a7 b7 d7", ["a1|a7", "b1|b7", "c1|c4c4"]),        # the longest times apart
    ("a1 a1 b2 b2", ["a1a1", "b2b2"]),                                          # none was logged twice
    ("a1 b2 c3 d4 e5 f6 g7 h8", ["a1", "b2", "c3", "f6", "g7", "h8"]),          # first and last ones
    ("a1 b2 c3 d4 e5 f6 g7 a8 b8 c8 d8 e8 f8 g8", ["a1|a8", "b2|b8", "c3|c8", "d4|d8", "e5|e8", "f6|f8"]),
    ("", []),
])
def test_a_problem_is_shown_when_it_first_came_up_and_when_it_last_did(tmp_path, logged, shown):
    rows = [WRONG | {"problem": name, "step": int(step)} for name, step in logged.split()]
    samples = told(write_run(tmp_path / "a", rollouts=rows))["samples"]
    assert ["|".join("".join(f"{row['problem']}{row['step']}" for row in rows) for rows in steps)
            for steps in samples] == shown
    (tmp_path / "a/rollouts.jsonl").unlink()            # stopped before the first step
    assert told(tmp_path / "a")["samples"] == []


@pytest.mark.parametrize("end", ['{"step": 3, "loss": 0.1, "rew', "{", '{"step": 3, "id": "\\u20', "\0\0\0",
                                 '"', "   "])
def test_a_half_written_last_line_is_left_out(tmp_path, end):
    folder = write_run(tmp_path / "a")
    whole = told(folder)
    for name in ("metrics", "rollouts"):
        with open(folder / f"{name}.jsonl", "a") as file:
            file.write(end)
    assert told(folder) == whole
    with open(folder / "metrics.jsonl", "a") as file:   # with a line's end it is no unfinished line
        file.write("\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 5: is not JSON"):
        read_run(folder)


def test_a_last_line_without_its_newline_counts_if_it_is_whole(tmp_path):
    folder = write_run(tmp_path / "a")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps(TRAINED[0] | {"step": 3}))
    assert told(folder)["train"]["step"] == [1, 2, 3]


def test_what_is_not_finite_or_missing_is_null(tmp_path):
    odd = ['{"step": 1, "loss": NaN, "reward": Infinity, "length": -Infinity, "seconds": 1.5}',
           '{"step": 2}', '{"step": 3, "val_avg@4": NaN}', '{"step": 4, "val_avg@4": 50}']
    rollouts = ['{"step": 1}', '{"step": 9, "reward": NaN, "trace": null}']
    run = told(write_run(tmp_path / "a", odd, rollouts, lr=float("nan")))
    assert run["train"]["step"] == [1, 2] and run["seconds"] == 1.5
    assert all(of == [None, None] for key, of in run["train"].items() if key != "step")
    assert run["val"] == {"step": [3, 4], "rollouts": [None, None], "avg": [None, 50]}
    assert [row["step"] for (row,) in run["samples"][0]] == [1, 9]
    assert all(value is None for (row,) in run["samples"][0] for key, value in row.items() if key != "step")


BROKEN = {      # name -> what breaks a run, the facts that its one sentence tells
    "absent": (shutil.rmtree, ["is not the folder of a run"]),
    "no config": (lambda f: (f / "config.json").unlink(), ["is not the folder of a run"]),
    "a checkpoint": (lambda f: (f / "config.json").write_text('{"vocab_size": 3}'),
                     ["is not the folder of a run"]),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), ["is not the folder of a run"]),
    "no metrics": (lambda f: (f / "metrics.jsonl").unlink(), ["metrics.jsonl", "no line"]),
    "empty metrics": (lambda f: (f / "metrics.jsonl").write_text(""), ["metrics.jsonl", "no line"]),
    "metrics a folder": (lambda f: ((f / "metrics.jsonl").unlink(), (f / "metrics.jsonl").mkdir()),
                         ["metrics.jsonl"]),
    "bytes": (lambda f: (f / "metrics.jsonl").write_bytes(b'{"step": 1}\n\xff\xfe\n'),
              ["metrics.jsonl, line 2"]),
    "garbage": (lambda f: (f / "rollouts.jsonl").write_text('{"step": 1}\n{"st\n{"step": 1}\n'),
                ["ts.jsonl, line 2"]),
}


def run(capsys, monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["sd.report", *map(str, args)])
    try:
        status = report.main()
    except SystemExit as end:
        status = end.code
    return status, *capsys.readouterr()


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_run_is_told_in_a_sentence(name, tmp_path, capsys, monkeypatch):
    good, bad = write_run(tmp_path / "good"), write_run(tmp_path / "bad")
    spoil, facts = BROKEN[name]
    spoil(bad)
    status, out, err = run(capsys, monkeypatch, good, bad, "--out", tmp_path / "r.html")
    assert status == 2 and out == "" and err.startswith("sd.report: ") and err.count("\n") == 1, err
    assert all(fact in err for fact in [str(bad), *facts]) and not (tmp_path / "r.html").exists()


def test_the_command_writes_into_the_run_or_beside_several(tmp_path, capsys, monkeypatch):
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", cond="grpo")
    monkeypatch.chdir(tmp_path)
    assert run(capsys, monkeypatch, a) == (0, f"written: {a}/report.html\n", "")
    assert run(capsys, monkeypatch, "a", "b/") == (0, "written: report.html\n", "")
    assert [r["name"] for r in data_of((tmp_path / "report.html").read_text())] == ["a", "b"]
    assert (run(capsys, monkeypatch, a, "--out", tmp_path / "new/r.html")[0] == 0
            and (tmp_path / "new/r.html").exists())
    status, out, err = run(capsys, monkeypatch, a, "--out", b)             # a folder
    assert status == 2 and err.count("\n") == 1 and str(b) in err
    assert run(capsys, monkeypatch, a, "--out", ".")[0] == 2 and run(capsys, monkeypatch)[0] == 2


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Runs train.py for two steps of the same two problems; returns its exit status and its folder."""
    for name in ("train", "val"):
        lines = (EMBEDDED / f"{name}.jsonl").read_text().splitlines(True)[:2]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    options = {"cond": "critique", "data": tmp_path / "train.jsonl", "val": tmp_path / "val.jsonl",
               "batch": 2, "steps": 2, "seed": 2, "eval-samples": 1, "out": tmp_path / "run"}
    monkeypatch.setattr(sys, "argv", ["train.py", *(str(x) for name, x in options.items()
                                                    for x in (f"--{name}", x))])
    return lambda: (train.main(), tmp_path / "run")


def test_a_run_ends_with_its_report(trained, monkeypatch):
    """It logs the rollouts of the same problem at each step, in whatever order they come up."""
    monkeypatch.setattr(train, "LOGGED", 1)
    status, folder = trained()
    shown, = data_of((folder / "report.html").read_text())
    assert status == 0 and (shown["name"], shown["cond"], shown["k"]) == ("run", "critique", "1")
    assert shown["train"]["step"] == [1, 2] and shown["val"]["step"] == [0, 2]
    ((before,), (after,)), = shown["samples"]
    assert (before["step"], after["step"]) == (1, 2) and before["critique"]
    problem = embedded("train")[0]
    for row in before, after:
        assert row["problem"] == problem.problem
        assert (row["right_answer"], row["reference"]) == (problem.answer, problem.solution)


def test_a_report_that_cannot_be_written_spoils_no_run(trained, monkeypatch, capsys):
    def full(folders, file):
        raise UserError(f"{file}: cannot be written (No space left)")

    monkeypatch.setattr("sd.run.runs.write_report", full)
    status, folder = trained()
    assert (status == 2 and (folder / "last/model.safetensors").exists()
            and (folder / "best/model.safetensors").exists())
    err = capsys.readouterr().err
    assert err.endswith("report.html: cannot be written (No space left)\n")


@pytest.fixture
def evil(tmp_path):
    """The page of a run with markup wherever a run may have text."""
    row = {"step": 1, **FED, "problem": EVIL, "trace": EVIL, "critique": EVIL + "\nx", "malformed": EVIL,
           "right_answer": EVIL, "reference": EVIL}
    options = {"cond": EVIL, "seed": EVIL, "model": EVIL, EVIL: EVIL}
    runs = [read_run(write_run(tmp_path / "runs" / "<u>&", rollouts=[row], **options)),
            read_run(write_run(tmp_path / "runs" / "b",
                               [{"step": 1, f"val_avg@{EVIL}": 3, "seconds": 1}], []))]
    return page(runs)


def test_markup_in_a_run_stays_text(evil):
    run, other = data_of(evil)
    shown = run["samples"][0][0][0]
    assert (shown["problem"] == shown["trace"] == shown["malformed"] == run["cond"] == run["seed"]
            == other["k"] == EVIL)
    assert run["name"] == "<u>&" and run["options"]["model"] == run["options"][EVIL] == EVIL
    assert ("alert(1)</" not in evil and "<script>alert" not in evil
            and "\u2028" not in evil and "<u>" not in evil)
    assert not set("<>&") & set(re.search('id="data">(.*?)</script>', evil, re.S)[1])
    assert [evil.count(tag) for tag in ("<script", "</script", "</style", "<!--")] == [2, 2, 1, 0]
    template = report.TEMPLATE.read_text()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|"
                         r"eval\(|Function\(|fetch\(|import\(", template)
    assert "http" not in re.sub(r"http-equiv|http://www.w3.org/2000/svg", "", template)
    assert ("default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
            in template)


def browse(html, tmp_path, script=""):
    """The page's DOM after its scripts ran; `script` is a visitor."""
    file = tmp_path / "page.html"
    file.write_text(html + (f"<script>{script}</script>" if script else ""), encoding="utf-8")
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu",
               f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000",
               "--dump-dom", file.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120).stdout


def noted(dom):
    """What a visitor has left in data-seen."""
    assert "data-error" not in dom
    return json.loads(unescape(re.search(r'data-seen="([^"]*)"', dom)[1]))


needs_chromium = pytest.mark.skipif(shutil.which("chromium") is None,
                                    reason="no chromium to open the page with")


@pytest.fixture
def three(tmp_path):
    """Two seeds of critique and a grpo run at another rate, which stopped a step earlier."""
    grpo = [VALIDATED[0], TRAINED[0] | {"rollouts": 256, "loss": 0.5, "seconds": 119.7},
            {"step": 1, "val_avg@4": 10}]
    better = [row | {"val_avg@4": 80.5} if row is VALIDATED[1] else row for row in METRICS]
    return page([read_run(folder) for folder in (
        write_run(tmp_path / "c0"), write_run(tmp_path / "c1", better, seed=1),
        write_run(tmp_path / "g0", grpo, [{"step": 1, **WRONG}], cond="grpo", lr=5e-4, device="cuda",
                  teacher="ema"))])


@needs_chromium
def test_a_browser_draws_every_curve_and_the_table(three, tmp_path):
    dom = browse(three, tmp_path)
    assert "data-error" not in dom
    curves = re.findall(r'<path class="curve" style="--own: var\(--c(\d)\)" stroke-dasharray="([^"]*)" '
                        r'd="(M[^"]*)"', dom)
    assert len(curves) == 7 * 3
    assert [(colour, dash) for colour, dash, _ in curves] == [("1", "7 3"), ("1", "7 3"), ("2", "2 3")] * 7
    assert [d.count("L") for *_, d in curves[:6]] == [2, 2, 2, 2, 2, 1]     # a first point is drawn to itself
    ys = [[float(y) for y in re.findall(r" ([\d.]+)", d)] for *_, d in curves[:3]]
    plot = lambda avg: pytest.approx(12 + (280 - 12 - 42) * (1 - avg / 100), abs=0.1)
    assert [y[-1] for y in ys] == [plot(63.25), plot(80.5), plot(10)]
    rings = re.findall(r'<circle class="best mark" style="--own: var\(--c(\d)\)" r="6.5" cx="([^"]*)" '
                       r'cy="([^"]*)"', dom)
    ends = [d.rpartition("L")[2].split() for *_, d in curves[:3]]
    assert [(c, float(x), float(y)) for c, x, y in rings] == [
        (c, pytest.approx(float(x), abs=0.1), pytest.approx(float(y), abs=0.1))
        for c, (x, y) in zip("112", ends, strict=True)]
    assert re.findall(r">(best [^<]*)</text>", dom) == ["best 63.25, step 2", "best 80.50, step 2",
                                                        "best 10.00, step 1"]
    table = re.search(r'<table class="runs".*?</table>', dom, re.S)[0]
    titles, *rows = [re.findall(r"<t[dh][^>]*>([^<]*)<", row) for row in re.split("<tr[^>]*>", table)[1:]]
    assert titles[1:] == ["condition", "best Avg@4", "at step", "first", "last", "seed", "lr", "teacher", "steps",
                          "rollouts", "time"]               # device changes no result
    assert [row[1:] for row in rows] == [
        ["critique", "63.25", "2", "4.25", "63.25", "0", "0.001", "base", "2", "64", "2 min 11 s"],
        ["critique", "80.50", "2", "4.25", "80.50", "1", "0.001", "base", "2", "64", "2 min 11 s"],
        ["grpo", "10.00", "1", "4.25", "10.00", "0", "0.0005", "ema", "1", "256", "2 min 0 s"]]
    assert re.findall('<tr class="top"><th[^>]*>.*?</th><td[^>]*>.*?</td><td[^>]*>([^<]*)', table) == ["80.50"]
    assert "right answers: 71.88 % by critique (mean of 2 runs, 63.25 to 80.50); 10.00 % by grpo.</p>" in dom


@needs_chromium
def test_keys_read_values_and_the_choices_redraw(three, tmp_path):
    visitor = ("""
      const seen = [], svgs = [...document.querySelectorAll("#charts svg[role=slider]")], """
        """[validation, , , , , loss] = svgs;
      const press = (svg, key) => """
        """svg.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
      const note = (svg) => seen.push(svg.getAttribute("aria-valuetext"));
      const choose = (name, value) => document.querySelector(`input[name=${name}][value=${value}]`).click();
      note(validation); note(loss);
      press(validation, "Home"); note(validation); note(loss);              // one cursor for all charts
      press(loss, "ArrowRight"); note(loss);
      press(loss, "ArrowDown"); seen.push(document.querySelectorAll("path.near").length);
      press(loss, "Escape"); seen.push(document.querySelectorAll("path.near").length);
      choose("x", "rollouts"); press(loss, "Home"); press(loss, "ArrowRight"); note(loss);
      choose("lines", "means"); note(validation); seen.push(document.querySelectorAll("path.band").length);
      document.querySelectorAll("#legend button")[1].click(); note(validation);
      choose("smooth", "yes"); choose("x", "log"); note(loss);
      document.documentElement.dataset.seen = JSON.stringify(seen);""")
    end = "at the end; critique seed 0 63.25; critique seed 1 80.50; grpo 10.00"
    assert noted(browse(three, tmp_path, visitor)) == [
        end, "at the end; critique seed 0 −1.00e-5; critique seed 1 −1.00e-5; grpo 0.5000",
        "step 0; critique seed 0 4.25; critique seed 1 4.25; grpo 4.25",
        "at step 0; critique seed 0 –; critique seed 1 –; grpo –",
        "step 1; critique seed 0 0.1362; critique seed 1 0.1362; grpo 0.5000", 7, 0,
        "at 64 rollouts, step 2; critique seed 0 −1.00e-5; critique seed 1 −1.00e-5; grpo –",
        "at the end; critique 71.88 [63.25, 80.50]; grpo 10.00", 7, "at the end; critique 63.25; grpo 10.00",
        "at the end; critique −1.00e-5; grpo 0.5000"]


MARKED = [      # trace, critique, case, what is marked in the one and in the other
    (TRACE, RIGHT, "D", ["<step_2> 6*9=52 </step_2>", "<step_2> 6*9=54 </step_2>"]),
    (TRACE, RIGHT.replace("7*8=56", "correct"), "D",
     ["<step_2> 6*9=52 </step_2>", "<step_2> 6*9=54 </step_2>"]),
    (TRACE, RIGHT.replace("54 <", "52, so 6*9=54 is correct <"), "D",
     ["<step_2> 6*9=52 </step_2>", "<step_2> 6*9=52, so 6*9=54 is correct </step_2>"]),
    ("<step_1> 56+52=108 </step_1>\n<answer> 108 </answer>",
     "<step_1> 7*8=56 </step_1>\n<step_2> 56+52=108 </step_2>\n<answer> 110 </answer>", "D",
     ["<answer> 108 </answer>", "<answer> 110 </answer>"]),                     # a step is inserted
    (RIGHT.replace("110 </a", "111 </a"), RIGHT, "D", ["<answer> 111 </answer>", "<answer> 110 </answer>"]),
    (TRACE.replace("6*9", "so\n6*9") + "\nmore", RIGHT.replace("7*8", "7*8 "), "D",  # 7*8 =56 is no copy
     ["<step_1> 7*8=56 </step_1>", "<step_1> 7*8 =56 </step_1>"]),
    ("well,\n" + TRACE.replace("7*8", "so\n7*8").replace("6*9", "and\n6*9"),
     RIGHT.replace("7*8", "so 7*8"), "D",
     ["<step_2> and\n6*9=52 </step_2>", "<step_2> 6*9=54 </step_2>"]),           # a step of several lines
    (TRACE, TRACE.split("<answer>")[0], "D", ["<answer> 108 </answer>"]),       # nothing is in its place
    (TRACE + "\nmore", TRACE, "D", []),                                         # it is no step
    (TRACE, RIGHT, "C", []), (RIGHT, RIGHT, "A", []), (RIGHT, RIGHT, "D", []),
    (EVIL.replace("\ud800", ""), RIGHT, "", []),
]


@needs_chromium
def test_the_first_wrong_step_is_marked(tmp_path):
    rows = [{"step": 1, **FED, "trace": trace, "critique": critique, "case": case}
            for trace, critique, case, _ in MARKED]
    visitor = (
      """const texts = (within, of) => [...within.querySelectorAll(of)].map((one) => one.textContent);
      document.documentElement.dataset.seen = JSON.stringify(
        [...document.querySelectorAll(".rollout")].map((one) => [texts(one, "pre"), texts(one, "mark")]));""")
    dom = browse(page([read_run(write_run(tmp_path / "a", rollouts=rows))]), tmp_path, visitor)
    assert "from 4.25 % at step 0 to 63.25 % at step 2; the best is 63.25 %, at step 2.</p>" in dom
    seen = noted(dom)
    assert seen == [[[trace, critique], marked] for trace, critique, _, marked in MARKED]


@needs_chromium
def test_a_problem_stands_before_and_after_beside_its_answer_and_what_the_teacher_read(tmp_path):
    visitor = ("""
      const texts = (of) => [...document.querySelectorAll(of)].map((one) => one.textContent);
      const samples = () => texts("article :is(h3, h4, small, summary, pre)");
      const seen = [texts("#options .set"), texts("#options div").length, samples()];
      for (const i of [1, 2]) {
        document.getElementById("next").click();
        seen.push(samples());
      }
      seen.push([...document.querySelectorAll("#charts figure:first-child path.curve")].map((one) => """
        """one.getAttribute("style")));
      document.documentElement.dataset.seen = JSON.stringify(seen);""")
    more = {"trace": RIGHT, "reward": 1.0}
    grpo = [{"step": 3, **WRONG}, {"step": 3, **WRONG, **more}, {"step": 9, **WRONG, "truncated": True}]
    runs = [read_run(write_run(tmp_path / name, rollouts=rows, cond=cond, lr=4e-4, steps=5, model=model))
            for name, rows, cond, model in (
                ("g", grpo, "grpo", ""), ("r", [{"step": 1, **WRONG, **more}], "ref", ""),
                ("c", [{"step": 1, **FED}, {"step": 2, **GOOD, "shortened": True}], "critique", ""),
                ("c2", [], "critique", "mine"))]
    assert noted(browse(page(runs), tmp_path, visitor)) == [
        ["steps5"], 3,
        ["7*8 + 6*9", "right answer: 110", "Before, step 3: ✗ wrong", TRACE, "1 more at this step, 1 right",
         "✓ right", RIGHT, "After, step 9: ✗ wrong, truncated", TRACE,
         "Reference solution, not shown to the solver", "56 and 54"],
        ["7*8 + 6*9", "right answer: 110", "Step 1: ✓ right", RIGHT,
         "Reference solution, shown to the self-teacher", "56 and 54"],
        ["7*8 + 6*9", "right answer: 110", "Before, step 1: ✗ wrong", "rollout", TRACE,
         "critique, shown to the self-teacher", RIGHT, "After, step 2: ✓ right", "rollout", RIGHT,
         "critique, shown to the self-teacher, cut to fit", RIGHT],
        ["--own: var(--c2)", "--own: var(--c0)", "--own: var(--c1)",
         "--own: color-mix(in oklab, var(--c1) 55%, var(--ink))"]]      # a condition keeps its colour


@needs_chromium
def test_a_browser_shows_markup_as_text(evil, tmp_path):
    dom = browse(evil.replace(r"\ud800", ""), tmp_path)     # --dump-dom cannot write half a surrogate pair
    assert "data-error" not in dom and "&lt;script&gt;" in dom and "<script>alert" not in dom
    assert dom.count("<script") == 2 and "<u>&" not in dom and "&lt;u&gt;&amp;" in dom


@needs_chromium
def test_odd_runs_are_drawn_too(tmp_path):
    """Twenty conditions, one with nothing finite, one with one point, one with numbers without measure."""
    rows = [[{"step": 0, "val_avg@4": 5.0, "seconds": 1}], ['{"step": 1, "loss": NaN, "seconds": 1}'],
            [{"step": s, "seconds": 1, "loss": v, "length": 1e17, "grad_norm": abs(v)}
             for s, v in ((1, 1e308), (2, -1e308), (10**14, 0))]]
    runs = [read_run(write_run(tmp_path / str(i), rows[i] if i < 3 else METRICS, [], lr=1e-3 + i))
            for i in range(20)]
    for some in runs, runs[1:2], runs[2:3]:
        dom = browse(page(some), tmp_path)
        assert "data-error" not in dom and dom.count('class="curve"') == 7 * len(some)
        assert dom.count("No rollout is logged.") == 2                          # once in the script


@needs_chromium
def test_a_failing_script_leaves_a_mark(three, tmp_path):
    """Otherwise the absence of the mark in the tests above would say nothing."""
    assert "data-error" in browse(three.replace('"train": {', '"train": null, "x": {', 1), tmp_path)


def test_a_stored_run_of_several_megabytes_is_read_line_by_line(tmp_path):
    folder = write_run(tmp_path / "a",
                       rollouts=[{"step": s, **FED, "trace": "x" * 20_000} for s in range(200)])
    assert [row["step"] for (row,) in told(folder)["samples"][0]] == [0, 199]
    write_report([folder], folder / "report.html")
    assert (folder / "report.html").stat().st_size < 120_000
