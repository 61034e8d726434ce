"""The step-tag grammar, `<step_1> … </step_1> … <answer> … </answer>`: text to steps to tokens.

The paper's solver writes step-tagged traces and its critic answers step by step, so this grammar is
where a rollout and its feedback meet. Parsing never fails: text outside the tags is ignored, and a
step that is not closed (the rollout ran out of tokens, or forgot the tag) ends at the next tag.
"""
import re
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate

TAGS = re.compile(r"<(/?)(?:step_(\d{1,4})|answer)>")


@dataclass(frozen=True)
class Step:
    text: str            # without tags, stripped
    start: int           # character span in the trace, tags included
    end: int
    closed: bool = True


@dataclass(frozen=True)
class Trace:
    text: str
    steps: list[Step]
    answer: Step | None  # the last that is closed and says anything, or else the last


def parse(text: str) -> Trace:
    """Splits a trace at its tags; one pass, linear in the length of the text."""
    steps, answer = [], None
    tags = list(TAGS.finditer(text))
    for i, tag in enumerate(tags):
        closing, number = tag.groups()
        if closing:
            continue
        following = tags[i + 1] if i + 1 < len(tags) else None
        inner_end = following.start() if following else len(text)
        closed = following is not None and following.groups() == ("/", number)
        end = following.end() if closed else inner_end
        step = Step(text[tag.end():inner_end].strip(), tag.start(), end, closed)
        if number:
            steps.append(step)
        elif closed and step.text.strip(".… ") or not (answer and answer.closed):
            answer = step
    return Trace(text, steps, answer)


def render(steps: list[str], answer: str) -> str:
    """Writes a trace with steps numbered from 1; `parse` of it gives the same texts."""
    tagged = [f"<step_{i}> {step} </step_{i}>" for i, step in enumerate(steps, 1)]
    return "\n".join(tagged + [f"<answer> {answer} </answer>"])


def token_span(pieces: list[str], start: int, end: int) -> tuple[int, int]:
    """First token and one past the last of the characters [start, end) of a text cut into `pieces`.

    A token that straddles the border belongs to the side it starts on, so neighbouring spans never
    overlap:

    >>> token_span(["ab", "cd", "ef"], 2, 5)    # 'cde' touches 'cd' and 'ef'
    (1, 3)
    >>> token_span(["ab", "cd", "ef"], 5, 6)    # 'f' begins inside a token of the span before
    (3, 3)
    """
    starts = list(accumulate(map(len, pieces), initial=0))[:-1]
    return bisect_right(starts, start - 1), bisect_right(starts, end - 1)
