"""`Supervisor`: what `fedrec server run` does; it starts Flower, submits the run, and starts again what dies."""

from __future__ import annotations

import json
import os
import signal
import ssl
import subprocess
import time
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from types import FrameType
from urllib.error import URLError

from fedrec.errors import RunError
from fedrec.server import flower
from fedrec.server.certificates import certificate_problem, utc_clock
from fedrec.server.deployed import lock
from fedrec.server.deployment import NODES, DeploymentFolder
from fedrec.server.files import write_atomically
from fedrec.server.journal import OUTCOME, PROCESS, STATUS, Journal, read_document
from fedrec.server.telemetry import Telemetry

START_SECONDS = 120.0
"""How long a SuperLink may take to answer, and a ServerApp to begin."""
STOP_SECONDS = 15.0
LOOK_SECONDS = 0.5
LONGEST_PAUSE = 60.0
SERVER_LOCK, CHILDREN = "server.lock", "children.json"


class Supervisor:
    """Carries a deployment on until its life is over or somebody stops it.

    SuperLink and ServerApp are processes of their own. Whichever dies is started again; the run goes on from its last
    checkpoint, for Flower itself marks the run of a SuperLink that died as failed.
    """

    def __init__(self, folder: DeploymentFolder, say: Callable[[str], None] = print) -> None:
        """Prepare for a deployment; nothing is started yet."""
        self.folder = folder
        self.journal = Journal(folder, say=say)
        self.telemetry = Telemetry(folder)
        self._stopping = False
        self._superlink: subprocess.Popen[bytes] | None = None
        self._attempt = 0
        self._known_nodes = -1

    def run(self) -> None:
        """Run until the end; a signal to terminate or interrupt ends it in good order.

        Raises:
            FedrecError: the deployment cannot run, or was given up.
        """
        self.folder.check()
        self._check_certificate()
        self.folder.prepare()
        with ExitStack() as stack:
            handle = stack.enter_context(self.folder.state(SERVER_LOCK).open("a+", encoding="utf-8"))
            if not lock(handle):
                raise RunError(
                    f"This deployment's server runs already; stop it with `fedrec server stop {self.folder.path}`."
                )
            handle.truncate(0)
            handle.write(str(os.getpid()))
            handle.flush()
            for number in (signal.SIGTERM, signal.SIGINT):
                previous = signal.signal(number, self._stop)
                stack.callback(signal.signal, number, previous)
            stack.enter_context(self.telemetry.serving(self.folder.settings.operations.port))
            self._end_leftovers()
            flower.write_app(self.folder)
            self.journal.note("server started", address=self.folder.server_address, pid=os.getpid())
            try:
                self._carry_on()
            finally:
                self._end_all()
                self.journal.note("server stopped")

    def _carry_on(self) -> None:
        """Start what is not there and watch it, again and again."""
        operations, failures, progress = self.folder.settings.operations, 0, -1
        while not self._stopping:
            problem = self._once()
            if problem is None:
                return
            now = self.telemetry.rounds()
            failures = 1 if now > progress else failures + 1
            progress = now
            self.telemetry.restarts += 1
            self.journal.note("died", what=problem, restarts_in_a_row=failures)
            if failures > operations.restarts:
                raise RunError(f"The server was given up after {failures} failures in a row; the last: {problem}")
            self._sleep(min(LONGEST_PAUSE, operations.pause_seconds * 2.0 ** (failures - 1)))

    def _once(self) -> str | None:
        """Start what is missing and watch it; return what went wrong and is worth another try, None at the end.

        Raises:
            RunError: something that another try would not mend.
        """
        try:
            self._start_superlink()
            self._register()
            self._attempt = int(time.time() * 1000)  # unlike that of any earlier process of this deployment
            run = flower.submit(self.folder, self._attempt)
        except RunError as error:
            return None if self._stopping else str(error)
        self.journal.note("run submitted", run=run, attempt=self._attempt)
        return self._watch(run)

    def _watch(self, run: str) -> str | None:
        began, process = time.monotonic(), 0
        while not self._stopping:
            self._sleep(LOOK_SECONDS)
            outcome = read_document(self.folder.state(OUTCOME))
            if outcome.get("attempt") == self._attempt:
                if outcome["finished"]:
                    return None
                if not outcome["again"]:
                    raise RunError(str(outcome["error"]))
                return str(outcome["error"])
            if self._superlink is None or self._superlink.poll() is not None:
                self._end_serverapp()
                return "the SuperLink died (see log/superlink.log)"
            found = read_document(self.folder.state(PROCESS))
            if found.get("attempt") == self._attempt:
                process = int(found["pid"])
                self._remember(process)
                if not alive(process):
                    return "the ServerApp died (see log/superlink.log)"
            elif time.monotonic() - began > START_SECONDS:
                return f"the ServerApp did not begin; Flower says: {self._asked(run)}"
            with suppress(RunError):
                self._register()
        return None

    def _asked(self, run: str) -> str:
        try:
            return flower.run_status(self.folder, run)
        except RunError as error:
            return str(error)

    def _start_superlink(self) -> None:
        if self._superlink is not None and self._superlink.poll() is None:
            return
        self._superlink = flower.start_superlink(self.folder)
        self._remember(0)
        end = time.monotonic() + START_SECONDS
        while not answers(self.folder):
            if self._stopping:
                raise RunError("stopped")
            if self._superlink.poll() is not None:
                raise RunError(
                    f"The SuperLink ended with code {self._superlink.returncode} while starting; is port "
                    f"{self.folder.settings.port} free? See log/superlink.log"
                )
            if time.monotonic() > end:
                self._end(self._superlink.pid)
                raise RunError(f"The SuperLink did not answer in {START_SECONDS:.0f} s; see log/superlink.log")
            self._sleep(LOOK_SECONDS)
        self.telemetry.superlink_pid = self._superlink.pid
        self._known_nodes = -1

    def _register(self) -> None:
        """Register public keys that came into the folder since the last look."""
        found = len(list((self.folder.path / NODES).glob("*.pub")))
        if found != self._known_nodes:
            for name in flower.register_nodes(self.folder):
                self.journal.note("node registered", node=name)
            self._known_nodes = found

    def _check_certificate(self) -> None:
        host = self.folder.public_address.rpartition(":")[0]
        where = self.folder.certificate
        problem = certificate_problem(where("server.crt"), where("ca.crt"), host, utc_clock())
        # A proxy in front has a certificate of its own for the public name.
        if problem and not (self.folder.settings.public_address and "is not for" in problem):
            raise RunError(problem)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._stopping = True

    def _sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not self._stopping and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, LOOK_SECONDS))

    def _remember(self, serverapp: int) -> None:
        """Write down which processes are ours: the next supervisor ends what this one leaves if it is killed."""
        pids = [self._superlink.pid if self._superlink else 0, serverapp]
        document = json.dumps([[pid, born(pid)] for pid in pids if pid]).encode()
        path = self.folder.state(CHILDREN)
        if not path.is_file() or path.read_bytes() != document:
            write_atomically(path, document)

    def _end_leftovers(self) -> None:
        path = self.folder.state(CHILDREN)
        if not path.is_file():
            return
        for pid, when in json.loads(path.read_bytes()):
            if when and born(pid) == when:
                self.journal.note("leftover ended", pid=pid)
                self._end(pid)

    def _end_serverapp(self) -> None:
        found = read_document(self.folder.state(PROCESS))
        if found.get("attempt") == self._attempt and alive(int(found["pid"])):
            self._end(int(found["pid"]))

    def _end_all(self) -> None:
        self._end_serverapp()
        if self._superlink is not None:
            self._end(self._superlink.pid)
            self._superlink.wait()

    def _end(self, pid: int) -> None:
        """Ask a process to end, and make it if it does not."""
        for number, seconds in ((signal.SIGTERM, STOP_SECONDS), (signal.SIGKILL, STOP_SECONDS)):
            with suppress(ProcessLookupError):
                os.kill(pid, number)
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                if self._superlink is not None and pid == self._superlink.pid:
                    self._superlink.poll()
                if not alive(pid):
                    return
                time.sleep(0.05)


