"""Feedback-aligned self-distillation, from scratch. README.md has the reading order."""
import argparse
import functools
import sys
from collections.abc import Callable


class UserError(Exception):
    """An error that the user can fix, told in one sentence. The commands print it and exit with status 2."""


def out_of_memory(error: BaseException) -> bool:
    """PyTorch has an exception type for CUDA alone, and not for all of it; else only the message tells."""
    words = ("can't allocate memory", "out of memory", "ALLOC_FAILED", "not create a memory",
             "not create a primitive")
    return (isinstance(error, MemoryError)
            or isinstance(error, RuntimeError) and any(w in str(error) for w in words))


def command(name: str, about: str) -> Callable[[Callable[..., None]], Callable[..., int]]:
    """Decorates a command's `main(parser)`: it gets a parser whose help begins with `about`, returns an exit
    status, and shows a traceback only for bugs."""
    def decorate(main: Callable[..., None]) -> Callable[..., int]:
        @functools.wraps(main)
        def run(*args) -> int:
            parser = argparse.ArgumentParser(
                prog=name if name.endswith(".py") else f"python -m {name}", description=about,
                formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
            try:
                main(parser, *args)
                return 0
            except (UserError, OSError) as error:
                print(f"{name}: {error}", file=sys.stderr)
                return 2
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                print(f"{name}: out of memory; smaller batches (--sample-batch, --batch) need less",
                      file=sys.stderr)
                return 1
            except KeyboardInterrupt:
                print(f"\n{name}: stopped", file=sys.stderr)
                return 130
        return run
    return decorate
