"""Who takes part in a secure sum: lasting keys that clients know of each other, and what nodes sign with them.

A node signs its clients' advertisements and, later, whose contributions it sent. So the server can neither invent
clients nor swap keys, and cannot claim that more contributions arrived than were sent.

Source: Bonawitz et al., CCS 2017, section 4 (a public-key infrastructure against a server that deviates).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedrec.errors import ConfigError, MaskingError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

IDENTITY_BYTES, SIGNATURE_BYTES = 32, 64
Said = Literal["advertise", "mask"]
Ints = NDArray[np.int64]
Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Identities:
    """Public keys of all nodes that may take part, and for how many clients each may speak at most."""

    clients_of: Mapping[bytes, int]

    @classmethod
    def load(cls, path: Path) -> Identities:
        """Read a JSON document: public key in hexadecimal to number of clients.

        Raises:
            ConfigError: it cannot be read, or is none.
        """
        try:
            document: Any = json.loads(path.read_text(encoding="utf-8"))
            found = {bytes.fromhex(key): n for key, n in document.items()}
            if any(len(key) != IDENTITY_BYTES or type(n) is not int or n < 1 for key, n in found.items()):
                raise ValueError("a key has 64 digits, a number of clients is 1 or more")
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise ConfigError(f"Cannot read identities from '{path}': {error}.") from error
        return cls(found)

    def check(self, speaker: Bytes, n_clients: int) -> None:
        """Refuse a node that is not known, or speaks for more clients than it may.

        Raises:
            MaskingError: with which of both.
        """
        most = self.clients_of.get(speaker.tobytes())
        if most is None:
            raise MaskingError(f"The server introduces {speaker.tobytes().hex()[:12]}, whom this client does not know.")
        if n_clients > most:
            raise MaskingError(
                f"{speaker.tobytes().hex()[:12]} speaks for {n_clients} clients, and may for {most} at most."
            )


@dataclass(frozen=True)
class SecurePolicy:
    """On what a node insists in secure sums, whatever the server asks for.

    Attributes:
        identity: what the node signs with; None: it signs nothing.
        known: whom its clients take part with; None: whomever the server introduces.
        seeded_noise: take noise from a seed if terms say so; in simulations alone, for it protects nobody.
    """

    identity: Ed25519PrivateKey | None = None
    known: Identities | None = None
    seeded_noise: bool = False


STRICT = SecurePolicy()
"""What a node insists on that says nothing."""
SIMULATION = SecurePolicy(seeded_noise=True)
"""What nodes that are only simulated insist on."""


def signed(
    key: Ed25519PrivateKey | None, said: Said, session: str, parties: Ints, body: bytes = b""
) -> tuple[Bytes, Bytes]:
    """Return who speaks and the signature; both empty without a key."""
    if key is None:
        return np.zeros(0, np.uint8), np.zeros(0, np.uint8)
    signature = key.sign(_statement(said, session, parties, body))
    public = key.public_key().public_bytes_raw()
    return np.frombuffer(public, np.uint8), np.frombuffer(signature, np.uint8)


def verify(speaker: Bytes, signature: Bytes, said: Said, session: str, parties: Ints, body: bytes = b"") -> None:
    """Check that `speaker` said this of these parties.

    Raises:
        MaskingError: it did not.
    """
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        public = Ed25519PublicKey.from_public_bytes(speaker.tobytes())
        public.verify(signature.tobytes(), _statement(said, session, parties, body))
    except (InvalidSignature, ValueError) as error:
        raise MaskingError(f"The signature of {speaker.tobytes().hex()[:12]} does not fit what it says.") from error


def _statement(said: Said, session: str, parties: Ints, body: bytes) -> bytes:
    head = f"fedrec secure sum|{said}|{session}|{len(parties)}|".encode()
    return head + np.ascontiguousarray(parties, "<i8").tobytes() + body
