"""`GatewayClient`: a device's side of the gateway protocol, over gRPC and TLS."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc

from fedrec.client.conditions import Conditions
from fedrec.client.keeping import Unsent
from fedrec.errors import ConfigError, GatewayError
from fedrec.protocol.gateway.v1 import gateway_pb2 as messages

SERVICE = "fedrec.gateway.v1.Device"
CHUNK_BYTES = 256 << 10
CALL_SECONDS = 30.0
TRANSFER_SECONDS = 600.0
REASONS = {
    "CERTIFICATE_VERIFY_FAILED": "its certificate is expired, for another host, or not one that this device trusts",
    "WRONG_VERSION_NUMBER": "what listens there does not speak TLS",
    "Connection refused": "nobody listens there",
}


@dataclass(frozen=True)
class Given:
    """A blob that the gateway offers: its digest and its size in bytes."""

    sha256: str
    size: int


@dataclass(frozen=True)
class Assignment:
    """What the gateway asks of the device; see gateway.proto."""

    task: str
    verb: str
    document: Given | None
    plan: Given | None
    seconds_left: float
    upload_limit: int


@dataclass(frozen=True)
class CheckedIn:
    """What the gateway says to a device that is there.

    Attributes:
        assignment: something to do, or None.
        come_back_seconds: without an assignment, when to ask again.
        release: version and blob of the newest release, or None.
        stay: a masked sum is under way in which the device takes part.
    """

    assignment: Assignment | None
    come_back_seconds: float
    release: tuple[int, Given] | None
    stay: bool


class GatewayClient:
    """One device's connection to its gateway; there is no way to make one without TLS."""

    def __init__(self, address: str, root_certificates: bytes, token: str) -> None:
        """Name the gateway; it is connected to when something is asked.

        Args:
            address: ``host:port``.
            root_certificates: PEM of those that vouch for it.
            token: the device's own.

        Raises:
            ConfigError: the certificates are none.
        """
        if b"BEGIN CERTIFICATE" not in root_certificates:
            raise ConfigError("The enrolment holds no root certificate, so the gateway could not be recognised.")
        self.address = address
        self._metadata = (("authorization", f"Bearer {token}"),)
        credentials = grpc.ssl_channel_credentials(root_certificates)
        options = [("grpc.enable_retries", 0), ("grpc.max_receive_message_length", 4 * CHUNK_BYTES)]
        self._channel = grpc.secure_channel(address, credentials, options)

    def check_in(self, conditions: Conditions, tasks: Sequence[str], wait_seconds: float) -> CheckedIn:
        """Ask for something to do.

        Raises:
            GatewayError: the gateway cannot be reached or does not know the device.
        """
        here = messages.Conditions(charging=conditions.charging, unmetered=conditions.unmetered, idle=conditions.idle)
        request = messages.CheckInRequest(conditions=here, tasks=list(tasks), wait_seconds=wait_seconds)
        reply = self._unary("CheckIn", request, messages.CheckInReply, CALL_SECONDS + wait_seconds)
        asked = reply.assignment if reply.HasField("assignment") else None
        return CheckedIn(
            None
            if asked is None
            else Assignment(
                asked.task, asked.verb, _given(asked, "document"), _given(asked, "plan"),
                asked.seconds_left, asked.upload_limit,
            ),
            reply.come_back_seconds,
            (reply.release.version, Given(reply.release.document.sha256, reply.release.document.size))
            if reply.HasField("release")
            else None,
            reply.stay,
        )  # fmt: skip

    def download(self, blob: Given, most_bytes: int) -> bytes:
        """Return a blob; a download that is cut off goes on where it stopped, three times.

        Raises:
            GatewayError: it is longer than `most_bytes`, does not come, or is not what was offered.
        """
        if blob.size > most_bytes:
            raise GatewayError(f"The gateway offers {blob.size:,} bytes, more than the {most_bytes:,} of the limits.")
        found = bytearray()
        for attempt in range(4):
            try:
                self._download(blob, found)
                break
            except grpc.RpcError as error:
                if attempt == 3 or error.code() is not grpc.StatusCode.UNAVAILABLE:
                    self._fail(error)
        if len(found) != blob.size or hashlib.sha256(found).hexdigest() != blob.sha256:
            raise GatewayError("What was downloaded is not what the gateway offered; it was changed on its way.")
        return bytes(found)

    def upload(self, unsent: Unsent, chunk: Callable[[bytes], bytes] = lambda data: data) -> None:
        """Send an answer, from where an earlier attempt stopped.

        Args:
            unsent: the answer.
            chunk: sees each piece before it is sent; a test may interrupt here.

        Raises:
            GatewayError: the gateway refuses it, or cannot be reached.
        """
        state = self._unary("UploadStatus", messages.UploadStatusRequest(task=unsent.task), messages.UploadState)
        if state.complete:
            return

        def parts() -> Iterator[Any]:
            size, offset = len(unsent.document), state.offset
            header = messages.UploadHeader(task=unsent.task, sha256=unsent.sha256, size=size, offset=offset)
            yield messages.UploadPart(header=header)
            for start in range(offset, size, CHUNK_BYTES):
                yield messages.UploadPart(data=chunk(unsent.document[start : start + CHUNK_BYTES]))

        call = self._channel.stream_unary(
            f"/{SERVICE}/Upload", messages.UploadPart.SerializeToString, messages.UploadState.FromString
        )
        try:
            done = call(parts(), timeout=TRANSFER_SECONDS, metadata=self._metadata)
        except grpc.RpcError as error:
            self._fail(error)
        if not done.complete:
            raise GatewayError(f"The gateway has {done.offset:,} of {len(unsent.document):,} bytes; try again later.")

    def decline(self, task: str) -> None:
        """Tell the gateway that the device will not do a task; why stays on the device.

        Raises:
            GatewayError: the gateway cannot be reached.
        """
        self._unary("Decline", messages.DeclineRequest(task=task), messages.DeclineReply)

    def close(self) -> None:
        """Hang up."""
        self._channel.close()

    def _download(self, blob: Given, found: bytearray) -> None:
        call = self._channel.unary_stream(
            f"/{SERVICE}/Download", messages.DownloadRequest.SerializeToString, messages.Chunk.FromString
        )
        request = messages.DownloadRequest(sha256=blob.sha256, offset=len(found))
        for chunk in call(request, timeout=TRANSFER_SECONDS, metadata=self._metadata):
            found += chunk.data
            if len(found) > blob.size:
                raise GatewayError("The gateway sends more than it offered.")

    def _unary(self, method: str, request: Any, reply: Any, timeout: float = CALL_SECONDS) -> Any:
        call = self._channel.unary_unary(f"/{SERVICE}/{method}", type(request).SerializeToString, reply.FromString)
        try:
            return call(request, timeout=timeout, metadata=self._metadata)
        except grpc.RpcError as error:
            self._fail(error)

    def _fail(self, error: Any) -> NoReturn:
        code, details = error.code(), str(error.details() or "")
        if code is grpc.StatusCode.UNAVAILABLE:
            known = next((reason for sign, reason in REASONS.items() if sign in details), details)
            raise GatewayUnavailable(f"Cannot reach the gateway at {self.address}: {known}.") from error
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            raise GatewayUnavailable(f"The gateway at {self.address} did not answer in time.") from error
        raise GatewayError(f"The gateway at {self.address} refuses: {details or code.name}") from error


class GatewayUnavailable(GatewayError):
    """The gateway cannot be reached now; what was to be sent is kept."""


def _given(message: Any, name: str) -> Given | None:
    if not message.HasField(name):
        return None
    blob = getattr(message, name)
    return Given(blob.sha256, blob.size)
