"""The one exception that means: the user can mend this.

Its message says what was wrong, with the values, and what to do next. The command line prints it without a
traceback; every other exception is a defect of the program and keeps its traceback.
"""


class UserError(Exception):
    """Something outside the program is wrong (a path, a config value, a file's content, a server)."""


class Stopped(Exception):
    """SIGTERM asked for an end, and everything is saved: the same command goes on."""


class Unfinished(Exception):
    """What was asked is done and kept, but the product needs more that other commands make: the message says which."""


def first_line(error: Exception) -> str:
    """First line of an error's message that says anything, cut at 300 characters: what a UserError quotes."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]
