"""How runs went: one page with their scores, curves, and what they wrote before and after training.

    python -m sd.report runs/ref-seed0                  writes report.html there, as train.py does
    python -m sd.report runs/table-* --out table.html   several at once, a colour per condition

The page holds numbers and texts as JSON, and its script draws them: no server, network or library.
Simplified: every logged step is a point, none is thinned out, and the page does not follow a run
that is still going.
"""
import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from sd import UserError, command
from sd.config import MACHINE, Config
from sd.llm.checkpoint import write_atomic

CURVES = ("rollouts", "loss", "reward", "entropy", "length", "truncated", "grad_norm")
SAMPLE = ("step", "problem", "right_answer", "reference", "trace", "reward", "truncated",
          "critique", "case", "malformed", "shortened")
SCORE = "val_avg@"
SHOWN = 6               # problems of a run
TEMPLATE = Path(__file__).parent / "run/pages/report.html"


def null(constant: str) -> None:
    """NaN and Infinity, which Python writes into JSON, cannot be read by a browser."""


def read_rows(path: Path) -> Iterator[dict]:
    """A log's rows; none if there is no log yet.

    An unfinished last line is skipped: the run is still writing it, or was killed. Raises UserError
    naming file and line.
    """
    if not path.exists():
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line, parse_constant=null)
            except ValueError:
                if not line.endswith(b"\n"):
                    return
                raise UserError(f"{path}, line {number}: is not JSON") from None
            yield row


def read_curves(path: Path) -> dict:
    """metrics.jsonl as columns: "train" has CURVES, "val" has "avg"; k of Avg@k; the run's seconds.

    A validation row does not say how many rollouts were sampled; the training row before does.
    """
    train = {key: [] for key in ("step", *CURVES)}
    val = {"step": [], "rollouts": [], "avg": []}
    rollouts, k, seconds = 0, "k", None
    for row in read_rows(path):
        seconds = row.get("seconds", seconds)
        scores = [key for key in row if key.startswith(SCORE)]
        if scores:
            k = scores[0].removeprefix(SCORE)
            val["step"].append(row["step"])
            val["rollouts"].append(rollouts)
            val["avg"].append(row[scores[0]])
        else:
            rollouts = row.get("rollouts")
            for key, column in train.items():
                column.append(row.get(key))
    return {"train": train, "val": val, "k": k, "seconds": seconds}


def read_samples(path: Path) -> list[list[list[dict]]]:
    """Some problems; of each the rollouts of the first and of the last step that logged it.

    Those that lie furthest apart come first. If none was logged at two steps, these are the first
    problems and the last.
    """
    problems = {}               # problem -> step -> its rollouts there
    for row in read_rows(path):
        steps = problems.setdefault(row.get("problem"), {})
        steps.setdefault(row["step"], []).append({key: row.get(key) for key in SAMPLE})
        if len(steps) == 3:
            del steps[sorted(steps)[1]]
    every = list(problems.values())
    shown = [steps for steps in every if len(steps) == 2]
    shown.sort(key=lambda steps: min(steps) - max(steps))
    half = SHOWN // 2
    shown = shown[:SHOWN] or every[:half] + every[half:][-half:]
    return [list(steps.values()) for steps in shown]


def read_run(folder: Path) -> dict:
    """Everything that the page shows of one run. Raises UserError if the folder is not a run's."""
    try:
        options = json.loads((folder / "config.json").read_bytes(), parse_constant=null)
        facts = {"name": folder.resolve().name, "cond": options["cond"], "seed": options["seed"]}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{folder}: is not the folder of a run; "
                        "give folders such as runs/ref-seed0") from None
    curves = read_curves(folder / "metrics.jsonl")
    if curves["seconds"] is None:
        raise UserError(f"{folder}: metrics.jsonl has no line yet, so there is nothing to show")
    samples = read_samples(folder / "rollouts.jsonl")
    return facts | curves | {"options": options, "samples": samples}


def script_json(value) -> str:
    """Strict JSON in which no character can end the script element that holds it."""
    text = json.dumps(value, allow_nan=False)       # escapes U+2028 and all else but ASCII
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def page(runs: list[dict]) -> str:
    """The template filled with the runs, each option's default, and the options of the machine."""
    data = {"runs": runs, "defaults": asdict(Config()), "machine": sorted(MACHINE)}
    html = TEMPLATE.read_text(encoding="utf-8")
    return html.replace("<!--DATA-->", script_json(data))


def write_report(folders: list[Path], file: Path) -> None:
    """Raises UserError if a folder holds no readable run, or the file cannot be written."""
    write_atomic(file, page([read_run(folder) for folder in folders]))


@command("sd.report", __doc__)
def main(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--out", type=Path,
                        help="page to write (default: report.html, in RUN if there is only one)")
    args = parser.parse_args()
    folder = args.runs[0] if len(args.runs) == 1 else Path()
    out = args.out or folder / "report.html"
    write_report(args.runs, out)
    print(f"written: {out}")


if __name__ == "__main__":
    sys.exit(main())
