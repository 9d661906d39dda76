"""A state survives its file bit for bit, and refuses what it does not belong to."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from fedrec.data.catalog import ItemCatalog
from fedrec.errors import OtherVersion, RunError
from fedrec.random import Key
from fedrec.server.files import load_checkpoint, save_checkpoint
from fedrec.server.state import ServerState
from tests.support import same_bytes, small_experiment

TENSORS = (
    "params",
    "average",
    "memory",
    "counts",
    "statistic",
    "anchor",
    "prior",
    "study",
    "memories",
    "small",
    "small_memory",
)


def full_state() -> ServerState:
    random = Key.from_seed(1).numpy()
    return ServerState(
        "small/001",
        small_experiment().digest(),
        "c" * 64,
        slice=2,
        round=17,
        counted=3,
        params={"item": random.normal(size=(4, 3)).astype(np.float32), "blocks.0:odd": np.float32([1.5])},
        average={"item": random.normal(size=(4, 3)).astype(np.float32)},
        memory={
            "item/step": np.asarray(17.0, np.float32),
            "item/exp_avg": random.normal(size=(4, 3)).astype(np.float32),
        },
        counts={"counts": np.arange(4, dtype=np.float32)},
        study={"fitted:item": random.normal(size=(4, 3)).astype(np.float32)},
        lesson={"step": 3, "loss": [0.5], "teachers": {"fitted": {"weight": 1.0}}},
        parent=2,
        rounds=({"round": 16, "loss": 0.1 + 0.2, "refused": [{"node": "n", "reason": "r"}]},),
        releases=({"version": 2, "rows": {"release": {}}},),
    )


def test_a_state_comes_back_from_its_file_bit_for_bit(tmp_path: Path) -> None:
    state = full_state()
    save_checkpoint(tmp_path / "state", *state.to_record())
    found = ServerState.from_record(*load_checkpoint(tmp_path / "state"))
    for field in fields(ServerState):
        if field.name in TENSORS:
            assert same_bytes(getattr(found, field.name), getattr(state, field.name)), field.name
        else:
            assert getattr(found, field.name) == getattr(state, field.name), field.name
    assert found.rounds[0]["loss"] == 0.1 + 0.2  # JSON keeps every bit of a float


def test_a_fresh_state_comes_back_too(tmp_path: Path) -> None:
    state = ServerState("small/001", "e", "c")
    save_checkpoint(tmp_path / "state", *state.to_record())
    assert ServerState.from_record(*load_checkpoint(tmp_path / "state")) == state


def test_a_state_of_another_version_is_refused_in_one_sentence() -> None:
    header, tensors = full_state().to_record()
    for changed in ({**header, "later": 1}, {name: value for name, value in header.items() if name != "overhead"}):
        with pytest.raises(OtherVersion, match="is of another version of fedrec; go on with the fedrec that began"):
            ServerState.from_record(changed, tensors)


def test_a_release_holds_the_average_if_there_is_one() -> None:
    state = full_state()
    assert state.released is state.average
    assert state.advanced(average={}).released is state.params


def test_advancing_leaves_the_old_state_alone() -> None:
    state = full_state()
    assert state.advanced(round=18).round == 18
    assert state.round == 17


def catalog(n: int, title: str = "film") -> ItemCatalog:
    ids = tuple(f"i{number}" for number in range(n))
    return ItemCatalog(ids, tuple(f"{title} {one}" for one in ids), ((),) * n, np.arange(n))


def test_a_state_is_refused_by_another_experiment_and_by_other_data() -> None:
    items = catalog(4)
    state = full_state().advanced(catalog_digest=items.digest(), n_catalog=4)
    assert state.checked(small_experiment(), items) is state
    assert state.checked(small_experiment(runtime__nodes=5), items) is state
    with pytest.raises(RunError, match=r"Run 'small/001' was started with another experiment.*without --resume\.$"):
        state.checked(small_experiment(seed=4), items)
    for other in (catalog(3), catalog(4, "book"), catalog(9, "book")):
        with pytest.raises(RunError, match=r"Run 'small/001' was started on another catalogue"):
            state.checked(small_experiment(), other)


def test_a_state_goes_on_with_a_catalogue_that_was_only_added_to() -> None:
    state = full_state().advanced(catalog_digest=catalog(4).digest(), n_catalog=4)
    found = state.checked(small_experiment(), catalog(6))
    assert (found.catalog_digest, found.n_catalog) == (catalog(6).digest(), 6)
    assert found.advanced(catalog_digest=state.catalog_digest, n_catalog=4) == state


def test_the_root_key_is_the_seeds() -> None:
    assert ServerState.root_key(small_experiment(seed=9)) == Key.from_seed(9)
