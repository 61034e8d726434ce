"""Feedback-aligned self-distillation, from scratch. README.md has the reading order."""


class UserError(Exception):
    """Something the user can put right, in one sentence. The command lines print it and exit with status 2."""
