"""Final answers: take one out of a trace, decide whether two are equal. Nothing is ever evaluated."""
import re
from fractions import Fraction

from sd.steps import parse

NUMBER = re.compile(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?|[-+]?\d+(\.\d+)?(/\d+)?")


def final_answer(trace: str, truncated: bool) -> str | None:
    """The last `<answer>` of a trace; None if there is none, or if the tokens ran out before it was closed."""
    answer = parse(trace).answer
    if answer is None or not answer.text or (truncated and not answer.closed):
        return None
    return canonical(answer.text)


def canonical(answer: str) -> str:
    """One spelling for equal answers: `1,224.0` and `1224` are the same string. Other text is compared as it stands."""
    text = " ".join(answer.split())
    if len(text) <= 40 and NUMBER.fullmatch(text):
        try:
            return str(Fraction(text.replace(",", "")))
        except ZeroDivisionError:
            return text
    return text


def equal(answer: str | None, truth: str) -> bool:
    return answer is not None and canonical(answer) == canonical(truth)
