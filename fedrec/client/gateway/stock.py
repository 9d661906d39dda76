"""What a plan names and does not carry, as the gateway's devices download it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from fedrec.client.gateway.rounds import Blob, Round
from fedrec.client.shelf import FolderShelf, stocked
from fedrec.errors import TensorsMissing
from fedrec.protocol.parcels import Named


def in_use(rounds: Iterable[Round]) -> set[str]:
    """Return the digests of all tensors that open rounds need."""
    return {sha256 for one in rounds for sha256 in one.tensors}


def blobs(
    shelf: FolderShelf, named: Iterable[Named], parcels: Mapping[str, bytes], spare: Iterable[str]
) -> dict[str, Blob]:
    """Return digest -> blob of all that a plan names; what came with it is kept for later plans.

    Args:
        shelf: where the gateway keeps tensors.
        named: what the plan names.
        parcels: what came with it, by digest; what it does not name is left alone.
        spare: digests of what is in use, and stays.

    Raises:
        TensorsMissing: something neither came nor is kept.
        ProtocolError: what came is not what its digest says.
    """
    wanted = sorted({one.sha256 for one in named})
    arrived = {sha256: parcel for sha256, parcel in parcels.items() if sha256 in wanted}
    held = stocked(shelf, arrived, {*spare, *wanted})
    found, missing = dict[str, Blob](), []
    for sha256 in wanted:
        parcel = held(sha256)
        if parcel is None:
            missing.append(sha256)
            continue
        path = shelf.folder / sha256
        # Where the disk had no room, memory has to do.
        found[sha256] = Blob(sha256, len(parcel), None, path) if path.exists() else Blob.of(parcel)
    if missing:
        raise TensorsMissing(missing)
    return found