def born(pid: int) -> str:
    """Return when a process began, in ticks; empty if it is gone. With it a number that is used again is noticed."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def alive(pid: int) -> bool:
    """Return whether a process runs; one that ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] not in ("Z", "X")
    except FileNotFoundError:
        return False
    except (OSError, IndexError):
        return True


def answers(folder: DeploymentFolder) -> bool:
    """Return whether the SuperLink answers over TLS."""
    context = ssl.create_default_context(cafile=str(folder.certificate("ca.crt")))
    try:
        with urllib.request.urlopen(f"https://{folder.server_address}/health", timeout=3, context=context) as reply:
            return bool(reply.status == 200)
    except (URLError, OSError):
        return False


def running(folder: DeploymentFolder) -> int | None:
    """Return the process id of the deployment's server; None: it does not run."""
    path = folder.state(SERVER_LOCK)
    if not path.is_file():
        return None
    with path.open("a+", encoding="utf-8") as handle:
        if lock(handle):
            return None
        handle.seek(0)
        text = handle.read().strip()
    return int(text) if text.isdigit() else None


def standing(folder: DeploymentFolder) -> dict[str, object]:
    """Return where the server stands, for `fedrec server status`."""
    pid = running(folder)
    status = read_document(folder.state(STATUS))
    return {
        "deployment": str(folder.path),
        "running": pid is not None,
        "pid": pid,
        "address": folder.server_address,
        "answers": pid is not None and answers(folder),
        **({} if not status else {"last": status}),
    }
