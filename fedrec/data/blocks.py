"""Blocks of a life, each with a test that is held back for good, so that forgetting can be measured.

A stream's test becomes the next slice's training, so it cannot be asked again later. Here every person's interactions
in a block are cut into training, validation and test; what is tested is never trained on, and never stands in a
history either. For that the log is laid out anew: block by block the training and validation interactions, in their
own order, then the tests of all blocks. Times only say which block and part a row belongs to.

Source: blocks as in Lim et al., CIKM 2025 (F3CRec); unlike theirs, what is known is masked over all blocks.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedrec.data.cleaning import Dataset, RawRows, clean, k_core
from fedrec.data.slices import TimeSlice, TimeWindow
from fedrec.errors import DataError

SPAN = 1 << 30
"""Time units of a block; validation starts in its middle."""
TRAIN, VALIDATION, TEST = 0, 1, 2
Ints = NDArray[np.int64]
Refit = Literal["no", "warm", "fresh"]
Mask = Literal["known", "block"]


def lay_out(
    rows: RawRows,
    block: Ints,
    part: Ints,
    *,
    name: str,
    hold: Literal["test", "validation"] = "test",
    titles: dict[str, str] | None = None,
    attributes: dict[str, tuple[str, ...]] | None = None,
) -> Dataset:
    """Return a data set in blocks, for ``split.kind = "blocks"``.

    Args:
        rows: [n] interactions, in the order in which each person did them; their times are not read.
        block: [n] number of each row's block, from 0.
        part: [n] `TRAIN`, `VALIDATION` or `TEST`.
        name: what to call it.
        hold: "test" asks for the tests; "validation" leaves those out altogether, asks for the validation interactions
            and makes as many before them validation, for choosing settings by a whole life.
        titles: item id to title.
        attributes: item id to tags.

    Raises:
        DataError: a block has nothing to train on or nothing held back.
    """
    n_blocks = int(block.max(initial=0)) + 1
    if hold == "validation":
        rows, block, part = _a_part_earlier(rows, block, part)
    asked = part == TEST
    for number in range(n_blocks):
        if not ((block == number) & asked).any() or not ((block == number) & (part == TRAIN)).any():
            raise DataError(
                f"Block {number} has nothing to train on or nothing held back; make fewer or larger blocks."
            )
    place = np.arange(len(block))
    time = block * SPAN + np.where(part == VALIDATION, SPAN // 2, 0) + np.where(asked, n_blocks * SPAN, 0) + place
    cleaned, report = clean(RawRows(rows.user, rows.item, time.astype(np.float64)), now=None, repeats="first")
    provenance = {"time_unit": "seconds", "source": "blocks"}
    built = Dataset.build(cleaned, titles or {}, attributes or {}, name=name, report=report, provenance=provenance)
    return Dataset(built.name, built.log, built.catalog, built.report, {**built.provenance, "time_unit": "blocks"})


def _a_part_earlier(rows: RawRows, block: Ints, part: Ints) -> tuple[RawRows, Ints, Ints]:
    """Return the rows without their tests: what was validation is test, and as many before it are validation."""
    kept = np.flatnonzero(part != TEST)
    rows, block, part = RawRows(rows.user[kept], rows.item[kept], rows.time[kept]), block[kept], part[kept]
    _, person = np.unique(rows.user.astype(str), return_inverse=True)
    _, group = np.unique(person * (int(block.max(initial=0)) + 1) + block, return_inverse=True)
    held, trained = np.bincount(group[part == VALIDATION], minlength=group.max() + 1), np.flatnonzero(part == TRAIN)
    trained = trained[np.argsort(group[trained], kind="stable")]
    ends = np.cumsum(np.bincount(group[trained], minlength=len(held)))
    back = ends[group[trained]] - np.arange(len(trained))  # 1 for the last of the group
    moved = np.where(part == VALIDATION, TEST, TRAIN)
    moved[trained[back <= held[group[trained]]]] = VALIDATION
    return rows, block, moved


def in_blocks(
    dataset: Dataset,
    base: float = 0.6,
    later: int = 3,
    share: float = 0.1,
    hold: Literal["test", "validation"] = "test",
    min_user: int = 0,
    min_item: int = 0,
) -> Dataset:
    """Cut a data set by global time into a base and equal later blocks, and hold back the end of each person's part.

    Of each person's k interactions in a block, the last ``max(1, round(share k))`` are test and as many before them
    validation; somebody with fewer than three in a block only trains in it.

    Args:
        dataset: with real times.
        base: share of the interactions in block 0.
        later: how many blocks follow.
        share: share of a person's interactions in a block that each of test and validation takes.
        hold: see `lay_out`.
        min_user: leave out people with fewer interactions, as often as needed (k-core).
        min_item: the same for items.

    Raises:
        DataError: the data set knows no global time, or a block would be empty.
    """
    if dataset.provenance.get("time_unit", "seconds") != "seconds":
        raise DataError(f"'{dataset.name}' knows no global time, so it cannot be cut into blocks.")
    log, catalog = dataset.log, dataset.catalog
    user = np.repeat(np.arange(log.n_users), np.diff(log.offsets))
    item, time = np.asarray(log.item, np.int64), np.asarray(log.time)
    kept = k_core(RawRows(user, item, np.zeros(len(log))), min_user, min_item)
    user, item, time = user[kept], item[kept], time[kept]
    place = np.empty(len(item), np.int64)
    place[np.argsort(time, kind="stable")] = np.arange(len(item))
    bounds = [(base + (1.0 - base) * i / later) * len(item) for i in range(later)]
    block = np.searchsorted(np.round(bounds), place, side="right").astype(np.int64)
    _, group, size = np.unique(user * (later + 1) + block, return_inverse=True, return_counts=True)
    starts = np.concatenate(([0], np.cumsum(size)))  # rows stand by user and time, so each group is one stretch
    back = size[group] - (np.arange(len(item)) - starts[group])  # 1 for the last of the group
    held = np.where(size >= 3, np.maximum(1, np.round(share * size)), 0)[group]
    part = np.where(back <= held, TEST, np.where(back <= 2 * held, VALIDATION, TRAIN)).astype(np.int64)
    ids, items = np.asarray(list(log.user_ids), object), np.asarray(catalog.ids, object)
    order = np.argsort(place)
    rows = RawRows(ids[user][order], items[item][order], np.zeros(len(item)))
    there = np.bincount(item, minlength=len(catalog)) > 0 if min_item > 1 or min_user > 1 else np.ones(len(catalog))
    numbers = [int(number) for number in np.flatnonzero(there)]
    return lay_out(
        rows, block[order], part[order], name=f"{dataset.name}, in {later + 1} blocks", hold=hold,
        titles={catalog.ids[i]: catalog.titles[i] for i in numbers},
        attributes={catalog.ids[i]: catalog.attributes[i] for i in numbers},
    )  # fmt: skip


def block_slices(dataset: Dataset, n_blocks: int, refit: Refit = "no", mask: Mask = "known") -> tuple[TimeSlice, ...]:
    """Return the slices of a data set in blocks; what one keeps for validation, the next one trains on.

    Args:
        dataset: what `lay_out` returned.
        n_blocks: how many blocks it has.
        refit: whether the rounds of a slice train on all blocks so far, see `fedrec.config.BlockSplit`.
        mask: what is no candidate, see there.

    Raises:
        DataError: the data set is not in so many blocks.
    """
    newest = int(dataset.log.time.max(initial=0)) // SPAN
    if dataset.provenance.get("time_unit") != "blocks" or newest != 2 * n_blocks - 1:
        raise DataError(
            f"'{dataset.name}' is not laid out in {n_blocks} blocks; make it with fedrec.data.blocks.in_blocks, or "
            'use split.kind = "stream".'
        )
    sizes = [dataset.catalog.n_items_at(max(1, i) * SPAN) for i in range(n_blocks)]
    life = tuple(TimeWindow(start=(n_blocks + i) * SPAN, end=(n_blocks + i + 1) * SPAN) for i in range(n_blocks))
    return tuple(
        TimeSlice(
            index=i,
            train=TimeWindow(start=max(0, i * SPAN - SPAN // 2), end=i * SPAN + SPAN // 2),
            test=life[i],
            n_items=dataset.catalog.n_items_at((i + 1) * SPAN),
            n_items_test=len(dataset.catalog),
            known=TimeWindow(start=0, end=(i + 1) * SPAN),
            fit=TimeWindow(start=0, end=i * SPAN + SPAN // 2) if refit != "no" else None,
            life=life,
            validation=TimeWindow(start=i * SPAN + SPAN // 2, end=(i + 1) * SPAN),
            masked=TimeWindow(start=i * SPAN, end=(i + 1) * SPAN) if mask == "block" else None,
            since=i * SPAN,
            born=tuple((j * SPAN, sizes[j]) for j in range(n_blocks)),
        )
        for i in range(n_blocks)
    )
