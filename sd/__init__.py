"""Feedback-aligned self-distillation, from scratch. README.md has the reading order.

Here is what every command needs: the error that a user can mend, and how a command ends.
"""
import argparse
import functools
import sys
from collections.abc import Callable


class UserError(Exception):
    """An error that the user can fix, told in one sentence; a command then exits with status 2."""


def out_of_memory(error: BaseException) -> bool:
    """PyTorch raises a type of its own only on CUDA, and not always: else the message is all."""
    words = ("can't allocate memory", "out of memory", "ALLOC_FAILED", "not create a memory",
             "not create a primitive")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def command(name: str, about: str) -> Callable[[Callable[..., None]], Callable[[], int]]:
    """Decorates a command's `main(parser)`, which gets a parser whose help begins with `about`.

    The decorated function takes no argument and returns an exit status. Only bugs show a traceback.
    """
    def decorate(main: Callable[..., None]) -> Callable[[], int]:
        @functools.wraps(main)
        def run() -> int:
            parser = argparse.ArgumentParser(
                prog=name if name.endswith(".py") else f"python -m {name}", description=about,
                formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
            try:
                main(parser)
                print(end="", flush=True)       # if it cannot be written, that is told below
                return 0
            except (UserError, OSError, FloatingPointError) as error:
                status, message = 2, str(error)
                if isinstance(error, OSError) and not error.filename:
                    message = f"standard output, it seems: {error}"
            except KeyboardInterrupt as stop:
                status, message = 128 + getattr(stop, "number", 2), "stopped"
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                status = 1
                message = (f"out of memory ({str(error)[:200]!r}); "
                           "a smaller --micro-batch or --sample-batch needs less")
            print(f"{name}: {message}", file=sys.stderr)
            return status
        return run
    return decorate
