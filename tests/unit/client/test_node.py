"""A node's settings, and the pool that they describe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedrec.client.device_pool import DevicePool
from fedrec.client.node import NodeSettings, hosted_policy, hosted_pool, person_number, reason, renumbered
from fedrec.client.pool import LogPool
from fedrec.client.store import Store
from fedrec.data.catalog import ItemCatalog
from fedrec.errors import ConfigError
from tests.support import dataset_of, small_rows, to_toml

DATA = dataset_of(small_rows())


def write(folder: Path, **document: Any) -> Path:
    path = folder / "node.toml"
    path.write_text(to_toml({"server": "localhost:1", **document}), encoding="utf-8")
    return path


def test_a_node_hosts_a_data_set_under_the_numbers_of_the_public_catalogue(tmp_path: Path) -> None:
    DATA.save(tmp_path / "data")
    ids = tuple(reversed(DATA.catalog.ids[:40]))
    public = ItemCatalog(ids, ids, ((),) * 40, np.zeros(40, np.int64))
    public.save(tmp_path / "public")
    pool = hosted_pool(write(tmp_path, name="shop", data="data", catalog="public"))
    assert isinstance(pool, LogPool)
    assert pool.name == "shop"
    theirs = [DATA.catalog.ids[item] for item in DATA.log.history(3) if item < 40]
    assert [ids[item] for item in pool.log.history(3)] == theirs != []
    assert pool.ids[3] == person_number("shop", DATA.log.user_ids[3]) >= 0
    assert person_number("other", DATA.log.user_ids[3]) != pool.ids[3]


def test_a_share_is_the_simulations_partition(tmp_path: Path) -> None:
    DATA.save(tmp_path / "data")
    pool = hosted_pool(write(tmp_path, data="data", share=[1, 3]))
    same = LogPool.partition(DATA.log, DATA.catalog, 1, 3)
    assert isinstance(pool, LogPool)
    assert pool.name == same.name
    assert pool.ids.tolist() == same.ids.tolist()
    assert pool.log.digest() == same.log.digest()


def test_a_household_hosts_its_stores(tmp_path: Path) -> None:
    DATA.catalog.save(tmp_path / "public")
    for name in ("ann", "bob"):
        with_store = Store(tmp_path / name)
        with_store.record(DATA.catalog.ids[0], time=10)
        with_store.close()
    pool = hosted_pool(write(tmp_path, name="home", stores=["ann", "bob"], catalog="public"))
    assert isinstance(pool, DevicePool)
    assert (pool.name, len(pool.stores)) == ("home", 2)
    for store in pool.stores:
        store.close()


@pytest.mark.parametrize(
    ("document", "sentence"),
    [
        ({}, "say where the people's histories are: give one of 'data', 'stores' and 'gateway'"),
        ({"data": "d", "stores": ["s"]}, "give one of 'data', 'stores' and 'gateway'"),
        ({"stores": ["s"]}, "stores know no catalogue; give 'catalog'"),
        ({"data": "d", "share": [3, 3]}, "'share' is [i, n] with 0 <= i < n"),
        ({"data": "d", "nam": "x"}, "Unknown key 'nam' in"),
    ],
)
def test_a_mistake_gives_one_sentence(tmp_path: Path, document: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        NodeSettings.load(write(tmp_path, **document))
    assert sentence in str(caught.value)


def test_a_catalogue_of_other_items_is_refused() -> None:
    public = ItemCatalog(("a",), ("a",), ((),), np.zeros(1, np.int64))
    with pytest.raises(ConfigError, match="None of the items of 'small' is in the public catalogue of 1 items"):
        renumbered(DATA, public)


def test_flowers_last_words_are_put_plainly() -> None:
    settings = NodeSettings(server="host:1", data="d")
    assert reason(["x", "[SSL: CERTIFICATE_VERIFY_FAILED] certificate has expired"], settings) == (
        "host:1: the server's certificate has expired; make a new one there with `fedrec server renew`."
    )
    assert reason(["something else"], settings) == "Flower said: something else"


def test_a_node_insists_in_secure_sums_on_what_its_file_says(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    plain = hosted_policy(write(tmp_path, data="data"))
    assert (plain.identity, plain.known, plain.seeded_noise) == (None, None, False)
    key = Ed25519PrivateKey.generate()
    (tmp_path / "id.key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    (tmp_path / "ids.json").write_text(f'{{"{key.public_key().public_bytes_raw().hex()}": 3}}')
    policy = hosted_policy(write(tmp_path, data="data", identity="id.key", identities="ids.json", seeded_noise=True))
    assert policy.identity is not None
    assert policy.known is not None
    assert list(policy.known.clients_of.values()) == [3]
    assert policy.seeded_noise
