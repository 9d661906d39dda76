"""A deployment: one folder with its settings, certificates, node keys, state and releases.

server.toml              the settings, `Deployment`
certificates/            ca.crt, ca.key, server.crt, server.key
nodes/NAME.pub           who may take part
nodes/NAME/              what goes to that node: node.toml, ca.crt, node.key
state/ log/ app/ flower/ what the server keeps; nothing to edit
runs/ registry/          checkpoints, reports and releases
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedrec.checkup import Finding, disk, is_private, look, port_is_free
from fedrec.config import Experiment
from fedrec.data.catalog import ItemCatalog
from fedrec.data.cleaning import Dataset
from fedrec.data.log import InteractionLog
from fedrec.data.sources import load_dataset
from fedrec.errors import ConfigError
from fedrec.server.files import make_folder, write_atomically
from fedrec.server.registry import Registry
from fedrec.server.run import check
from fedrec.settings import parsed, read_toml

SETTINGS = "server.toml"
CERTIFICATES, NODES, STATE, LOG, APP, FLOWER = "certificates", "nodes", "state", "log", "app", "flower"


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Waiting(_Settings):
    """When a slice may begin, and how long nodes have."""

    minimum_nodes: int = Field(default=1, ge=1)
    """Slices wait until so many nodes are connected."""
    patience_seconds: float = Field(default=3600.0, gt=0)
    """How long they wait; then the run stops with a message, and is tried again."""
    deadline_seconds: float = Field(default=300.0, gt=0)
    """How long one request waits for nodes, where the experiment's `training.timeout_seconds` says nothing."""


class Operations(_Settings):
    """How the server is watched and kept alive."""

    port: int = Field(default=9464, ge=0, le=65535)
    """Port on loopback of /metrics, /health and /status; 0: none."""
    restarts: int = Field(default=20, ge=0)
    """How often in a row what died is started again before the server gives up; a finished round counts anew."""
    pause_seconds: float = Field(default=2.0, ge=0)
    """Pause before the first of them; it doubles each time, up to a minute."""


class Signing(_Settings):
    """How plans are signed, for devices behind a gateway; they act on nothing else."""

    key: str
    """File of the signing key, from `fedrec releases key`."""
    cohort_minimum: int = Field(default=20, ge=1)
    """A sum that is not masked is thrown away unread if it has fewer contributions; devices are promised so."""


