"""Questions to any OpenAI-compatible chat server, over HTTP, with a patience that has limits.

What may pass (no answer, server errors, a busy server) is asked again, in growing intervals. What
may not ends the run. The key never leaves OPENAI_API_KEY but for the server itself.
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
LARGEST = 16 * 2 ** 20              # bytes of a reply


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
        if not self.model_name:
            names = self._call("/models", None,
                               lambda reply: [str(entry["id"]) for entry in reply["data"]])
            if len(names) != 1:
                raise UserError(f"{self.url} has {len(names)} models ({_shown(' '.join(names))}); "
                                "name one as URL#NAME")
            self.model_name = names[0]

    def ask(self, prompt: str) -> tuple[str, bool]:
        """The greedy answer to one user turn, and whether it ran out of tokens.

        Raises UserError if it fails for good, and once `stop` is set.
        """
        payload = {"model": self.model_name, "temperature": 0, "max_tokens": self.max_new_tokens,
                   "messages": [{"role": "user", "content": prompt}]}
        return self._call("/chat/completions", json.dumps(payload).encode(), _message)

    def _call(self, path: str, data: bytes | None, read: Callable):
        """What `read` finds in the JSON reply. What may pass is retried, in growing intervals.

        An empty result is asked for again too, but returned if it stays empty. Raises UserError on
        a failure that does not pass, and once `stop` is set.
        """
        failure = "not asked"
        pause = 0.0
        for attempt in range(self.retries + 1):
            if self.stop.wait(pause):
                break                   # the batch has been given up: nobody sees the error below
            if attempt == 3:            # some seconds have passed: say why
                print(f"{self.url}{path}: {failure}; still asking", file=sys.stderr)
            status, body, wait = self._once(path, data)
            if 200 <= status < 300:
                with suppress(ValueError, LookupError, TypeError, AttributeError, RecursionError):
                    result = read(json.loads(body))
                    if any(result) or attempt == self.retries:
                        return result
            failure = _failure(status, body)
            if 300 <= status < 500 and status not in TRANSIENT:
                break
            pause = self.backoff * 2 ** attempt * random.uniform(0.5, 1.5)
            pause = min(max(pause, wait), self.longest_wait)
        raise UserError(f"{self.url}{path}: {failure}, attempt {attempt + 1} of {self.retries + 1}")

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
        kind = "an answer that is empty or not JSON of the expected shape"
    elif status < 400:
        kind += ", a redirect, which is not followed"
    return f"{kind} ({_shown(body)})"


def _message(reply: dict) -> tuple[str, bool]:
    """What the model wrote, and whether it ran out of tokens."""
    choice = reply["choices"][0]
    content = choice["message"].get("content") or ""        # null if it was all thinking
    return content.strip(), choice.get("finish_reason") == "length"


def _key() -> str:
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not re.fullmatch(r"[!-~]*", key):        # http.client's own error would show the key
        raise UserError("the environment variable OPENAI_API_KEY holds characters that no key has")
    return key


def _shown(text: str) -> str:
    """A server's text for an error: one short line, without the key, which it may have echoed."""
    if _key():
        text = text.replace(_key(), "[key]")
    return ascii(text[:200])
