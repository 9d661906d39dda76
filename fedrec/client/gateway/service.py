"""The gateway's network: gRPC over TLS for devices, a Unix socket for the ClientApp and the command line."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, NoReturn, cast

import grpc

from fedrec.client.conditions import Conditions
from fedrec.client.gateway.devices import Devices, Known
from fedrec.client.gateway.hall import Hall, Say
from fedrec.client.gateway.settings import SOCKET, GatewaySettings
from fedrec.errors import ConfigError, FedrecError, GatewayError
from fedrec.protocol.gateway.v1 import gateway_pb2 as messages
from fedrec.protocol.link import Verb

SERVICE, CONTROL = "fedrec.gateway.v1.Device", "fedrec.gateway.v1.Control"
CHUNK_BYTES = 256 << 10
MOST_QUESTION_BYTES = 1 << 31
LONGEST_PATH = 100
"""A Unix socket's path can have about 108 bytes."""
_FULL = "spool is full"


class DeviceService:
    """What devices can call; each call first says whose it is."""

    def __init__(self, hall: Hall, clock: Callable[[], float] = time.monotonic) -> None:
        """Serve a hall."""
        self._hall, self._clock = hall, clock
        self._calls: dict[int, tuple[float, float]] = {}

    def handler(self) -> Any:
        """Return the service as gRPC takes it."""
        m = messages
        methods = {
            "CheckIn": _unary(self.check_in, m.CheckInRequest, m.CheckInReply),
            "Download": grpc.unary_stream_rpc_method_handler(
                self.download, m.DownloadRequest.FromString, m.Chunk.SerializeToString
            ),
            "UploadStatus": _unary(self.upload_status, m.UploadStatusRequest, m.UploadState),
            "Upload": grpc.stream_unary_rpc_method_handler(
                self.upload, m.UploadPart.FromString, m.UploadState.SerializeToString
            ),
            "Decline": _unary(self.decline, m.DeclineRequest, m.DeclineReply),
        }
        return grpc.method_handlers_generic_handler(SERVICE, methods)

    async def check_in(self, request: Any, context: Any) -> Any:
        """Tell a device what to do, or when to come back."""
        device = await self._caller(context)
        asked = request.conditions
        here = Conditions(asked.charging, asked.unmetered, asked.idle)
        said = await self._hall.check_in(device, here, list(request.tasks)[:16], request.wait_seconds)
        reply = messages.CheckInReply(come_back_seconds=said.come_back_seconds, stay=said.stay)
        release = self._hall.release
        if release is not None:
            document = messages.Blob(sha256=release[1].sha256, size=release[1].size)
            reply.release.CopyFrom(messages.Release(version=release[0], document=document))
        if said.round is not None and said.task is not None:
            given = messages.Assignment(
                task=said.task.name,
                verb=said.round.verb,
                seconds_left=max(0.0, said.round.deadline - self._clock()),
                upload_limit=said.round.upload_limit,
            )
            for name, blob in (("document", said.task.document), ("plan", said.round.plan)):
                if blob is not None:
                    getattr(given, name).CopyFrom(messages.Blob(sha256=blob.sha256, size=blob.size))
            reply.assignment.CopyFrom(given)
        return reply

    async def download(self, request: Any, context: Any) -> AsyncIterator[Any]:
        """Send a document from an offset on."""
        device = await self._caller(context)
        try:
            blob = self._hall.blob(device, request.sha256)
        except GatewayError as error:
            await _refuse(context, error, grpc.StatusCode.NOT_FOUND)
        offset = int(request.offset)
        while offset < blob.size:
            piece = await asyncio.to_thread(blob.piece, offset, CHUNK_BYTES) if blob.path else blob.piece(
                offset, CHUNK_BYTES
            )  # fmt: skip
            if not piece:
                break
            yield messages.Chunk(data=piece)
            offset += len(piece)

    async def upload_status(self, request: Any, context: Any) -> Any:
        """Tell how much of an answer is there."""
        device = await self._caller(context)
        try:
            _, task = self._hall.task(device, request.task)
        except GatewayError as error:
            await _refuse(context, error, grpc.StatusCode.FAILED_PRECONDITION)
        upload = task.upload
        if upload is None:
            return messages.UploadState()
        return messages.UploadState(offset=upload.offset, complete=upload.complete)

    async def upload(self, parts: AsyncIterator[Any], context: Any) -> Any:
        """Take an answer, or what is missing of it."""
        device = await self._caller(context)
        header, upload = None, None
        try:
            async for part in parts:
                if part.WhichOneof("part") == "header":
                    if header is not None:
                        raise GatewayError("A second header came in one upload.")
                    header = part.header
                    upload = self._hall.begin_upload(device, header.task, header.sha256, header.size, header.offset)
                elif upload is None or header is None:
                    raise GatewayError("Data came before its header.")
                else:
                    self._hall.task(device, header.task)  # the round may have been closed meanwhile
                    upload.write(part.data)
            if upload is None or header is None:
                raise GatewayError("An upload came without a header.")
            if upload.offset == upload.size:
                self._hall.finish_upload(device, header.task)
            return messages.UploadState(offset=upload.offset, complete=upload.complete)
        except GatewayError as error:
            full = _FULL in str(error)
            code = grpc.StatusCode.RESOURCE_EXHAUSTED if full else grpc.StatusCode.FAILED_PRECONDITION
            await _refuse(context, error, code)
        finally:
            if upload is not None:
                upload.pause()

    async def decline(self, request: Any, context: Any) -> Any:
        """Take a no."""
        device = await self._caller(context)
        try:
            self._hall.decline(device, request.task)
        except GatewayError as error:
            await _refuse(context, error, grpc.StatusCode.FAILED_PRECONDITION)
        return messages.DeclineReply()

    async def _caller(self, context: Any) -> Known:
        """Return the device that calls, and refuse everybody else."""
        found = dict(context.invocation_metadata() or ()).get("authorization", "")
        scheme, _, token = str(found).partition(" ")
        device = self._hall.devices.holder(token) if scheme == "Bearer" and len(token) < 200 else None
        if device is None:
            await _refuse(context, "no device has this token here", grpc.StatusCode.UNAUTHENTICATED)
        if device.revoked:
            await _refuse(context, "this device was revoked", grpc.StatusCode.UNAUTHENTICATED)
        if not self._within_rate(device.number):
            await _refuse(context, "too many calls; come back in a minute", grpc.StatusCode.RESOURCE_EXHAUSTED)
        return device

    def _within_rate(self, device: int) -> bool:
        """Return whether a device may call once more: a bucket that fills with so many calls a minute."""
        most, now = float(self._hall.settings.bounds.calls_per_minute), self._clock()
        room, before = self._calls.get(device, (most, now))
        room = min(most, room + (now - before) * most / 60.0)
        self._calls[device] = (max(room - 1.0, 0.0), now)
        return room >= 1.0


