"""The one exception that a user is meant to read: a sentence that names the cause and the cure."""


class LLQError(ValueError):
    """Bad input or a failed check. The command line prints its text and exits with status 1,
    without a traceback.
    """
