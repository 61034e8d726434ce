"""Problems: JSONL in, one object a line, validated with file and line. `solution` is what the `ref` condition shows."""
import json
from dataclasses import dataclass
from pathlib import Path

from sd import UserError

ASSETS = Path(__file__).parent / "assets"


@dataclass(frozen=True)
class Problem:
    id: str
    problem: str
    answer: str
    solution: str = ""


def read_problems(path: Path) -> list[Problem]:
    """Reads {"problem", "answer", "solution"?, "id"?} lines. Raises UserError naming the file, the line and the field."""
    problems = []
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}:{number}: not a JSON object ({error})") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: not a JSON object")
        row.setdefault("id", f"{Path(path).stem}-{number}")
        for field in ("id", "problem", "answer", "solution"):
            if not isinstance(row.get(field, "" if field == "solution" else None), str):
                raise UserError(f"{path}:{number}: field {field!r} must be a string")
        problems.append(Problem(row["id"], row["problem"], row["answer"], row.get("solution", "")))
    if not problems:
        raise UserError(f"{path}: holds no problem")
    return problems


def embedded(split: str) -> list[Problem]:
    """The embedded task's "train", "val" or "test" problems; `python -m sd.pretrain` made them."""
    return read_problems(ASSETS / f"{split}.jsonl")


if __name__ == "__main__":
    import sys

    from sd.filter import main      # needs the model, so it stands further down the list of files
    sys.exit(main())
