"""Token ids <-> text, and the two prompts that the whole method is about.

The student sees the problem; the self-teacher sees the problem and a context. Both prompts end with the same
tokens, so both score the same continuation, position by position. The embedded solver has a token for each
part of a prompt:

    student   <problem> 7*8 + 6*9 <solution>                                             | completion …
    teacher   <problem> 7*8 + 6*9 <critique> <step_1> … </answer> <solution>             | completion …

Chat models (Qwen3, Qwen2.5, SmolLM2) get ChatML, written here by hand; `<think>` only if the model knows it:

    student   <|im_start|>user⏎ problem, instruction <|im_end|>⏎
              <|im_start|>assistant⏎<think>⏎⏎</think>⏎⏎                                  | …
    teacher   <|im_start|>user⏎ problem, context, instruction <|im_end|>⏎
              <|im_start|>assistant⏎<think>⏎T⏎</think>⏎⏎                                 | …

The student's thinking is off: an empty thought, as Qwen3's own template has it. The teacher's is on; but a
teacher that expects a thought would call every first token of the student's wrong, so its thought T is a
fixed sentence and closed.

Control tokens are put in by id. Text is encoded with them switched off, all of the tokenizer's added tokens,
so that a problem or a critique that spells `<|im_start|>` or `</think>` cannot become one.
"""
import json
from pathlib import Path

from tokenizers import Tokenizer as FastTokenizer

from sd import UserError

CONTEXT_TAGS = {"ref": "<reference>", "critique": "<critique>"}
CONTROL = ["<eos>", "<unk>", "<problem>", "<reference>", "<critique>", "<solution>"]
ENDS = ("<eos>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>")
INSTRUCTION = ("Solve the problem. Write your reasoning as numbered steps, each in its own tags: "
               "<step_1> … </step_1>, <step_2> … </step_2> and so on. "
               "Then write the final answer alone as <answer> … </answer>.")
INTRODUCTION = {"ref": "Here is a reference solution:",
                "critique": "Here is your attempt, corrected step by step by a teacher:"}
THOUGHT = "I have read what I was shown. Now I write my own solution, step by step."


class Tokenizer:
    """Wraps a tokenizer.json. Raises UserError if it is missing, unreadable or has no token to end a text."""

    def __init__(self, path: Path):
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            for token in raw.get("added_tokens") or []:
                token["special"] = True         # Qwen3's `<think>` is not: typed in a text, it would be one
            self.fast = FastTokenizer.from_str(json.dumps(raw))
        except Exception as error:              # the library raises bare Exception
            raise UserError(f"{path}: not a readable tokenizer.json ({str(error)[:200]})") from None
        self.fast.encode_special_tokens = True  # "<eos>" typed in a text stays text
        self.fast.no_padding()
        self.fast.no_truncation()
        self.path = path
        self.vocab_size = 1 + max(self.fast.get_vocab().values(), default=-1)       # ids may have gaps
        ends = [self.fast.token_to_id(token) for token in ENDS]
        self.eos = tuple(token for token in ends if token is not None)
        if not self.eos:
            raise UserError(f"{path}: knows none of the tokens that end a text: {' '.join(ENDS)}")
        self.chat_model = self.fast.token_to_id("<|im_start|>") is not None
        self.think_start, self.think_end, self.unknown = map(self.fast.token_to_id,
                                                             ("<think>", "</think>", "<unk>"))

    def encode(self, text: str) -> list[int]:
        return self.fast.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`, control tokens left out."""
        return self.fast.decode(ids, skip_special_tokens=True)

    def pieces(self, ids: list[int]) -> list[str]:
        """The text of each token, control tokens empty.

        Joined they are the text, so spans of characters map to tokens. A character cut in two by its bytes
        belongs to the token that completes it.
        """
        pieces, pending, said = [], [], 0
        for i, token in enumerate(ids):
            pending.append(token)
            text = self.decode(pending)
            cut = text.endswith("\ufffd") and i < len(ids) - 1  # one stands for all bytes of a cut character
            pieces.append(text[said:len(text) - cut])
            pending, said = (pending, len(text) - 1) if cut else ([], 0)
        return pieces

    def student_prompt(self, problem: str) -> list[int]:
        """Raises UserError if the tokenizer has neither the embedded solver's prompt tokens nor ChatML's, or
        if it is the embedded solver's and lacks the problem's."""
        if self.chat_model:
            return self.chat(f"{problem}\n\n{INSTRUCTION}", thought="\n\n")
        ids = self.encode(problem)
        if self.unknown in ids:
            raise UserError(f"{self.path}: does not know all characters of the problem {problem[:60]!r}; "
                            "the embedded solver reads sums of products alone")
        return [self._control("<problem>"), *ids, self._control("<solution>")]

    def teacher_prompt(self, problem: str, kind: str, context: str) -> list[int]:
        """`kind` names what the context is: "ref" or "critique"."""
        if self.chat_model:
            user = f"{problem}\n\n{INTRODUCTION[kind]}\n\n{context}\n\n{INSTRUCTION}"
            return self.chat(user, thought=f"\n{THOUGHT}\n")
        return [self._control("<problem>"), *self.encode(problem), self._control(CONTEXT_TAGS[kind]),
                *self.encode(context), self._control("<solution>")]

    def chat(self, user: str, thought: str | None = None) -> list[int]:
        """A user turn up to where the assistant goes on: after a closed `thought`, if the model can think."""
        start, end = self._control("<|im_start|>"), self._control("<|im_end|>")
        ids = [start, *self.encode(f"user\n{user}"), end, *self.encode("\n"), start,
               *self.encode("assistant\n")]
        if thought is not None and self.think_end is not None:
            ids += [self._control("<think>"), *self.encode(thought), self.think_end, *self.encode("\n\n")]
        return ids

    def _control(self, token: str) -> int:
        if (found := self.fast.token_to_id(token)) is None:
            raise UserError(f"{self.path}: lacks the control token {token}; "
                            "prompts are known for the embedded solver and for ChatML models")
        return found
