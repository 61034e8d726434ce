"""Token ids <-> text, and the two prompts that the whole method is about.

The student sees the problem; the self-teacher sees the problem and a context. Both prompts end with the same token, so
both score the same continuation, position by position:

    student   <problem> 7*8 + 6*9 <solution>                               | completion …
    teacher   <problem> 7*8 + 6*9 <critique> <step_1> … </answer> <solution> | completion …

Control tokens (`<problem>`, `<solution>`, …) are put in by id. Text is encoded with control tokens switched off, so a
problem or a critique that spells one out cannot become one.
"""
from pathlib import Path

from tokenizers import Tokenizer as FastTokenizer

from sd import UserError

CONTEXT_TAGS = {"ref": "<reference>", "critique": "<critique>"}
CONTROL = ["<eos>", "<unk>", "<problem>", "<reference>", "<critique>", "<solution>"]


class Tokenizer:
    """Wraps a tokenizer.json. Raises UserError if the file is missing, unreadable or lacks the control tokens."""

    def __init__(self, path: Path):
        try:
            self.fast = FastTokenizer.from_file(str(path))
        except Exception as error:                      # the library raises bare Exception
            raise UserError(f"{path}: not a readable tokenizer.json ({error})") from None
        self.fast.encode_special_tokens = True          # "<eos>" typed in a text stays text
        missing = [token for token in CONTROL if self.fast.token_to_id(token) is None]
        if missing:
            raise UserError(f"{path}: lacks the control tokens {' '.join(missing)}")
        self.eos = self.fast.token_to_id("<eos>")
        self.vocab_size = self.fast.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        return self.fast.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return "".join(self.pieces(ids))

    def pieces(self, ids: list[int]) -> list[str]:
        """The text of each token, control tokens empty; joined they are the text, so spans of characters map to tokens."""
        return [self.fast.decode([i], skip_special_tokens=True) for i in ids]

    def student_prompt(self, problem: str) -> list[int]:
        return [self._control("<problem>"), *self.encode(problem), self._control("<solution>")]

    def teacher_prompt(self, problem: str, kind: str, context: str) -> list[int]:
        """`kind` names what the context is: "ref" or "critique"."""
        return [self._control("<problem>"), *self.encode(problem), self._control(CONTEXT_TAGS[kind]),
                *self.encode(context), self._control("<solution>")]

    def _control(self, token: str) -> int:
        return self.fast.token_to_id(token)