class ControlService:
    """What the ClientApp and the command line can call, on this machine alone."""

    def __init__(self, hall: Hall) -> None:
        """Serve a hall."""
        self._hall = hall

    def handler(self) -> Any:
        """Return the service as gRPC takes it."""
        m = messages
        methods = {
            "Answer": grpc.stream_stream_rpc_method_handler(
                self.answer, m.Question.FromString, m.Chunk.SerializeToString
            ),
            "Status": _unary(self.status, m.StatusRequest, m.StatusReply),
        }
        return grpc.method_handlers_generic_handler(CONTROL, methods)

    async def answer(self, parts: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        """Answer one question of the server; the tensors that came with it follow it, each after its digest."""
        said: list[tuple[str, bytearray]] = []
        size = 0
        async for part in parts:
            size += len(part.data)
            if size > MOST_QUESTION_BYTES:
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the question is too long")
            if part.WhichOneof("part") == "verb":
                said.append((part.verb, bytearray()))
            elif said:
                said[-1][1].extend(part.data)
        try:
            if not said:
                raise GatewayError("A question came without a verb.")
            (verb, document), *parcels = ((name, bytes(data)) for name, data in said)
            reply = await self._hall.answer(cast(Verb, verb), document, dict(parcels))
        except FedrecError as error:
            await _refuse(context, error, grpc.StatusCode.FAILED_PRECONDITION)
        for start in range(0, len(reply), CHUNK_BYTES):
            yield messages.Chunk(data=reply[start : start + CHUNK_BYTES])

    async def status(self, request: Any, context: Any) -> Any:
        """Tell what goes on."""
        return messages.StatusReply(json=json.dumps(self._hall.status()))


def _unary(function: Any, request: Any, reply: Any) -> Any:
    return grpc.unary_unary_rpc_method_handler(function, request.FromString, reply.SerializeToString)


async def _refuse(context: Any, error: Exception | str, code: Any) -> NoReturn:
    await context.abort(code, str(error))
    raise AssertionError


async def serve(
    folder: Path,
    settings: GatewaySettings,
    say: Say = lambda line: None,
    stop: asyncio.Event | None = None,
) -> None:
    """Serve a gateway until `stop` is set, or the process is told to end; what is open is then closed in good order.

    Raises:
        ConfigError: certificate, key or port cannot be used.
    """
    from grpc_health.v1 import health, health_pb2, health_pb2_grpc

    stop = stop or asyncio.Event()
    devices = Devices(folder)
    hall = Hall(folder, settings, devices, say)
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", 4 * CHUNK_BYTES), ("grpc.so_reuseport", 0)])
    checks = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    server.add_generic_rpc_handlers((DeviceService(hall).handler(),))
    port = _listen(server, folder, settings)
    control = grpc.aio.server()
    control.add_generic_rpc_handlers((ControlService(hall).handler(),))
    socket = folder / SOCKET
    if len(str(socket.absolute())) > LONGEST_PATH:
        raise ConfigError(f"The path '{socket.absolute()}' is too long for a socket; take a folder nearer to the root.")
    socket.unlink(missing_ok=True)
    control.add_insecure_port(f"unix:{socket.absolute()}")
    await control.start()
    socket.chmod(0o600)
    await server.start()
    await checks.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
    _on_signals(stop)
    say({"event": "listening", "port": port, "devices": len(devices.all())})
    try:
        await stop.wait()
        await checks.enter_graceful_shutdown()
        say({"event": "stopping"})
        await asyncio.gather(server.stop(5.0), control.stop(5.0))
    finally:
        devices.flush()
        devices.close()
        socket.unlink(missing_ok=True)


def _listen(server: Any, folder: Path, settings: GatewaySettings) -> int:
    try:
        key, certificate = (settings.file(folder, name).read_bytes() for name in (settings.key, settings.certificate))
    except OSError as error:
        raise ConfigError(
            f"Cannot read '{error.filename}': {error.strerror}; `fedrec gateway init` makes it."
        ) from error
    try:
        credentials = grpc.ssl_server_credentials([(key, certificate)])
        return int(server.add_secure_port(settings.listen, credentials))
    except RuntimeError as error:
        raise ConfigError(f"Cannot listen at {settings.listen}: the port is taken, or the key is wrong.") from error


def _on_signals(stop: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        try:
            loop.add_signal_handler(number, stop.set)
        except (ValueError, RuntimeError, NotImplementedError):
            return  # not the main thread: whoever started it sets `stop`
