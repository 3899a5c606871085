"""Bounded queues between two threads."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Generic, TypeVar

POLL_SECONDS = 1.0
"""How often a waiting thread checks whether the other one is alive."""

Item = TypeVar("Item")


class _End:
    """Marks the end of a queue."""


class _Thread(Generic[Item]):
    """A thread and a queue of `size` items to or from it."""

    def __init__(self, size: int, name: str) -> None:
        self._items: queue.Queue[Item | _End] = queue.Queue(size)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._error: BaseException | None = None

    def __len__(self) -> int:
        return self._items.qsize()

    def _run(self) -> None:
        raise NotImplementedError

    def _check_alive(self) -> None:
        if not self._thread.is_alive():  # out of memory, it cannot even pass on its error
            raise self._error or MemoryError(f"the {self._thread.name} thread has died")


class Ahead(_Thread[Item]):
    """Prefetch the items of an iterator in a separate thread.

    Args:
        items: the iterator; reading stops at its end, or at the end of the `with` block.
        size: maximum number of prefetched items.
        name: of the thread.

    Raises:
        Exception: iterating re-raises any error of `items`, and MemoryError if the thread has died.
    """

    def __init__(self, items: Iterable[Item], size: int, name: str) -> None:
        super().__init__(size, name)
        self._source = items
        self._stopping = threading.Event()

    def _run(self) -> None:
        try:
            for item in self._source:
                self._items.put(item)
                if self._stopping.is_set():
                    return
        except BaseException as error:
            self._error = error
        self._items.put(_End())

    def __iter__(self) -> Iterator[Item]:
        while True:
            try:
                item = self._items.get(timeout=POLL_SECONDS)
            except queue.Empty:
                if self._items.empty():
                    self._check_alive()
                continue
            if not isinstance(item, _End):
                yield item
            elif self._error is not None:
                raise self._error
            else:
                return

    def __enter__(self) -> Ahead[Item]:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        while self._thread.is_alive():
            with suppress(queue.Empty):
                self._items.get(timeout=0.05)


class Behind(_Thread[Item]):
    """Pass items to a function that runs in a separate thread.

    All items are consumed before the `with` block ends, unless `consume` fails.

    Args:
        consume: takes an iterator over all items.
        size: maximum number of waiting items.
        name: of the thread.

    Raises:
        Exception: `put` and the end of the block re-raise any error of `consume`, and MemoryError if the
            thread has died.
    """

    def __init__(self, consume: Callable[[Iterator[Item]], None], size: int, name: str) -> None:
        super().__init__(size, name)
        self._consume = consume

    def put(self, item: Item) -> None:
        """Pass on an item; waits while the queue is full."""
        self._put(item)

    def _put(self, item: Item | _End) -> None:
        while self._error is None:
            with suppress(queue.Full):
                return self._items.put(item, timeout=POLL_SECONDS)
            self._check_alive()
        raise self._error

    def _run(self) -> None:
        try:
            self._consume(self._until_end())
        except BaseException as error:
            self._error = error
            with suppress(queue.Empty):  # unblocks a waiting `put`
                while True:
                    self._items.get_nowait()

    def _until_end(self) -> Iterator[Item]:
        while not isinstance(item := self._items.get(), _End):
            yield item

    def __enter__(self) -> Behind[Item]:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self._put(_End())
            self._thread.join()
            if self._error is not None or len(self):
                self._check_alive()
        except Exception:
            if kind is None:  # otherwise the first error is more useful
                raise
