"""The frozen critic as a faithful scribe: it follows the solver's trace, in its notation, step by step.

The paper's four cases:
  A  fully correct                          reproduce the trace exactly
  B  right answer, a justification missing  insert the missing step
  C  incomplete or out of tokens            condense (drop what was said twice) and finish
  D  wrong                                  copy the correct steps, correct the first wrong one and finish

How the correct and the wrong steps are quoted decides what the self-teacher does with them (induction heads
continue a sequence as they saw it), so it is an option here:
  partial  correct steps verbatim, the wrong one only as corrected: the paper's, and the default
  full     the wrong step is quoted too, its correction comes after
  omit     "correct" in place of each correct step: nothing to anchor to
"""
from dataclasses import dataclass
from typing import Protocol

from sd.problems import Problem

QUOTING = ("partial", "full", "omit")


@dataclass(frozen=True)
class Critique:
    case: str                # A, B, C or D
    text: str                # what the self-teacher reads
    wrong: int | None = None  # index of the solver's first wrong step; len(steps) is the answer; None: none
    malformed: str = ""      # why this must not be trained on; case and text may then be empty


class Critic(Protocol):
    """What the `critique` condition asks: one critique per rollout, in their order."""

    def batch(self, problems: list[Problem], texts: list[str], truncated: list[bool]) -> list[Critique]: ...
