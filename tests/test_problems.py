"""Problems from files: what is read, and how each thing that can be wrong with a line is told."""
import json

import pytest

from sd import UserError
from sd.problems import Problem, check_lengths, embedded, read_problems

GOOD = {"id": "a", "problem": "1+1", "answer": "2", "solution": "1+1=2"}


@pytest.fixture
def read(tmp_path):
    def read(content):
        (tmp_path / "p.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_problems(tmp_path / "p.jsonl")
    return read


def line(**fields) -> str:
    return json.dumps(GOOD | fields) + "\n"


def test_a_problem_is_read_as_written(read):
    assert read(line()) == [Problem("a", "1+1", "2", "1+1=2")]
    assert read('{"problem": "p", "answer": "1"}\n\n{"problem": "q", "answer": "2", "level": [NaN]}') == [
        Problem("p-1", "p", "1", ""), Problem("p-3", "q", "2", "")]            # the file's name and the line


@pytest.mark.parametrize("fields, expected", [
    ({"answer": 18}, Problem("a", "1+1", "18", "1+1=2")),
    ({"answer": -10 ** 20}, Problem("a", "1+1", "-1" + "0" * 20, "1+1=2")),
    ({"id": 7}, Problem("7", "1+1", "2", "1+1=2")), ({"id": None}, Problem("p-1", "1+1", "2", "1+1=2")),
    ({"solution": None}, Problem("a", "1+1", "2", "")), ({"solution": ""}, Problem("a", "1+1", "2", "")),
    ({"problem": " \x00\x1b[31m\u2028é😀\r\n "}, Problem("a", " \x00\x1b[31m\u2028é😀\r\n ", "2", "1+1=2")),
    ({"answer": "48/2 = 24\r\n24 + 48 = 72\n#### 72"}, Problem("a", "1+1", "72", "1+1=2")),
    ({"answer": "… #### 15"}, Problem("a", "1+1", "15", "1+1=2")),
    ({"answer": "<answer> 15 </answer>"}, Problem("a", "1+1", "15", "1+1=2")),
    ({"answer": r"so $x = \boxed{\frac{1}{2}}$."}, Problem("a", "1+1", r"\frac{1}{2}", "1+1=2")),
    ({"answer": r"$\frac{1}{2}$"}, Problem("a", "1+1", r"$\frac{1}{2}$", "1+1=2")),
    ({"id": "é" * 200}, Problem("é" * 200, "1+1", "2", "1+1=2")),
])
def test_numbers_nulls_and_any_text_are_taken(read, fields, expected):
    assert read(line(**fields)) == [expected]
    assert read(json.dumps(GOOD | fields, ensure_ascii=False)) == [expected]


def test_byte_order_marks_windows_lines_and_empty_lines_are_skipped(read):
    lines = line(id="b").encode().replace(b"\n", b"\r\n") + b"\r\n  \t\n\n" + line(id="c").encode().rstrip()
    assert [p.id for p in read(b"\xef\xbb\xbf" + lines)] == ["b", "c"]


def test_a_line_of_ten_megabytes_is_read(read):
    text = "7*8 + " * 1_700_000 + "1"
    assert read(line() + line(id="long", problem=text))[1].problem == text


@pytest.mark.parametrize("content, told", [
    ("", "holds no problem"), ("\n \r\n", "holds no problem"),
    (line() + "{", ":2: not JSON"), (line() + "\ufeff" + line(id="b"), ":2: not JSON"),
    ("\x00\x1b[31m", ":1: not JSON"),
    ('{"problem": "a\tb", "answer": "1"}', ":1: not JSON"), ("NaN", ":1: not a JSON object"),
    ("\n[]", ":2: not a JSON object"), ('"x"', ":1: not a JSON object"), ("null", ":1: not a JSON object"),
    (line().encode() + b"\n" + line(id="b").encode().replace(b"1+1", b"1\xff1", 1), ":3: 'utf-8' codec can't"),
    (line().encode("utf-16"), ":1: 'utf-8' codec can't decode byte 0xff in position 0"),
    ("[" * 100_000, ":1: maximum recursion depth"), ('{"a":' * 100_000, ":1: maximum recursion depth"),
    ('{"problem": "p", "answer": 1' + "0" * 5000 + "}", ":1: "),
    ('{"problem": "p"}', "'answer' is missing"), ('{"answer": "1"}', "'problem' is missing"),
    (line(answer=None), "'answer' is missing"),
    (line(answer=1.0), "'answer'"), (line(answer=True), "'answer'"), (line(answer=["1"]), "'answer'"),
    ('{"problem": "p", "answer": NaN}', "'answer'"), ('{"problem": "p", "answer": 1e999}', "'answer'"),
    (line(problem=1), "'problem'"), (line(problem={}), "'problem'"), (line(solution=1), "'solution'"),
    (line(id=1.5), "'id'"), (line(id=[]), "'id'"), (line(problem=""), "'problem' is empty"),
    (line(problem=" \n"), "'problem' is empty"), (line(answer=""), "'answer' is empty"),
    (line(answer="\u2003"), "'answer' is empty"), (line(id=""), "'id' is empty"),
    (line(id="x" * 201), "'id' must be at most 200"), (line(id="a\x1b[2J"), "'id' must be"),
    (line(id="a\nb"), "'id' must be"),
    (line(problem="\ud800"), "'problem' holds half"), (line(answer="1\udfff"), "'answer' holds half"),
    (line(id="\udc80"), "'id' holds half"), (line(solution="\udc80"), "'solution' holds half"),
    (line() + r'{"problem": "p", "answer": "\frac{1}{2}"}', ":2: field 'answer' holds a tab, backspace, form"),
    (line(answer="2\times3"), r"\frac is written \\frac"), (line(answer="\boxed{3}"), "'answer' holds a tab"),
    (line(answer="\right)"), "'answer' holds a tab"),
    (line() + "\n" + line(), ":3: field 'id' is 'a', as in line 1"),
    (line(id=7) + line(id="7"), ":2: field 'id' is '7', as in line 1"),
    ('{"problem": "p", "answer": "1"}\n' + line(id="p-1"), ":2: field 'id' is 'p-1', as in line 1"),
])
def test_a_wrong_line_is_told_in_one_printable_sentence(read, content, told):
    with pytest.raises(UserError) as error:
        read(content)
    assert told in str(error.value) and str(error.value).isprintable() and "p.jsonl" in str(error.value)
    str(error.value).encode()


def test_what_was_read_can_be_written_and_read_again(read):
    first = read(line(problem="\x00\x1b\u2028\ud83d\ude00", answer=3) + line(id="b", solution=None))
    assert read("".join(json.dumps(p.__dict__) + "\n" for p in first)) == first


def test_files_that_cannot_be_opened_are_named(tmp_path):
    """An OSError; every command tells it in one line."""
    for path in (tmp_path, tmp_path / "none.jsonl", tmp_path / "\x1b[31m\udc80"):
        with pytest.raises(OSError) as error:
            read_problems(path)
        assert repr(str(path)) in str(error.value) and str(error.value).isprintable()


def test_the_embedded_problems_share_no_id_and_no_problem():
    splits = [embedded(split) for split in ("train", "val", "test")]
    problems = [p for split in splits for p in split]
    assert all(splits) \
        and len({p.id for p in problems}) == len({p.problem for p in problems}) == len(problems)


def test_a_prompt_that_is_too_long_is_told_with_its_own_problem():
    problems = [Problem(name, "1+1", "2") for name in "abc"]
    check_lengths(problems, [[1] * 5, [1] * 5, [1]], 5)
    with pytest.raises(UserError, match="problem 'b': its prompt has 6 tokens, 5 fit"):
        check_lengths(problems, [[1] * 5, [1] * 6, [1]], 5)
