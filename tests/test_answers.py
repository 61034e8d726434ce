"""Final answers, taken out and compared."""
import pytest

from sd.answers import equal, final_answer


@pytest.mark.parametrize("trace, truncated, answer", [
    ("<step_1> 1+1=2 </step_1>\n<answer> 2 </answer>", False, "2"),
    ("<answer> 1,224.0 </answer>", False, "1224"),
    ("<answer> 1 </answer><answer> 2 </answer>", False, "2"),
    ("<answer> 2", False, "2"),                 # forgot the tag, but had ended
    ("<answer> 2", True, None),                 # may have been 22
    ("<answer> 2 </answer> and", True, "2"),
    ("<answer> </answer>", False, None),
    ("<step_1> 1+1=2 </step_1>", False, None),
    ("2", False, None), ("", False, None), ("", True, None),
])
def test_the_final_answer_of(trace, truncated, answer):
    assert final_answer(trace, truncated) == answer


@pytest.mark.parametrize("left, right, same", [
    ("1224", "1,224.0", True), ("1/2", "0.5", True), ("2/4", "1/2", True), ("+7", "7", True), ("-0", "0", True),
    ("007", "7", True), ("  x  +  1 ", "x + 1", True), ("-7", "7", False), ("12", "122", False),
    ("1,22", "122", False),                     # no way to write a number
    ("1/0", "1/0", True), ("1/0", "0", False), ("2*3", "6", False), ("x", "X", False), ("", "0", False),
    ("1e3", "1000", False), ("9" * 50, "9" * 50 + ".0", False),
])
def test_equal_compares_numbers_by_value_and_never_evaluates(left, right, same):
    assert equal(left, right) is same and equal(right, left) is same


def test_no_answer_equals_nothing():
    assert not equal(None, "") and not equal(None, "None")
