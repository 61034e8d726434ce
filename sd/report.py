"""How runs went: one page with their curves, a table, and rollouts from their first and last step.

    python -m sd.report runs/ref-seed0                  writes report.html there, as train.py does at its end
    python -m sd.report runs/table-* --out table.html   several overlaid; a condition's seeds share a colour

The page holds numbers and texts as JSON, and its script draws them: no server, no network, no library.
Simplified: every logged step is a point, none is thinned out; the page does not follow a run in progress.
"""
import json
import sys
from collections.abc import Iterator
from dataclasses import fields
from math import isfinite
from pathlib import Path

from sd import UserError, command
from sd.llm.checkpoint import write_atomic
from sd.config import MACHINE, Config

CURVES = ("rollouts", "loss", "reward", "entropy", "length", "truncated", "grad_norm")
SAMPLE = {"problem": str, "trace": str, "reward": float, "cut": bool, "critique": str, "case": str,
          "malformed": str}
NO_CONDITION = {"cond", "seed", "out", "keep"} | MACHINE            # shown apart, or change no result
TEMPLATE = Path(__file__).parent / "run/pages/report.html"


def strict(text: bytes):
    """JSON as Python writes it -> values as a browser reads them: NaN, Infinity and overflows become None."""
    def finite(number: str) -> float | None:
        return value if isfinite(value := float(number)) else None

    return json.loads(text, parse_float=finite, parse_constant=lambda _: None,
                      parse_int=lambda number: int(number) if len(number) < 16 else finite(number))


def read_rows(path: Path, kinds: dict[str, type]) -> Iterator[dict]:
    """A log's rows, reduced to the entries in `kinds` and validation scores; None for what a row lacks.

    An unfinished last line is skipped: its run is still writing it, or died. Raises UserError naming file
    and line.
    """
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    row = strict(line)
                except (ValueError, RecursionError) as error:
                    if not line.endswith(b"\n"):
                        return
                    raise UserError(f"{path}, line {number}: is not JSON ({str(error)[:100]})") from None
                if not isinstance(row, dict) or type(row.get("step")) is not int or row["step"] < 0:
                    raise UserError(f'{path}, line {number}: is not an object with a "step" of 0 or more')
                wanted = kinds | {key: float for key in row if key.startswith("val_avg@")}
                for key, kind in wanted.items():
                    if type(row.get(key)) not in (kind, int if kind is float else kind, type(None)):
                        raise UserError(f'{path}, line {number}: "{key}" is not of type {kind.__name__}')
                yield {key: row.get(key) for key in ("step", *wanted)}
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def read_curves(path: Path) -> dict:
    """metrics.jsonl as columns by step: "train" has CURVES, "val" "avg"; k of Avg@k; the run's seconds."""
    train, val, k, seconds = {}, {}, "k", None
    for row in read_rows(path, {key: float for key in (*CURVES, "seconds")}):
        step, seconds = row["step"], row.pop("seconds") or seconds
        if score := next((key for key in row if key.startswith("val_avg@")), None):
            k = score.removeprefix("val_avg@")
            val[step] = {"step": step, "rollouts": None if step else 0, "avg": row[score]}
        else:
            train[step] = row
    if not train and not val:
        raise UserError(f"{path}: has no line yet, so there is nothing to show")
    for step in val.keys() & train.keys():    # a validation row does not count the rollouts sampled by then
        val[step]["rollouts"] = train[step]["rollouts"]
    columns = [{key: [rows[step][key] for step in sorted(rows)] for key in keys}
               for rows, keys in ((train, ("step", *CURVES)), (val, ("step", "rollouts", "avg")))]
    return {"train": columns[0], "val": columns[1], "k": k, "seconds": seconds}


def read_run(folder: Path) -> dict:
    """Everything that the page shows of one run. Raises UserError if the folder is not a run's."""
    path, log, first, last = folder / "config.json", folder / "rollouts.jsonl", [], []
    if not path.exists():
        raise UserError(f"{folder}: is not the folder of a run; give folders such as runs/ref-seed0")
    try:
        config = strict(path.read_bytes())
        if not isinstance(config, dict) or not isinstance(config.get("cond"), str):
            raise ValueError('it has no "cond"; a checkpoint\'s run is the folder above it')
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: is no config of a run "
                        f"({str(getattr(error, 'strerror', 0) or error)[:100]})") from None
    curves = read_curves(folder / "metrics.jsonl")
    for row in read_rows(log, SAMPLE) if log.exists() else ():    # no log if it stopped before its first step
        if not first or first[0]["step"] == row["step"]:
            first.append(row)
        else:
            last = [kept for kept in last if kept["step"] == row["step"]] + [row]
    return {"name": folder.resolve().name, "cond": config["cond"], "seed": config.get("seed"), **curves,
            "options": {f.name: f.default for f in fields(Config)} | config,        # an older run lacks some
            "samples": [rows for rows in (first, last) if rows]}


def script_json(value) -> str:
    """Strict JSON in which no character can end the script element that holds it."""
    text = json.dumps(value, allow_nan=False)
    for character in "<>&":                         # U+2028 and 2029 are escaped already, like all but ASCII
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def page(runs: list[dict]) -> str:
    """The template filled with the runs; of their options, only those in which they differ."""
    names = [name for name in dict.fromkeys(name for run in runs for name in run["options"])
             if name not in NO_CONDITION]
    differ = [name for name in names if len({json.dumps(run["options"].get(name)) for run in runs}) > 1]
    runs = [run | {"options": {name: run["options"].get(name) for name in differ}} for run in runs]
    before, after = TEMPLATE.read_text(encoding="utf-8").split("<!--DATA-->")
    return before + script_json({"runs": runs}) + after


def write_report(folders: list[Path], file: Path) -> None:
    """Raises UserError if a folder holds no readable run, or the file cannot be written."""
    write_atomic(file, page([read_run(Path(folder)) for folder in folders]))


@command("sd.report", __doc__)
def main(parser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--out", type=Path, metavar="FILE",
                        help="(default: report.html, in RUN if there is only one)")
    args = parser.parse_args()
    if args.out and not args.out.name:
        parser.error(f"--out {args.out} is not a file")
    out = args.out or (args.runs[0] if len(args.runs) == 1 else Path()) / "report.html"
    write_report(args.runs, out)
    print(f"written: {out}")


if __name__ == "__main__":
    sys.exit(main())
