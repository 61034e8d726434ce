"""Token ids <-> text, and a chat turn in ids.

Control tokens are put in by id. Text is encoded with all of the tokenizer's added tokens switched
off, so that a problem or a critique that spells `<|im_start|>` or `</think>` cannot become one.
"""
import json
import re
from pathlib import Path

from tokenizers import Tokenizer as FastTokenizer

from sd import UserError

ENDS = ("<eos>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>")
# How the assistant's turn begins, by which a chat template is known, and the user's turn before it:
# ChatML and Llama 3's format. A model with another format can be prompted once it stands here.
TURNS = {
    "<|im_start|>assistant\n": "<|im_start|>user\n{text}<|im_end|>\n",
    "<|start_header_id|>assistant<|end_header_id|>\n\n":
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{trimmed}<|eot_id|>",
}
CONTROL = re.compile(r"(<[^<>\s]+>)")


class Tokenizer:
    """Wraps a tokenizer.json; `template` is the model's chat template, if it has one.

    `bos` is the token that the template calls bos_token. Raises UserError if the file is missing,
    unreadable or has no token to end a text, or if no prompt is known for the model.
    """

    def __init__(self, path: Path, template: str = "", bos: str = ""):
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
        self.ids = set(vocabulary.values())
        self.vocab_size = 1 + max(self.ids, default=-1)                 # ids may have gaps
        self.eos = tuple(vocabulary[token] for token in ENDS if token in vocabulary)
        if not self.eos:
            raise UserError(f"{path}: knows none of the tokens that end a text: {' '.join(ENDS)}")
        template = re.sub(r"\\+n", "\n", template)      # a new line may stand there as \\n
        known = [user + start for start, user in TURNS.items()
                 if start in (template or start) and CONTROL.match(start)[0] in vocabulary]
        self.chat_model = bool(known)
        if not known and "<problem>" not in vocabulary:
            raise UserError(f"{path.parent}: the chat template, or without one the tokens, are not "
                            "of ChatML or Llama 3; add the format to TURNS, sd/llm/tokenizer.py")
        self.turns = (known or ["<|im_start|>"])[0]     # which the embedded solver's file lacks
        if "bos_token" in template and bos not in self.turns:
            self.turns = bos + self.turns
        # the template tells: Qwen3's models without a thinking mode have the tokens, too
        ending = template.rpartition("add_generation_prompt")[2]
        self.thinks = "<think>" in (ending or vocabulary)
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
        before = []         # tokens back to the last text: some decoders drop a space at the start
        pending = []        # tokens since the last whole character
        shown = 0           # characters of theirs that have been given to a token
        for i, token in enumerate(ids):
            pending.append(token)
            text = self.decode(before + pending)[len(self.decode(before)):]
            # one such sign stands for all bytes of an unfinished character
            if text.endswith("\ufffd") and i < len(ids) - 1:
                text = text[:-1]
                pieces.append(text[shown:])
                shown = len(text)
            else:
                pieces.append(text[shown:])
                before = pending if text else before + pending
                pending, shown = [], 0
        return pieces

    def chat(self, user: str, thought: str | None = None) -> list[int]:
        """A user turn, up to where the assistant goes on: after a closed `thought` if it can think.

        Raises UserError if this is no chat model.
        """
        turns = self.turns
        if thought is not None and self.thinks:
            turns += "<think>{thought}</think>\n\n"
        ids = []
        for part in CONTROL.split(turns):
            if CONTROL.match(part):
                ids.append(self.control(part))
            else:
                ids += self.encode(part.format(text=user, trimmed=user.strip(), thought=thought))
        return ids

    def control(self, token: str) -> int:
        """The id of a control token. Raises UserError if the tokenizer lacks it."""
        found = self.fast.token_to_id(token)
        if found is None:
            raise UserError(f"{self.path}: lacks the control token {token}; prompts are known for "
                            "the embedded solver and for chat models")
        return found
