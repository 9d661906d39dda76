from __future__ import annotations

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedrec.errors import PlanRefused, ProtocolError
from fedrec.models.configs import PopularityConfig
from fedrec.protocol import wire
from fedrec.protocol.signing import DeviceRelease, Terms, public_key, sign, verify

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
TERMS = Terms(ledger="main", cohort_minimum=100, epsilon=1.0, delta=1e-6, expires_at=10, nonce="0" * 32)


def test_a_signed_document_comes_back_with_its_terms() -> None:
    assert verify("plan", sign("plan", b"x", KEY, TERMS), [public_key(KEY)]) == (b"x", TERMS)


def test_a_stranger_another_purpose_and_no_signature_are_refused() -> None:
    envelope = sign("plan", b"x", KEY, TERMS)
    with pytest.raises(PlanRefused, match="does not trust"):
        verify("plan", envelope, [bytes(32)])
    with pytest.raises(PlanRefused, match="does not fit"):
        verify("release", envelope, [public_key(KEY)])
    with pytest.raises(PlanRefused, match="is not signed"):
        verify("plan", wire.pack("plan", {}, {}), [public_key(KEY)])


def test_changed_terms_and_flipped_bits_are_refused() -> None:
    envelope = sign("plan", b"the document", KEY, TERMS)
    header, tensors = wire.unpack("signed", envelope)
    header["terms"]["cohort_minimum"] = 1
    with pytest.raises(PlanRefused, match="does not fit"):
        verify("plan", wire.pack("signed", header, tensors), [public_key(KEY)])
    for place in range(len(envelope)):
        broken = bytearray(envelope)
        broken[place] ^= 1
        try:
            assert verify("plan", bytes(broken), [public_key(KEY)]) == (b"the document", TERMS)  # only padding moved
        except PlanRefused:
            continue


def test_a_device_release_must_fit_its_model() -> None:
    from fedrec.data.catalog import ItemCatalog

    catalog = ItemCatalog(("a", "b"), ("A", "B"), ((), ()), np.zeros(2, np.int64))
    release = DeviceRelease(3, PopularityConfig(), {"counts": np.ones(2, np.float32)}, catalog)
    again = DeviceRelease.from_bytes(release.to_bytes())
    assert (again.version, again.catalog.digest()) == (3, catalog.digest())
    with pytest.raises(ProtocolError):
        DeviceRelease.from_bytes(
            DeviceRelease(3, PopularityConfig(), {"counts": np.ones(3, np.float32)}, catalog).to_bytes()
        )
