"""What a party may have to say again: the bytes of forwards whose outcome the owner can lose.

A kept step is asked for again before its backward if the owner restarted meanwhile, and a KV cache is filled again from
its first message on. It is the very same bytes both times, so nothing more is released than before.
"""

from __future__ import annotations

from splitfl.wire.codecs import Frame
from splitfl.wire.messages import Forward


class SentForwards:
    """Frames of forwards, for as long as they may be needed once more."""

    def __init__(self) -> None:
        self._kept: dict[int, list[Frame]] = {}
        self._caches: dict[int, dict[int, list[Frame]]] = {}

    def note(self, message: Forward, frames: list[Frame]) -> None:
        """Keep what was sent, if it is a step to be kept or goes into a cache."""
        if message.keep:
            self._kept[message.step] = frames
        if message.cache is not None:
            if not message.past:  # a cache begins anew
                self._caches[message.cache] = {}
            self._caches.setdefault(message.cache, {})[message.step] = frames

    def kept(self, step: int) -> list[Frame] | None:
        """The forward of a step that was to be kept."""
        return self._kept.get(step)

    def before(self, message: Forward) -> list[list[Frame]]:
        """What filled the cache of `message` up to it, in order; nothing where that is not known."""
        filled = self._caches.get(message.cache, {}) if message.cache is not None else {}
        return [frames for step, frames in filled.items() if step < message.step]

    def drop(self, *, caches: tuple[int, ...] = (), steps: tuple[int, ...] = ()) -> None:
        """Forget what will not be asked for again."""
        for step in steps:
            self._kept.pop(step, None)
        for cache in caches:
            self._caches.pop(cache, None)
