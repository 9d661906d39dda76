"""Documents of the wire format inside Flower messages; shared by ClientApp and ServerApp."""

from __future__ import annotations

from collections.abc import Mapping

from flwr.app import Array, ArrayRecord, RecordDict

from fedrec.errors import ProtocolError

RECORD, TENSOR, STYPE = "fedrec", "document", "fedrec"


def to_record(document: bytes, parcels: Mapping[str, bytes] | None = None) -> RecordDict:
    """Wrap a document as Flower content: one array, so that Flower sends a long one in chunks.

    Parcels, by digest, are arrays beside it: Flower sends one that goes to many nodes to the SuperLink once.
    """
    arrays = {TENSOR: _array(document)} | {sha256: _array(parcel) for sha256, parcel in (parcels or {}).items()}
    return RecordDict({RECORD: ArrayRecord(arrays)})


def _array(document: bytes) -> Array:
    return Array(dtype="uint8", shape=(len(document),), stype=STYPE, data=document)


def from_record(content: RecordDict) -> bytes:
    """Return the document that `to_record` wrapped.

    Raises:
        ProtocolError: there is none.
    """
    record = content.get(RECORD)
    if not isinstance(record, ArrayRecord) or TENSOR not in record:
        raise ProtocolError("The message holds no fedrec document; server and node run different software.")
    return bytes(record[TENSOR].data)


def parcels_of(content: RecordDict) -> dict[str, bytes]:
    """Return the parcels, by what they claim is their digest, that `to_record` wrapped with a document."""
    record = content.get(RECORD)
    if not isinstance(record, ArrayRecord):
        return {}
    return {str(name): bytes(array.data) for name, array in record.items() if name != TENSOR}
