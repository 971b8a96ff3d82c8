"""Errors and warnings that are no mistake of Puna's."""


class UserError(RuntimeError):
    """Something that whoever runs Puna can mend, found on the way: said in one sentence. (What is
    wrong from the start is a ValueError.)"""


class Notice(UserWarning):
    """Something that was left out or done otherwise than asked: a warning in Python, one line from
    a command."""
