"""Documents of the wire format inside Flower messages; shared by ClientApp and ServerApp."""

from __future__ import annotations

from flwr.app import Array, ArrayRecord, RecordDict

from fedrec.errors import ProtocolError

RECORD, TENSOR, STYPE = "fedrec", "document", "fedrec"


def to_record(document: bytes) -> RecordDict:
    """Wrap a document as Flower content: one array, so that Flower sends a long one in chunks."""
    array = Array(dtype="uint8", shape=(len(document),), stype=STYPE, data=document)
    return RecordDict({RECORD: ArrayRecord({TENSOR: array})})


def from_record(content: RecordDict) -> bytes:
    """Return the document that `to_record` wrapped.

    Raises:
        ProtocolError: there is none.
    """
    record = content.get(RECORD)
    if not isinstance(record, ArrayRecord) or TENSOR not in record:
        raise ProtocolError("The message holds no fedrec document; server and node run different software.")
    return bytes(record[TENSOR].data)
