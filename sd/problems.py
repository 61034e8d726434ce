"""Problems: UTF-8 JSONL in, one object a line: {"problem", "answer", "solution"?, "id"?}; others are ignored.

`solution` is what the `ref` condition shows. A missing id is made of the file's name and the line (train-17);
null counts as missing. An answer or an id may be a whole number, but not 2.50, which would come out as 2.5,
and not true. No object of a line may hold a field twice, and no two lines an id, since results are kept by
id. A byte order mark, Windows line ends and empty lines are skipped. Control characters are kept in texts,
refused in ids, and never quoted in an error.
"""
import json
from codecs import BOM_UTF8
from dataclasses import dataclass
from pathlib import Path

from sd import UserError

EMBEDDED = Path(__file__).parent / "task/assets"        # the embedded solver and its problems
LONGEST_ID = 200


@dataclass(frozen=True)
class Problem:
    id: str
    problem: str
    answer: str
    solution: str = ""


def read_problems(path: Path) -> list[Problem]:
    """All problems of a file; raises UserError with file, line and field at the first line without one."""
    name = str(path) if str(path).isprintable() else ascii(str(path))
    problems, seen = [], {}
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                line = line.removeprefix(BOM_UTF8) if number == 1 else line
                if not line.strip():
                    continue
                try:
                    problem = _problem(line, f"{Path(path).stem}-{number}")
                except ValueError as error:
                    raise UserError(f"{name}:{number}: {error}") from None
                if problem.id in seen:
                    raise UserError(f"{name}:{number}: field 'id' is {problem.id!r}, "
                                    f"as in line {seen[problem.id]}")
                seen[problem.id] = number
                problems.append(problem)
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror})") from None
    if not problems:
        raise UserError(f"{name}: holds no problem")
    return problems


def _problem(line: bytes, default_id: str) -> Problem:
    """One line's problem; raises ValueError saying what is wrong, in words that quote nothing of the line."""
    try:
        row = json.loads(line.decode(), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8, at byte {error.start + 1} of the line") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg}, at character {error.pos + 1} of the line)") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    row = {"id": default_id, "solution": ""} | {key: value for key, value in row.items() if value is not None}
    for field, kinds in (("id", (str, int)), ("problem", (str,)), ("answer", (str, int)),
                         ("solution", (str,))):
        if field not in row:
            raise ValueError(f"field {field!r} is missing")
        if type(row[field]) not in kinds:
            raise ValueError(f"field {field!r} must be a string"
                             f"{' or a whole number' if int in kinds else ''}")
        row[field] = str(row[field])
        if any("\ud800" <= character <= "\udfff" for character in row[field]):
            raise ValueError(f"field {field!r} holds half of a surrogate pair, which cannot be written out")
        if field != "solution" and not row[field].strip():
            raise ValueError(f"field {field!r} is empty")
    if len(row["id"]) > LONGEST_ID or not row["id"].isprintable():
        raise ValueError(f"field 'id' must be at most {LONGEST_ID} printable characters")
    return Problem(row["id"], row["problem"], row["answer"], row["solution"])


def _object(pairs: list[tuple[str, object]]) -> dict:
    if len(row := dict(pairs)) < len(pairs):
        raise ValueError("a field is there twice")
    return row


def check_lengths(problems: list[Problem], prompts: list[list[int]], room: int) -> None:
    """Raises UserError if a prompt has more than `room` tokens; a problem's prompts stand side by side."""
    for i, prompt in enumerate(prompts):
        if len(prompt) > room:
            raise UserError(f"problem {problems[i * len(problems) // len(prompts)].id!r}: its prompt has "
                            f"{len(prompt)} tokens, {max(0, room)} fit the model beside --max-new-tokens; "
                            "remove it or lower that option")


def embedded(split: str) -> list[Problem]:
    """The embedded task's "train", "val" or "test" problems; `python -m sd.pretrain` made them."""
    return read_problems(EMBEDDED / f"{split}.jsonl")
