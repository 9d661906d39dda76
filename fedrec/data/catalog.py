"""`ItemCatalog`: the public, append-only list of items."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedrec.errors import DataError, UnknownItem, nearest

FORMAT = 1


@dataclass(frozen=True, eq=False)
class ItemCatalog:
    """What everybody may know about the items, in order of arrival.

    An item's number is its place in the list; numbers are never reused, so the catalogue at an earlier time is a prefix
    of the catalogue now. It is public: nothing in it may depend on one person's history.

    Attributes:
        ids: [n_items] external ids.
        titles: [n_items] what to show.
        attributes: [n_items] sorted tags of each item, for example genres.
        first_seen: [n_items] int64, seconds since 1970 UTC at which the item joined; never decreasing.
    """

    ids: tuple[str, ...]
    titles: tuple[str, ...]
    attributes: tuple[tuple[str, ...], ...]
    first_seen: NDArray[np.int64] = field(repr=False)

    def __post_init__(self) -> None:
        """Check lengths, uniqueness and order of arrival."""
        n = len(self.ids)
        if not len(self.titles) == len(self.attributes) == len(self.first_seen) == n:
            raise DataError("The catalogue's columns differ in length.")
        if len(set(self.ids)) != n:
            raise DataError("The catalogue holds an item id twice; ids must be unique.")
        if n > 1 and bool((np.diff(self.first_seen) < 0).any()):
            raise DataError("The catalogue is not in order of arrival (first_seen decreases).")

    def __len__(self) -> int:
        """Return the number of items."""
        return len(self.ids)

    @cached_property
    def number_of(self) -> Mapping[str, int]:
        """External id to internal number."""
        return {item: number for number, item in enumerate(self.ids)}

    def numbers(self, ids: Iterable[str]) -> list[int]:
        """Return the numbers of external ids.

        Raises:
            UnknownItem: an id is not in the catalogue.
        """
        found = []
        for item in ids:
            if item not in self.number_of:
                hint = nearest(item, self.ids)
                raise UnknownItem(f"Unknown item id '{item}': the catalogue of {len(self):,} items has none{hint}.")
            found.append(self.number_of[item])
        return found

    def n_items_at(self, time: int) -> int:
        """Return how many items had joined before `time`."""
        return int(np.searchsorted(self.first_seen, time, side="left"))

    def prefix(self, n_items: int) -> ItemCatalog:
        """Return the catalogue as it was with its first `n_items` items."""
        return ItemCatalog(
            self.ids[:n_items], self.titles[:n_items], self.attributes[:n_items], self.first_seen[:n_items]
        )

    @cached_property
    def attribute_matrix(self) -> NDArray[np.float32]:
        """[n_items, n_attributes] 1 where the item carries the attribute; columns are sorted attribute names."""
        names = sorted({name for tags in self.attributes for name in tags})
        column = {name: j for j, name in enumerate(names)}
        matrix = np.zeros((len(self), max(1, len(names))), np.float32)
        for i, tags in enumerate(self.attributes):
            matrix[i, [column[name] for name in tags]] = 1.0
        return matrix

    def digest(self) -> str:
        """Return the SHA-256 of the catalogue, in hexadecimal."""
        text = json.dumps([self.ids, self.titles, self.attributes, self.first_seen.tolist()], ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def save(self, folder: Path) -> None:
        """Write ``catalog.json`` into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "catalog.json").write_text(self.to_json(), encoding="utf-8")

    def to_json(self) -> str:
        """Return the catalogue as one JSON document."""
        document = {
            "format": FORMAT,
            "ids": self.ids,
            "titles": self.titles,
            "attributes": self.attributes,
            "first_seen": self.first_seen.tolist(),
        }
        return json.dumps(document, ensure_ascii=False)

    @classmethod
    def load(cls, folder: Path) -> ItemCatalog:
        """Read ``catalog.json`` from `folder`.

        Raises:
            DataError: there is none, or it has another format.
        """
        path = folder / "catalog.json"
        if not path.is_file():
            raise DataError(f"No catalogue at '{folder}'; make one with `fedrec data import`.")
        return cls.from_json(path.read_text(encoding="utf-8"), str(path))

    @classmethod
    def from_json(cls, text: str, where: str = "catalogue") -> ItemCatalog:
        """Return the catalogue that `to_json` wrote; `where` names it in errors."""
        document = json.loads(text)
        if document.get("format") != FORMAT:
            raise DataError(f"'{where}' has format {document.get('format')}, this fedrec reads {FORMAT}.")
        return cls(
            tuple(document["ids"]),
            tuple(document["titles"]),
            tuple(tuple(tags) for tags in document["attributes"]),
            np.asarray(document["first_seen"], np.int64),
        )
