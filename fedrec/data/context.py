"""The moment of a request: time of day, day of the week, device and place, as numbers that a model can read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedrec.errors import ConfigError, nearest

DAY, WEEK = 86_400, 7
EPOCH_WEEKDAY = 3
"""1970-01-01 was a Thursday; Monday is 0."""
FIRST_TIME = 31_536_000
"""Seconds since 1970 below which a number is no time but an order, or none is known."""


class ContextConfig(BaseModel):
    """What of a moment is told apart. It moves all scores of a request; what is unknown moves none."""

    model_config = ConfigDict(defer_build=True, frozen=True, extra="forbid")
    hours: int = Field(default=0, ge=0, le=24)
    """Into how many equal parts a day is cut (UTC); 0: the time of day does not count."""
    weekdays: bool = False
    """Whether days of the week are told apart."""
    device: tuple[str, ...] = ()
    """Names of devices that are told apart; an interaction names its own as in "play@tv"."""
    place: tuple[str, ...] = ()
    """Names of places that are told apart; an interaction names its own as in "play@tv:home" or "play@:home"."""

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.width == 0:
            raise ValueError("no context is told apart; leave the table out")
        if len(set(self.device)) < len(self.device) or len(set(self.place)) < len(self.place):
            raise ValueError("a device or a place is named twice")
        return self

    @property
    def width(self) -> int:
        """How many numbers a moment has."""
        return self.hours + WEEK * self.weekdays + len(self.device) + len(self.place)

    @property
    def timed(self) -> bool:
        """Whether the time matters."""
        return bool(self.hours or self.weekdays)

    def moments(
        self, time: NDArray[np.int64], event: NDArray[np.int8], event_kinds: tuple[str, ...]
    ) -> NDArray[np.float32]:
        """Return [*shape, width] ones where the moment of an interaction has a property.

        Args:
            time: [*shape] seconds since 1970 UTC.
            event: [*shape] index into `event_kinds`.
            event_kinds: names such as "play@tv:home".
        """
        known = time >= FIRST_TIME
        parts = []
        if self.hours:
            parts.append(_ones(np.where(known, time % DAY * self.hours // DAY, -1), self.hours))
        if self.weekdays:
            parts.append(_ones(np.where(known, (time // DAY + EPOCH_WEEKDAY) % WEEK, -1), WEEK))
        for names, which in ((self.device, 1), (self.place, 2)):
            if names:
                number = np.array([_place(split(kind)[which], names) for kind in event_kinds] or [-1], np.int64)
                parts.append(_ones(number[np.minimum(event, len(number) - 1)], len(names)))
        return np.concatenate(parts, -1)

    def moment(self, what: Mapping[str, Any]) -> NDArray[np.float32]:
        """Return the [width] numbers of a request.

        Args:
            what: "time" in seconds since 1970 UTC, or "hour" (0 to 23) and "weekday" (0 is Monday); "device", "place".

        Raises:
            ConfigError: a key or a name is unknown here, or a number is outside its range.
        """
        keys = ("time", "hour", "weekday", "device", "place")
        odd = next((key for key in what if key not in keys), None)
        if odd is not None:
            raise ConfigError(f"A moment has no '{odd}'{nearest(odd, keys)}; known are {', '.join(keys)}.")
        for key, names in (("device", self.device), ("place", self.place)):
            if key in what and what[key] not in names:
                known = ", ".join(names) or "none"
                raise ConfigError(f"The model knows no {key} '{what[key]}'; known are: {known}.")
        time = what.get("time")
        hour = what.get("hour", None if time is None else int(time) % DAY // 3600)
        weekday = what.get("weekday", None if time is None else (int(time) // DAY + EPOCH_WEEKDAY) % WEEK)
        for key, value, most in (("hour", hour, 24), ("weekday", weekday, WEEK)):
            if value is not None and not (isinstance(value, int) and 0 <= value < most):
                raise ConfigError(f"A moment's {key} is a whole number from 0 to {most - 1}, not {value!r}.")
        parts = [
            _ones(np.array(-1 if hour is None else hour * self.hours // 24), self.hours),
            _ones(np.array(-1 if weekday is None else weekday), WEEK * self.weekdays),
            _ones(np.array(_place(what.get("device"), self.device)), len(self.device)),
            _ones(np.array(_place(what.get("place"), self.place)), len(self.place)),
        ]
        return np.concatenate(parts, -1)


def split(kind: str) -> tuple[str, str | None, str | None]:
    """Return the event, the device and the place of a kind of interaction.

    >>> split("play@tv:home"), split("play@:home"), split("play")
    (('play', 'tv', 'home'), ('play', None, 'home'), ('play', None, None))
    """
    event, _, where = kind.partition("@")
    device, _, place = where.partition(":")
    return event, device or None, place or None


def _place(name: Any, names: tuple[str, ...]) -> int:
    return names.index(name) if name in names else -1


def _ones(number: NDArray[Any], n: int) -> NDArray[np.float32]:
    """Return [*shape, n] ones at these numbers; none for -1."""
    return np.asarray(number[..., None] == np.arange(n), np.float32)
