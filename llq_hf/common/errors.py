"""LLQError, the exception whose text is written for the user: it names the cause and the cure."""


class LLQError(ValueError):
    """Bad input, or a check that failed. The command line prints its text, without a traceback, and
    exits with status 1.
    """
