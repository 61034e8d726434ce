"""Questions to any OpenAI-compatible chat server, over HTTP, with a patience that has limits.

What may pass (no answer, server errors, a busy server) is asked again, in growing intervals. A
prompt that is refused, such as one that is too long, is the caller's to count; everything else ends
the run. The key never leaves OPENAI_API_KEY but for the server itself.
"""
import json
import os
import random
import re
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from urllib.request import HTTPErrorProcessor, ProxyHandler, Request, build_opener

from sd import UserError
from sd.config import check_url

TRANSIENT = {408, 409, 425, 429}    # client errors that may pass, as every server error may
REFUSALS = {400, 413, 422}          # of one prompt; other prompts may be answered
UNSUPPORTED = re.compile(r"support.{0,20}\b(max_tokens|temperature)\b")   # newer OpenAI models
LARGEST = 16 * 2 ** 20              # bytes of a reply
SECRET = 8                          # characters; a shorter key (EMPTY, none, x) hides nothing


class AnyReply(HTTPErrorProcessor):
    """Errors and redirects are replies like others, so that no other host gets the key."""

    def http_response(self, request, response):
        return response

    https_response = http_response


@dataclass
class ChatClient:
    """A model behind an OpenAI-compatible chat server: http://localhost:8000/v1[#NAME].

    Without NAME, the server is asked for its model. OPENAI_API_KEY is read at each request and
    never stored. Raises UserError if the URL is none, or if the server has not just one model.
    """
    url: str
    max_new_tokens: int             # of an answer, thoughts included
    timeout: float = 900.0          # seconds for one answer
    retries: int = 6                # of a request that failed in a way that may pass
    backoff: float = 1.0            # seconds before the first retry; doubled, plus or minus half
    longest_wait: float = 60.0      # seconds between two attempts, whatever the server asks for

    def __post_init__(self):
        host = check_url(self.url)[1].lower()
        address, _, self.model_name = self.url.partition("#")
        self.url = address.rstrip("/").removesuffix("/chat/completions").rstrip("/")
        local = host in ("localhost", "127.0.0.1", "[::1]")     # a proxy has its own localhost
        self.opener = build_opener(AnyReply, ProxyHandler({} if local else None))
        self.stop = threading.Event()           # set: no further request is started
        self.options = {"temperature": 0, "max_tokens": self.max_new_tokens}
        if not self.model_name:
            names = self._call("/models", None,
                               lambda reply: [str(entry["id"]) for entry in reply["data"]])
            if len(names) != 1:
                raise UserError(f"{self.url} has {len(names)} models ({_shown(' '.join(names))}); "
                                "name one as URL#NAME")
            self.model_name = names[0]

    def ask(self, prompt: str) -> tuple[str, str]:
        """The greedy answer to one user turn, and why it is unusable (nothing if it is not).

        An option that the server does not know is left out from then on, and that is said once.
        Raises UserError if no prompt can be answered, and once `stop` is set.
        """
        payload = {"model": self.model_name, **self.options,
                   "messages": [{"role": "user", "content": prompt}]}
        content, reason = self._call("/chat/completions", json.dumps(payload).encode(), _message)
        named = UNSUPPORTED.search(reason)
        if not named or named[1] not in payload:
            return content, reason
        if named[1] == "max_tokens":
            self.options["max_completion_tokens"] = self.max_new_tokens
        if self.options.pop(named[1], None) is not None:        # else another thread was faster
            print(f"{self.url} does not take {named[1]}: left out", file=sys.stderr)
        return self.ask(prompt)

    def _call(self, path: str, data: bytes | None, read: Callable):
        """What `read` finds in the JSON reply. What may pass is retried, in growing intervals.

        If the server does not take this prompt: an empty answer, and what it says. Raises UserError
        on another failure that does not pass, and once `stop` is set.
        """
        failure, pause = "", 0.0
        for attempt in range(self.retries + 1):
            if self.stop.wait(pause):
                break                   # the batch has been given up: nobody sees the error below
            if attempt == 3:            # some seconds have passed: say why
                print(f"{failure}; still asking", file=sys.stderr)
            status, body, wait = self._once(path, data)
            if 200 <= status < 300:
                with suppress(ValueError, LookupError, TypeError, AttributeError, RecursionError):
                    return read(json.loads(body))
            failure = f"{self.url}{path}: {_failure(status, body)}"
            if data and status in REFUSALS:
                return "", failure
            if 300 <= status < 500 and status not in TRANSIENT:
                break
            pause = self.backoff * 2 ** attempt * random.uniform(0.5, 1.5)
            pause = min(max(pause, wait), self.longest_wait)
        hint = "" if data else "; if it does not list its models, name one as URL#NAME"
        raise UserError(f"{failure}, attempt {attempt + 1} of {self.retries + 1}{hint}")

    def _once(self, path: str, data: bytes | None) -> tuple[int, str, float]:
        """One request: status, body, seconds to wait. Without a reply: 0, the reason, 0."""
        headers = {"Content-Type": "application/json"}
        if _key():
            headers["Authorization"] = f"Bearer {_key()}"
        request = Request(self.url + path, data, headers)
        body = bytearray()
        deadline = time.monotonic() + self.timeout
        try:
            with self.opener.open(request, timeout=self.timeout) as response:
                for chunk in iter(lambda: response.read1(2 ** 16), b""):
                    body += chunk
                    if len(body) > LARGEST or time.monotonic() > deadline:
                        break               # what is incomplete is not JSON
        except (OSError, HTTPException, ValueError, OverflowError) as error:    # or no such host
            return 0, str(error), 0.0
        wait = re.fullmatch(r"\d+(\.\d+)?", response.headers.get("Retry-After", ""))
        return response.status, body.decode(errors="replace"), float(wait[0]) if wait else 0.0


def _failure(status: int, body: str) -> str:
    kind = f"HTTP {status}"
    if status == 0:
        kind = "no answer"
    elif status < 300:
        kind = "an answer that is not JSON of the expected shape"
    elif status < 400:
        kind += ", a redirect, which is not followed"
    return f"{kind} ({_shown(body)})"


def _message(reply: dict) -> tuple[str, str]:
    """What the model wrote, and why it cannot be used, if the server says so."""
    choice = reply["choices"][0]
    message = choice["message"]
    content = (message.get("content") or "").strip()
    reason = ""
    if choice.get("finish_reason") == "length":
        reason = "cut off"
    elif re.search("[\ud800-\udfff]", content):
        reason = "half a surrogate pair"        # which no tokenizer takes
    thoughts = [name for name in message if "reason" in name and message[name]]
    if thoughts and not content:
        reason = f"{reason or 'empty'}, with text in {thoughts[0]}"
    return _masked(content), reason


def _key() -> str:
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not re.fullmatch(r"[!-~]*", key):        # http.client's own error would show the key
        raise UserError("the environment variable OPENAI_API_KEY holds characters that no key has")
    return key


def _masked(text: str) -> str:
    """A server's text without the key, which it may have echoed."""
    key = _key()
    return text.replace(key, "[key]") if len(key) >= SECRET else text


def _shown(text: str) -> str:
    """A server's text for an error: one short line."""
    return ascii(_masked(text)[:200])
