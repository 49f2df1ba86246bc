"""The one exception that a user is meant to read."""


class UserError(Exception):
    """Something the user can mend: one sentence that names what is wrong and the way out.

    The scripts print it to stderr without a traceback and exit with 1 (see ``common.cli.run``).
    Anything else that escapes is a bug of ours and keeps its traceback.
    """
