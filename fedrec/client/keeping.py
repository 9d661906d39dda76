"""What a device keeps between two calls while it takes part: an unsent answer, and the secrets of a masked sum."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

from fedrec.client.store import Store

LOCK = "participate.lock"
_HEAD, _BODY, _SECRETS = "unsent", "unsent document", "masked sum"


@dataclass(frozen=True)
class Unsent:
    """An answer that is on the disk before its first byte leaves, so that whatever cuts it off, the same bytes go on.

    Attributes:
        task: the gateway's name for what was asked.
        verb: what was asked.
        document: the answer.
    """

    task: str
    verb: str
    document: bytes

    @property
    def sha256(self) -> str:
        """Digest of the answer, in hexadecimal."""
        return hashlib.sha256(self.document).hexdigest()


@dataclass(frozen=True)
class _Head:
    task: str
    verb: str


def keep_unsent(store: Store, unsent: Unsent) -> None:
    """Keep an answer."""
    with store.together():
        store.keep(_HEAD, json.dumps(asdict(_Head(unsent.task, unsent.verb))).encode())
        store.keep(_BODY, unsent.document)


def kept_unsent(store: Store) -> Unsent | None:
    """Return the answer that is kept, or None."""
    head, body = store.kept(_HEAD), store.kept(_BODY)
    if head is None or body is None:
        return None
    found = json.loads(head)
    return Unsent(str(found["task"]), str(found["verb"]), body)


def drop_unsent(store: Store) -> None:
    """Keep no answer any more."""
    with store.together():
        store.drop(_HEAD)
        store.drop(_BODY)


def keep_secrets(store: Store, memory: bytes) -> None:
    """Keep what a masked sum needs until its next phase. It never leaves the device."""
    store.keep(_SECRETS, memory)


def kept_secrets(store: Store) -> bytes | None:
    """Return what `keep_secrets` kept, or None."""
    return store.kept(_SECRETS)
