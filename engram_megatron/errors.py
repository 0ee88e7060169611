"""The one exception that a user may meet: a mistake that he can correct, told in one line."""


class UsageError(Exception):
    """Something a user set cannot work. The message says what, with which numbers, and what to change.

    Programs in `launch/` print it as one line and exit with code 2; it never shows a traceback.
    Our own broken invariants are `assert`s, not this.
    """
