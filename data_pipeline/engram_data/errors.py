"""The one exception of this package that a user may meet."""


class CorpusError(Exception):
    """Text, a tokenizer or a corpus cannot be used as given. One line: what, where, the numbers, what to change.

    Programs in `launch/` print it and exit with code 2. Our own broken invariants are `assert`s, not this.
    """
