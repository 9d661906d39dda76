"""Data with a known answer, for tests and first steps."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from fedrec.data.cleaning import Dataset, RawRows, clean
from fedrec.errors import DataError
from fedrec.random import Key

START = 1_600_000_000
"""Seconds since 1970 UTC of the first interaction."""
STEP_SECONDS = 60


def checkerboard(n_users: int, n_items: int, n_groups: int, per_user: int, key: Key) -> Dataset:
    """Return people of `n_groups` tastes who touch only items of their own taste, each missing some of them.

    User u has taste ``u % n_groups`` and touches items i with ``i % n_groups`` equal to it, each at most once. Whoever
    recommends well fills the gaps: every unseen item of the user's own taste comes before any other.

    Args:
        n_users: how many people.
        n_items: how many items; all are in the catalogue from the start.
        n_groups: how many tastes.
        per_user: how many items each person touches; fewer than each taste has.
        key: the stream of random numbers that picks them.

    Raises:
        DataError: the sizes leave no gap to fill.

    Source: the checkerboard of implicit's test suite, tests/recommender_base_test.py, with random gaps.
    """
    if min(n_users, n_groups, per_user) < 1 or per_user >= n_items // n_groups:
        raise DataError(
            f"A checkerboard of {n_users} users, {n_items} items and {n_groups} groups with {per_user} items a user "
            f"leaves nothing to find: per_user must be at least 1 and below n_items // n_groups = "
            f"{n_items // max(n_groups, 1)}."
        )
    users = np.arange(n_users)
    rank = key.child("checkerboard").uniforms(users, n_items)
    rank[np.arange(n_items)[None, :] % n_groups != (users % n_groups)[:, None]] = np.inf
    return _dataset("checkerboard", np.argsort(rank, axis=1, kind="stable")[:, :per_user], n_items)


def sequential(n_users: int, n_items: int, length: int, key: Key) -> Dataset:
    """Return people who each start at a random item and go on to `successors` of the last one.

    Args:
        n_users: how many people.
        n_items: how many items; all are in the catalogue from the start.
        length: how many steps each person takes.
        key: the stream of random numbers that picks the order of items and the first steps.

    Raises:
        DataError: there is nobody, fewer than two items, or no step.
    """
    if min(n_users, n_items - 1, length) < 1:
        raise DataError(
            f"Sequences need at least 1 user, 2 items and length 1; asked for {n_users}, {n_items} and {length}."
        )
    after = successors(n_items, key)
    steps = np.empty((n_users, length), np.int64)
    steps[:, 0] = np.floor(key.child("sequential", "start").uniforms(np.arange(n_users), 1)[:, 0] * n_items)
    for step in range(1, length):
        steps[:, step] = after[steps[:, step - 1]]
    return _dataset("sequential", steps, n_items)


def successors(n_items: int, key: Key) -> NDArray[np.int64]:
    """Return the [n_items] number of the item that follows each item in `sequential`: one cycle through them all."""
    cycle = key.child("sequential", "cycle").numpy().permutation(n_items)
    after = np.empty(n_items, np.int64)
    after[cycle] = np.roll(cycle, -1)
    return after


def _dataset(name: str, steps: NDArray[np.int64], n_items: int) -> Dataset:
    """Return a data set in which user u touches ``steps[u, j]`` at step j; ids are the numbers, as text."""
    n_users, length = steps.shape
    # People take turns, so that cutting by global time gives each of them a share of every slice.
    turn = np.arange(length)[None, :] * n_users + np.arange(n_users)[:, None]
    rows = RawRows(
        user=np.repeat(np.arange(n_users), length),
        item=steps.ravel(),
        time=(START + STEP_SECONDS * turn.ravel()).astype(np.float64),
    )
    rows, report = clean(rows, now=None)
    titles: Mapping[str, str] = {str(i): f"item {i}" for i in range(n_items)}
    return Dataset.build(
        rows,
        titles,
        {},
        first_seen=dict.fromkeys(titles, START),
        name=name,
        report=report,
        provenance={"source": "synthetic", "sha256": "", "terms": "none"},
    )
