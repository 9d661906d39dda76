"""What the operator of a gateway hands to a device, so that it can speak with the gateway."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedrec.errors import ConfigError


class Enrolment(BaseModel):
    """What a device must know to speak with a gateway; `fedrec gateway add-device` writes one for each device."""

    model_config = ConfigDict(defer_build=True, frozen=True, extra="forbid")
    address: str = Field(min_length=3)
    """``host:port`` of the gateway, as its certificate names the host."""
    root_certificates: str
    """PEM of the certificates that vouch for the gateway."""
    token: str = Field(min_length=20, repr=False)
    """Known to this device alone; the gateway keeps its hash."""
    trusted: tuple[str, ...] = Field(min_length=1)
    """Public keys, in hexadecimal, of those whose plans and releases the device acts on."""

    @classmethod
    def parse(cls, text: str, where: str) -> Enrolment:
        """Read an enrolment.

        Raises:
            ConfigError: it is none.
        """
        try:
            found = cls.model_validate_json(text)
            if any(len(bytes.fromhex(key)) != 32 for key in found.trusted):
                raise ValueError("a trusted key has not 32 bytes")
        except (ValidationError, ValueError) as error:
            raise ConfigError(f"'{where}' is no enrolment; `fedrec gateway add-device` writes one.") from error
        return found
