"""A console for launches that a command makes for itself."""

from __future__ import annotations

from collections.abc import Callable


class Silent:
    """Keeps the launcher's messages, which explain a failure, and shows nothing."""

    def __init__(self, tick: Callable[[], None] | None = None) -> None:
        """Prepare it.

        Args:
            tick: called in place of showing what is new.
        """
        self.messages: list[str] = []
        self._tick = tick

    def begin(self, text: str) -> None:
        """Show nothing."""

    def tick(self) -> None:
        if self._tick is not None:
            self._tick()

    def say(self, text: str) -> None:
        self.messages.append(text)

    def close(self) -> None:
        """Do nothing."""

    def width(self) -> int | None:
        return None

    def paint(self, text: str, _colour: str | None) -> str:
        return text