class Deployment(_Settings):
    """What `fedrec server run` needs to know. Paths start at the folder of the file."""

    name: str = Field(default="fedrec", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """What to call it in logs."""
    experiment: str
    """TOML file of the experiment, or the name of one that comes with fedrec."""
    catalog: str | None = None
    """Folder with the public ``catalog.json``; the server knows nothing else of the data."""
    data: str | None = None
    """A data set that the server may see, for trials; its nodes then host shares of it."""
    host: str = "127.0.0.1"
    """Address that Flower listens at. Whoever reaches its control endpoint can run code on every node: leave it on
    loopback, and let a proxy expose /v1/fleet alone (docs/operate.md)."""
    port: int = Field(default=8443, ge=1, le=65535)
    """Port of all of Flower's endpoints."""
    public_address: str | None = None
    """``host:port`` that nodes connect to; None: `host` and `port` themselves."""
    open_control: bool = False
    """Allow a `host` other than loopback, though Flower's control endpoint knows no password."""
    signing: Signing | None = None
    """Sign plans; None: no gateway can take part."""
    waiting: Waiting = Waiting()
    operations: Operations = Operations()

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        if (self.catalog is None) == (self.data is None):
            raise ValueError("give one of 'catalog' (a real deployment) and 'data' (a trial)")
        if self.host not in ("127.0.0.1", "::1", "localhost") and not self.open_control:
            raise ValueError(
                f"'{self.host}' is not loopback, and whoever reaches Flower's control endpoint can run code on every "
                'node; keep host = "127.0.0.1" behind a proxy, or set open_control = true if a firewall guards it'
            )
        return self


class DeploymentFolder:
    """The folder of a deployment; everything in it by its name."""

    def __init__(self, path: Path) -> None:
        """Name the folder; nothing is read yet."""
        self.path = path.absolute()

    @cached_property
    def settings(self) -> Deployment:
        """The settings in it.

        Raises:
            ConfigError: there are none, or they make no sense.
        """
        path = self.path / SETTINGS
        missing = f"'{self.path}' holds no deployment; make one with `fedrec server init`."
        return parsed(Deployment, read_toml(path, missing), str(path))

    @cached_property
    def experiment(self) -> Experiment:
        """The experiment, changed as a deployment needs it: a checkpoint after each round, for rounds are long."""
        named = self.settings.experiment
        path = self.path / named
        found = Experiment.load(path) if path.is_file() else Experiment.find(named)
        return found.model_copy(update={"runtime": found.runtime.model_copy(update={"checkpoint_every": 1})})

    @property
    def server_address(self) -> str:
        """``host:port`` of Flower on this machine."""
        return f"{self.settings.host}:{self.settings.port}"

    @property
    def public_address(self) -> str:
        """``host:port`` that nodes connect to."""
        return self.settings.public_address or self.server_address

    @property
    def registry(self) -> Registry:
        """Where releases go."""
        return Registry(self.path / "registry")

    @property
    def runs(self) -> Path:
        """Root of run folders."""
        return self.path / "runs"

    def certificate(self, name: str) -> Path:
        """Return the path of a certificate or key of the server."""
        return self.path / CERTIFICATES / name

    def state(self, name: str) -> Path:
        """Return the path of something that the running server keeps."""
        return self.path / STATE / name

    def dataset(self) -> Dataset:
        """Return what the server knows: the catalogue with no interactions, or a trial's data set.

        Raises:
            DataError: there is none.
        """
        settings = self.settings
        if settings.catalog is not None:
            return catalog_only(ItemCatalog.load(self.path / settings.catalog), settings.name)
        assert settings.data is not None
        path = self.path / settings.data
        return load_dataset(str(path) if path.exists() else settings.data)

    def check(self) -> None:
        """Raise what makes the deployment impossible, before anything is started.

        Raises:
            FedrecError: in one sentence.
        """
        check(self.experiment, self.dataset())
        for name in ("server.crt", "server.key", "ca.crt"):
            if not self.certificate(name).is_file():
                raise ConfigError(
                    f"'{self.certificate(name)}' is missing; `fedrec server init` makes all for a first deployment, or "
                    "put your own there."
                )

    def checkup(self, running: bool) -> list[Finding]:
        """Look at everything that the server needs, and say what to do about what is wrong.

        Args:
            running: whether the server runs, and so has its ports.
        """
        from fedrec.server.certificates import certificate_problem, expires, utc_clock

        found = [look("settings", lambda: self.settings.name, f"edit '{self.path / SETTINGS}'")]
        if not found[0].ok:
            return found

        def certificate() -> str:
            server, ca = self.certificate("server.crt"), self.certificate("ca.crt")
            problem = certificate_problem(server, ca, self.settings.host, utc_clock())
            if problem:
                raise ConfigError(problem)
            return f"holds until {expires(server):%Y-%m-%d}"

        def data() -> str:
            check(self.experiment, self.dataset())
            return f"{len(self.dataset().catalog):,} items, experiment '{self.experiment.name}'"

        settings, nodes = self.settings, sorted((self.path / NODES).glob("*.pub"))
        found += [
            look("data", data, "correct 'experiment', 'catalog' or 'data' in server.toml"),
            look("certificate", certificate, "`fedrec server renew`"),
            is_private(self.certificate("server.key")),
            is_private(self.certificate("ca.key")),
            Finding("nodes", bool(nodes), f"{len(nodes)} may take part", "" if nodes else "`fedrec server add-node`"),
            disk(self.path),
        ]
        if running:
            return [*found, Finding("ports", True, "in use by this server, which runs")]
        ports = [(settings.host, settings.port, "port"), ("127.0.0.1", settings.operations.port, "operations.port")]
        return [*found, *(port_is_free(host, port, key) for host, port, key in ports if port)]

    def prepare(self) -> None:
        """Make the folders that the server writes to.

        Raises:
            RegistryError: the disk refuses.
        """
        for name in (STATE, LOG, FLOWER, NODES):
            make_folder(self.path / name)
        self.registry.prepare()

    def write_settings(self, text: str) -> None:
        """Write ``server.toml``.

        Raises:
            RegistryError: the disk refuses.
        """
        make_folder(self.path)
        write_atomically(self.path / SETTINGS, text.encode())


def catalog_only(catalog: ItemCatalog, name: str) -> Dataset:
    """Return a data set of items alone: what a server knows whose nodes hold the interactions."""
    import numpy as np

    from fedrec.data.cleaning import CleaningReport

    empty = InteractionLog(
        np.zeros(1, np.int64), np.zeros(0, np.int32), np.zeros(0, np.int64), np.zeros(0, np.int8),
        np.zeros(0, np.float32), (),
    )  # fmt: skip
    provenance = {"source": "nodes", "terms": "the nodes'", "time_unit": "seconds"}
    return Dataset(name, empty, catalog, CleaningReport(0, 0, {}), provenance)
