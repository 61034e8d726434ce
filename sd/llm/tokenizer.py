"""Token ids <-> text, and a chat turn in ids.

Control tokens are put in by id. Text is encoded with all of the tokenizer's added tokens switched
off, so that a problem or a critique that spells `<|im_start|>` or `</think>` cannot become one.
"""
import json
from pathlib import Path

from tokenizers import Tokenizer as FastTokenizer

from sd import UserError

ENDS = ("<eos>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>")


class Tokenizer:
    """Wraps a tokenizer.json.

    Raises UserError if it is missing, unreadable or has no token to end a text.
    """

    def __init__(self, path: Path):
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            for token in raw.get("added_tokens") or []:
                token["special"] = True         # Qwen3 does not mark <think> so
            self.fast = FastTokenizer.from_str(json.dumps(raw))
        except Exception as error:              # the library raises bare Exception
            raise UserError(f"{path}: not a readable tokenizer.json ({str(error)[:200]})") from None
        self.fast.encode_special_tokens = True  # "<eos>" typed in a text stays text
        self.fast.no_padding()
        self.fast.no_truncation()
        vocabulary = self.fast.get_vocab()
        self.path = path
        self.vocab_size = 1 + max(vocabulary.values(), default=-1)      # ids may have gaps
        self.eos = tuple(vocabulary[token] for token in ENDS if token in vocabulary)
        if not self.eos:
            raise UserError(f"{path}: knows none of the tokens that end a text: {' '.join(ENDS)}")
        self.chat_model = "<|im_start|>" in vocabulary
        self.think_start = vocabulary.get("<think>")
        self.think_end = vocabulary.get("</think>")
        self.unknown = vocabulary.get("<unk>")

    def encode(self, text: str) -> list[int]:
        return self.fast.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`, control tokens left out."""
        return self.fast.decode(ids, skip_special_tokens=True)

    def pieces(self, ids: list[int]) -> list[str]:
        """The text of each token, control tokens empty.

        Joined they are the text, so spans of characters map to tokens. A character whose bytes lie
        in several tokens belongs to the token that completes it.
        """
        pieces = []
        pending = []        # tokens since the last whole character
        shown = 0           # characters of theirs that have been given to a token
        for i, token in enumerate(ids):
            pending.append(token)
            text = self.decode(pending)
            # one such sign stands for all bytes of an unfinished character
            if text.endswith("\ufffd") and i < len(ids) - 1:
                text = text[:-1]
                pieces.append(text[shown:])
                shown = len(text)
            else:
                pieces.append(text[shown:])
                pending, shown = [], 0
        return pieces

    def chat(self, user: str, thought: str | None = None) -> list[int]:
        """A user turn, up to where the assistant goes on: after a closed `thought` if it can think.

        Raises UserError if this is no ChatML model.
        """
        start, end = self.control("<|im_start|>"), self.control("<|im_end|>")
        ids = [start, *self.encode(f"user\n{user}"), end, *self.encode("\n")]
        ids += [start, *self.encode("assistant\n")]
        if thought is not None and self.think_end is not None:
            ids += [self.control("<think>"), *self.encode(thought)]
            ids += [self.think_end, *self.encode("\n\n")]
        return ids

    def control(self, token: str) -> int:
        """The id of a control token. Raises UserError if the tokenizer lacks it."""
        found = self.fast.token_to_id(token)
        if found is None:
            raise UserError(f"{self.path}: lacks the control token {token}; "
                            "prompts are known for the embedded solver and for ChatML models")
        return found
