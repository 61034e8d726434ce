"""Feedback-aligned self-distillation, from scratch. README.md has the reading order."""
import functools
import sys
from collections.abc import Callable


class UserError(Exception):
    """Something the user can put right, in one sentence. The command lines print it and exit with status 2."""


def command(name: str) -> Callable[[Callable[..., None]], Callable[..., int]]:
    """Decorates the `main` of a command, which then returns its exit status and shows no traceback for what is no bug."""
    def decorate(main: Callable[..., None]) -> Callable[..., int]:
        @functools.wraps(main)
        def run(*args) -> int:
            try:
                main(*args)
                return 0
            except (UserError, OSError) as error:
                print(f"{name}: {error}", file=sys.stderr)
                return 2
            except KeyboardInterrupt:
                print(f"\n{name}: stopped", file=sys.stderr)
                return 130
        return run
    return decorate
