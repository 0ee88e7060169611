"""Reading the next piece while the last one is being written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor


def read_ahead[T](reads: Iterable[Callable[[], T]]) -> Iterator[T]:
    """What each of `reads` returns, in order; the next one runs in a thread meanwhile. Raises what they raise."""
    with ThreadPoolExecutor(1, thread_name_prefix="read_ahead") as pool:
        pending = None
        for read in reads:
            following = pool.submit(read)
            if pending is not None:
                yield pending.result()
            pending = following
        if pending is not None:
            yield pending.result()
