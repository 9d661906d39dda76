"""What a gateway is told: where it listens, whom its devices trust, how it paces and bounds them."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedrec.client.shelf import MOST_BYTES
from fedrec.settings import parsed, read_toml

SETTINGS, SOCKET = "gateway.toml", "control.sock"


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Pace(_Settings):
    """When devices come back."""

    per_second: float = Field(default=20.0, gt=0)
    """So many check-ins a second are aimed at; the more devices, the later each is told to come back."""
    least_seconds: float = Field(default=5.0, gt=0)
    """Nobody is told to come back sooner, outside a masked sum."""
    most_seconds: float = Field(default=3600.0, gt=0)
    """Nor later."""
    jitter: float = Field(default=0.3, ge=0, lt=1)
    """The time is drawn evenly from so much below to so much above, so that devices do not come in step."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.least_seconds > self.most_seconds:
            raise ValueError("least_seconds is above most_seconds")
        return self


class Bounds(_Settings):
    """What one device and all together may take."""

    calls_per_minute: int = Field(default=600, ge=10)
    """Calls of one device."""
    waiting: int = Field(default=5000, ge=1)
    """Devices that may wait for an answer at once; others are told to come back."""
    spool_bytes: int = Field(default=4 << 30, ge=1 << 20)
    """What uploads may take on the disk."""
    tensors_bytes: int = Field(default=MOST_BYTES, ge=0)
    """What tensors that plans name may take on the disk, beside those of open rounds; what was used longest ago makes
    room."""
    strikes: int = Field(default=3, ge=1)
    """After so many answers that were not what was asked, a device is asked no more."""


class GatewaySettings(_Settings):
    """One gateway."""

    name: str = Field(default="gateway", pattern="^[A-Za-z0-9 ._-]{1,100}$")
    """What the server calls it in its reports; orders the nodes of a federation."""
    listen: str = "127.0.0.1:8443"
    """``host:port`` to listen at; port 0 takes a free one."""
    address: str = "localhost:8443"
    """``host:port`` that devices are told; the certificate must name the host."""
    certificate: str = "server.crt"
    """PEM file of the gateway's certificate, and of those between it and the root."""
    key: str = "server.key"
    """PEM file of its key."""
    root_certificates: str = "ca.crt"
    """PEM file of what devices check the certificate against."""
    trusted: tuple[str, ...] = ()
    """Public keys, in hexadecimal, of the servers whose plans and releases devices act on."""
    release: str | None = None
    """File with the signed release that devices are given; it is looked at again whenever it changes."""
    identity: str | None = None
    """PEM file of the key that the gateway signs with for its devices in masked sums, where others insist on it."""
    wait_seconds: float = Field(default=30.0, ge=0)
    """How long a device's check-in may be held for something to do."""
    deadline_seconds: float = Field(default=600.0, gt=0)
    """A round is closed after this time, with whoever has answered."""
    margin_seconds: float = Field(default=5.0, ge=0)
    """A round is closed so much before its plan expires, so that the sum still reaches the server in time."""
    seen_within_seconds: float = Field(default=86400.0, gt=0)
    """The census counts the devices that checked in within this time."""
    charging: bool = False
    """Ask only devices that are charging."""
    unmetered: bool = False
    """Ask only devices on an unmetered connection."""
    idle: bool = False
    """Ask only devices that nobody is using."""
    pace: Pace = Pace()
    """When devices come back."""
    bounds: Bounds = Bounds()
    """What devices may take."""

    @classmethod
    def load(cls, folder: Path) -> GatewaySettings:
        """Read ``gateway.toml`` of a gateway's folder.

        Raises:
            ConfigError: there is none, or it says something impossible.
        """
        path = folder / SETTINGS
        missing = f"No gateway at '{folder}'; make one with `fedrec gateway init {folder}`."
        return parsed(cls, read_toml(path, missing), str(path))

    def file(self, folder: Path, name: str) -> Path:
        """Return the path of a file that is named in the settings."""
        return folder / name
