"""Errors that are no mistake of Puna's."""


class UserError(RuntimeError):
    """Something that whoever runs Puna can mend, found on the way: said in one sentence. (What is
    wrong from the start is a ValueError.)"""
