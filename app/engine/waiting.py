"""Who is next: sequences wait in one lane per soft prompt, and the lanes take turns."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator

from app.engine.sequence import Sequence


class WaitingQueue:
    """Round robin over the lanes, first come first served within one, so a busy task delays only itself.

    A sequence that had run already goes before all lanes; one that goes on with a request, first in its own lane.
    """

    def __init__(self) -> None:
        self._resumed: deque[Sequence] = deque()
        self._lanes: OrderedDict[str | None, deque[Sequence]] = OrderedDict()  # the one whose turn it is first
        self._length = 0  # counted, because other threads ask for it while the lanes change

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Sequence]:
        yield from self._resumed
        for lane in self._lanes.values():
            yield from lane

    def heads(self) -> list[Sequence]:
        """Who may be admitted now, in order: everyone who has run before, and the first of each lane."""
        return [*self._resumed, *(lane[0] for lane in self._lanes.values())]

    def add(self, sequence: Sequence) -> None:
        self._length += 1
        self._lanes.setdefault(_lane(sequence), deque()).append(sequence)

    def add_next(self, sequence: Sequence) -> None:
        self._length += 1
        self._lanes.setdefault(_lane(sequence), deque()).appendleft(sequence)

    def resume(self, sequence: Sequence) -> None:
        self._length += 1
        self._resumed.appendleft(sequence)

    def remove(self, sequence: Sequence) -> bool:
        """Take a sequence out, wherever it is; False if it is not here."""
        if sequence in self._resumed:
            self._resumed.remove(sequence)
            self._length -= 1
            return True
        name = _lane(sequence)
        lane = self._lanes.get(name)
        if lane is None or sequence not in lane:
            return False
        lane.remove(sequence)
        self._length -= 1
        if not lane:
            del self._lanes[name]
        return True

    def admit(self, sequence: Sequence) -> None:
        """Take out one of the heads; its lane has had its turn."""
        self.remove(sequence)
        name = _lane(sequence)
        if name in self._lanes:
            self._lanes.move_to_end(name)


def _lane(sequence: Sequence) -> str | None:
    return sequence.prompt.digest if sequence.prompt else None
