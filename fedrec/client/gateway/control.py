"""`GatewayPool`: a running gateway, as the Flower ClientApp of its node reaches it from a process of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import grpc

from fedrec.client.gateway.settings import SOCKET
from fedrec.errors import GatewayError
from fedrec.protocol.gateway.v1 import gateway_pb2 as messages
from fedrec.protocol.link import Verb

CONTROL = "fedrec.gateway.v1.Control"
CHUNK_BYTES = 256 << 10
STATUS_SECONDS = 10.0


class GatewayPool:
    """Passes each question of the server on to the gateway that serves a folder, and its answer back."""

    def __init__(self, folder: Path) -> None:
        """Name the gateway's folder; it is connected to when something is asked."""
        self._folder = folder

    def answer(self, verb: Verb, document: bytes, parcels: Mapping[str, bytes] | None = None) -> bytes:
        """Return the gateway's answer; it takes as long as its devices, at most until its own deadline.

        Args:
            verb: what is asked.
            document: the question.
            parcels: the tensors that came with it, by digest.

        Raises:
            GatewayError: the gateway does not run, or says why it cannot answer.
        """

        def parts() -> Iterator[Any]:
            for name, data in ((verb, document), *(parcels or {}).items()):
                yield messages.Question(verb=name)
                for start in range(0, len(data), CHUNK_BYTES):
                    yield messages.Question(data=data[start : start + CHUNK_BYTES])

        with self._channel() as channel:
            call = channel.stream_stream(
                f"/{CONTROL}/Answer", messages.Question.SerializeToString, messages.Chunk.FromString
            )
            try:
                return b"".join(chunk.data for chunk in call(parts()))
            except grpc.RpcError as error:
                self._fail(error)

    def status(self) -> dict[str, Any]:
        """Return what goes on at the gateway.

        Raises:
            GatewayError: it does not run.
        """
        with self._channel() as channel:
            call = channel.unary_unary(
                f"/{CONTROL}/Status", messages.StatusRequest.SerializeToString, messages.StatusReply.FromString
            )
            try:
                found: dict[str, Any] = json.loads(call(messages.StatusRequest(), timeout=STATUS_SECONDS).json)
            except grpc.RpcError as error:
                self._fail(error)
            return found

    def _channel(self) -> Any:
        path = (self._folder / SOCKET).absolute()
        if not path.exists():
            raise GatewayError(f"No gateway runs for '{self._folder}'; start it with `fedrec gateway run`.")
        return grpc.insecure_channel(f"unix:{path}")

    def _fail(self, error: Any) -> NoReturn:
        if error.code() is grpc.StatusCode.UNAVAILABLE:
            raise GatewayError(f"The gateway of '{self._folder}' does not answer; is it running?") from error
        raise GatewayError(str(error.details() or error.code().name)) from error
