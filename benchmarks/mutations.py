"""Messages as a bad line, a broken node or an attacker sends them: an honest document, changed."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np

from fedrec.protocol.tally import Tally

KINDS = (
    "cut off", "bit of the header", "length", "longer", "noise", "number", "shape, name or type", "weight", "ticket",
    "bit of the numbers",
)  # fmt: skip


def mutated(document: bytes, rng: random.Random, asked: int) -> bytes:
    """Return a document that differs from an honest one.

    Args:
        document: an honest tally.
        rng: draws the change.
        asked: how many clients were asked.
    """
    kind = rng.randrange(len(KINDS))
    data, head = bytearray(document), 8 + int.from_bytes(document[:8], "little")
    if kind == 0:
        return bytes(data[: rng.randrange(len(data))])
    if kind in (1, 9):
        place = rng.randrange(head) if kind == 1 else rng.randrange(head, len(data))
        data[place] ^= 1 << rng.randrange(8)
        return bytes(data)
    if kind == 2:  # 10 GB and more
        return rng.choice([10 << 30, 1 << 62, (1 << 64) - 1, 0, len(document)]).to_bytes(8, "little") + document[8:]
    if kind == 3:
        return document + rng.randbytes(rng.randrange(1, 2_000))
    if kind == 4:
        return rng.randbytes(rng.randrange(2_000))
    tally = Tally.from_bytes(document)
    if kind == 7:
        return replace(tally, n_clients=rng.choice([-8, 0, asked + 1, 10**9, 10**30])).to_bytes()
    if kind == 8:
        return replace(tally, ticket=rng.choice(["", "0" * 32, tally.ticket[:-1], tally.ticket + "0"])).to_bytes()
    sums = {name: value.copy() for name, value in tally.sums.items()}
    name = rng.choice(sorted(sums))
    if kind == 5:
        sums[name].ravel()[rng.randrange(sums[name].size)] = rng.choice([np.nan, np.inf, -np.inf, 1e30, -1e30])
    else:
        value = sums.pop(name)
        odd = rng.choice([value[:-1], value.ravel()[None], value.astype(np.float64), value.astype(np.int64), None])
        if odd is not None:
            sums[name] = odd
        if rng.random() < 0.3:
            sums[name + "x"] = value
    return replace(tally, sums=sums).to_bytes()
