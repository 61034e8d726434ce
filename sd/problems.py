"""Problems: UTF-8 JSONL in, one object a line, {"problem", "answer", "solution"?, "id"?}.

`solution` is what the `ref` condition shows; other fields are ignored. A missing id is made of the
file's name and the line (train-17); null counts as missing. An answer or an id may be a whole
number, but not 2.50, which would become 2.5, and not a boolean; an answer that is a whole solution
is read as a rollout is. No two lines may share an id, since results are kept by id. A byte order
mark, Windows line ends and empty lines are skipped. Control characters are kept in texts, refused
in ids and (those that LaTeX with single backslashes becomes) in answers, never quoted in an error.
"""
import json
import re
from codecs import BOM_UTF8
from dataclasses import asdict, dataclass
from pathlib import Path

from sd import UserError, steps
from sd.answers import final_answer
from sd.llm.checkpoint import write_atomic

EMBEDDED = Path(__file__).parent / "task/assets"        # the embedded solver and its problems
LONGEST_ID = 200


@dataclass(frozen=True)
class Problem:
    id: str
    problem: str
    answer: str
    solution: str = ""


def read_problems(path: Path) -> list[Problem]:
    """All problems of a file.

    Raises UserError with file, line and field at the first bad line, OSError if it is not readable.
    """
    content = path.read_bytes().removeprefix(BOM_UTF8)
    problems = []
    lines = {}                      # id -> its line
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            problem = _problem(line, f"{path.stem}-{number}")
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{number}: {error}") from None
        first = lines.setdefault(problem.id, number)
        if first != number:
            raise UserError(f"{path}:{number}: field 'id' is {problem.id!r}, as in line {first}")
        problems.append(problem)
    if not problems:
        raise UserError(f"{path}: holds no problem")
    return problems


def _problem(line: bytes, default_id: str) -> Problem:
    """One line's problem; raises ValueError saying what is wrong, without quoting the line.

    RecursionError if it is nested too deeply.
    """
    try:
        row = json.loads(line.decode())
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg}, at character {error.pos + 1})") from None
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    answer = _text(row, "answer")
    return Problem(_text(row, "id", default_id), _text(row, "problem"),
                   final_answer(steps.parse(answer), truncated=False) or answer,
                   _text(row, "solution", ""))


def _text(row: dict, field: str, default: str | None = None) -> str:
    text = row.get(field)
    if text is None:
        text = default
    if text is None:
        raise ValueError(f"field {field!r} is missing")
    if type(text) is int and field in ("id", "answer"):
        text = str(text)
    if not isinstance(text, str):
        raise ValueError(f"field {field!r} must be a string (an id or answer, or a whole number)")
    if re.search(r"[\ud800-\udfff]", text):
        raise ValueError(f"field {field!r} holds half of a surrogate pair")
    if field != "solution" and not text.strip():
        raise ValueError(f"field {field!r} is empty")
    if field == "answer" and re.search(r"[\b\t\f]|\r(?!\n)", text):
        raise ValueError("field 'answer' holds a tab, backspace, form feed or lone carriage return: "
                         r"in JSON, \frac is written \\frac")
    if field == "id" and (len(text) > LONGEST_ID or not text.isprintable()):
        raise ValueError(f"field 'id' must be at most {LONGEST_ID} printable characters")
    return text


def check_lengths(problems: list[Problem], prompts: list[list[int]], room: int) -> None:
    """Raises UserError if a problem's prompt has more than `room` tokens."""
    for problem, prompt in zip(problems, prompts, strict=True):
        if len(prompt) > room:
            raise UserError(f"problem {problem.id!r}: its prompt has {len(prompt)} tokens, "
                            f"{max(0, room)} fit the model beside --max-new-tokens; "
                            "remove it or lower that option")


def check_solutions(problems: list[Problem], flag: str) -> None:
    """Raises UserError if a problem has no reference solution, which `flag` would show."""
    without = sum(not p.solution for p in problems)
    if without:
        raise UserError(f"{flag}: {without} of {len(problems)} problems have no solution to show")


def write_problems(path: Path, problems: list[Problem]) -> None:
    """Writes what `read_problems` reads. Raises UserError if it cannot be written."""
    write_atomic(path, "".join(json.dumps(asdict(p)) + "\n" for p in problems))


def embedded(split: str) -> list[Problem]:
    """The embedded task's "train", "val" or "test" problems; `python -m sd.pretrain` made them."""
    return read_problems(EMBEDDED / f"{split}.jsonl")
