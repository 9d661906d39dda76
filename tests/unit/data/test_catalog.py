"""`ItemCatalog`: order of arrival, numbers, prefixes and the saved document."""

from __future__ import annotations

import numpy as np
import pytest

from fedrec.data.catalog import ItemCatalog
from fedrec.errors import DataError, UnknownItem


def small() -> ItemCatalog:
    return ItemCatalog(
        ("i7", "i3", "i9"), ("Seven", "Drei", "Nine"), (("b", "a"), (), ("a",)), np.array([10, 10, 25], np.int64)
    )


def test_numbers_are_places_in_the_list() -> None:
    assert small().numbers(["i9", "i7", "i9"]) == [2, 0, 2]
    assert small().number_of["i3"] == 1


def test_an_unknown_id_is_named_with_the_nearest() -> None:
    with pytest.raises(UnknownItem, match=r"Unknown item id 'i33': the catalogue of 3 items.*did you mean 'i3'"):
        small().numbers(["i7", "i33"])


def test_n_items_at_counts_items_that_joined_before() -> None:
    assert [small().n_items_at(time) for time in (10, 11, 25, 26)] == [0, 2, 2, 3]


def test_prefix_is_the_earlier_catalogue() -> None:
    prefix = small().prefix(2)
    assert (prefix.ids, prefix.titles, prefix.attributes) == (("i7", "i3"), ("Seven", "Drei"), (("b", "a"), ()))
    assert prefix.first_seen.tolist() == [10, 10]


def test_attribute_matrix_has_one_sorted_column_for_each_name() -> None:
    assert small().attribute_matrix.tolist() == [[1, 1], [0, 0], [1, 0]]
    assert small().prefix(2).attribute_matrix.shape == (2, 2)
    bare = ItemCatalog(("x",), ("X",), ((),), np.zeros(1, np.int64))
    assert bare.attribute_matrix.tolist() == [[0]]


@pytest.mark.parametrize(
    ("ids", "first_seen", "message"),
    [
        (("a", "b"), [0], "differ in length"),
        (("a", "a"), [0, 0], "an item id twice"),
        (("a", "b"), [1, 0], "not in order of arrival"),
    ],
)
def test_impossible_catalogues_are_refused(ids, first_seen, message) -> None:
    with pytest.raises(DataError, match=message):
        ItemCatalog(ids, ids, ((),) * len(ids), np.array(first_seen, np.int64))


def test_digest_sees_every_column() -> None:
    columns = {
        "ids": ("i7", "i3", "i8"),
        "titles": ("Seven", "Three", "Nine"),
        "attributes": (("b",), (), ("a",)),
        "first_seen": np.array([10, 10, 26], np.int64),
    }
    fields = ("ids", "titles", "attributes", "first_seen")
    parts = {name: getattr(small(), name) for name in fields}
    digests = {ItemCatalog(**{**parts, name: column}).digest() for name, column in columns.items()}
    assert len(digests | {small().digest()}) == 5


def test_save_and_load_give_the_same_catalogue(tmp_path) -> None:
    catalog = ItemCatalog(("ü",), ("Ärger 日本",), (("Sci-Fi",),), np.array([2**40], np.int64))
    catalog.save(tmp_path / "new")
    loaded = ItemCatalog.load(tmp_path / "new")
    assert loaded.digest() == catalog.digest()
    assert loaded.first_seen.dtype == np.int64
    assert loaded.attributes == (("Sci-Fi",),)


def test_load_refuses_nothing_and_another_format(tmp_path) -> None:
    with pytest.raises(DataError, match="No catalogue at"):
        ItemCatalog.load(tmp_path)
    with pytest.raises(DataError, match="'here' has format 2"):
        ItemCatalog.from_json('{"format": 2}', "here")
