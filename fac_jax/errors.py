"""The one exception that means: the user can mend this.

Its message says what was wrong, with the values, and what to do next. The command line prints it without a
traceback; every other exception is a defect of the program and keeps its traceback.
"""


class UserError(Exception):
    """Something outside the program is wrong (a path, a config value, a file's content, a server)."""
