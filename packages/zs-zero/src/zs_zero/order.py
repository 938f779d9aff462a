"""The order in which units were needed last time, to gather the next one ahead."""

Event = tuple[int, str]  # (unit index, "forward" | "backward" | "recompute": a forward inside a backward)


class Order:
    """Predicts the next event from the last two.

    Two events of context tell the uses of a module apart that is called in several places. A changed order corrects
    itself as it is seen; `changes` counts wrong predictions, so that others can react (and check) while it is unstable.
    """

    def __init__(self) -> None:
        self._next: dict[tuple[Event | None, Event], Event] = {}
        self._previous: Event | None = None
        self._current: Event | None = None
        self.changes = 0
        self.turn: set[int] = set()  # the unit with which the last backward began, right after a forward

    def observe(self, event: Event) -> None:
        """Records that `event` happens now."""
        if self._current is not None:
            key = (self._previous, self._current)
            known = self._next.get(key)
            if known != event:
                self.changes += known is not None
                self._next[key] = event
        if self._current is not None and self._current[1] == "forward" != event[1]:
            self.turn = {event[0]}
        self._previous, self._current = self._current, event

    def predict(self) -> Event | None:
        """The event that followed last time, or None."""
        return None if self._current is None else self._next.get((self._previous, self._current))

    def ahead(self, count: int) -> list[Event]:
        """The events that followed last time, as far as they are known, `count` at most."""
        found: list[Event] = []
        previous, current = self._previous, self._current
        while current is not None and len(found) < count:
            following = self._next.get((previous, current))
            if following is None:
                break
            found.append(following)
            previous, current = current, following
        return found
