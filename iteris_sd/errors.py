"""The error that is meant for a person."""


class UserError(ValueError):
    """Something given from outside is wrong; the message says what was wrong, what was found and what to do.

    The page and the terminal show the message as it is, without a traceback.
    """


class MemoryShort(UserError):
    """Memory does not suffice for what was asked, also bit by bit."""
