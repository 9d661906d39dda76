"""Certificates and keys of a first deployment: a CA, a server certificate, and node keys as Flower reads them."""

from __future__ import annotations

import ipaddress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedrec.errors import ConfigError
from fedrec.server.files import make_folder, read_file, write_atomically

CA_DAYS, SERVER_DAYS = 3650, 397
PRIVATE = 0o600


def make_certificates(
    folder: Path, hosts: list[str], now: datetime, days: int = SERVER_DAYS, curve: ec.EllipticCurve | None = None
) -> None:
    """Write ``ca.crt``, ``ca.key``, ``server.crt`` and ``server.key``; a CA that is there is kept and used.

    Args:
        folder: where to.
        hosts: names and addresses that nodes call the server by.
        now: the clock; UTC.
        days: how long the server's certificate holds.
        curve: of the server's key; P-384 if not given. P-256 costs a server of many short connections far less.

    Raises:
        RegistryError: the disk refuses.
        ConfigError: the CA that is there cannot be read.
    """
    make_folder(folder)
    folder.chmod(0o700)
    if (folder / "ca.key").is_file():
        ca, ca_key = _certificate(folder / "ca.crt"), _key(folder / "ca.key")
    else:
        ca_key = ec.generate_private_key(ec.SECP384R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedrec CA")])
        usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
        ca = (
            _builder(name, name, ca_key.public_key(), now, CA_DAYS)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key()), critical=False)
            .sign(ca_key, hashes.SHA384())
        )
        write_atomically(folder / "ca.key", _private(ca_key), PRIVATE)
        write_atomically(folder / "ca.crt", ca.public_bytes(serialization.Encoding.PEM))
    key = ec.generate_private_key(curve or ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedrec server")])
    alternatives = x509.SubjectAlternativeName(
        [_name(host) for host in dict.fromkeys([*hosts, "localhost", "127.0.0.1"])]
    )
    certificate = (
        _builder(name, ca.subject, key.public_key(), now, days)
        .add_extension(alternatives, critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA384())
    )
    write_atomically(folder / "server.key", _private(key), PRIVATE)
    write_atomically(folder / "server.crt", certificate.public_bytes(serialization.Encoding.PEM))


def make_node_key(path: Path) -> bytes:
    """Write a node's private key, readable by its owner alone, and return the public one as an OpenSSH line.

    Raises:
        RegistryError: the disk refuses.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    encoded = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    write_atomically(path, encoded, PRIVATE)
    return public_line(key.public_key())


def public_line(key: ec.EllipticCurvePublicKey) -> bytes:
    """Return a public key as an OpenSSH line."""
    return key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH) + b"\n"


def check_node_key(path: Path) -> bytes:
    """Return a node's public key, an OpenSSH line, from its file.

    Raises:
        ConfigError: there is none, or not one that Flower takes.
    """
    text = read_file(path)
    if text is None:
        raise ConfigError(f"No public key at '{path}'.")
    try:
        key = serialization.load_ssh_public_key(text)
    except ValueError as error:
        raise ConfigError(
            f"'{path}' is not a public key in OpenSSH format; `ssh-keygen -t ecdsa -b 384` makes one."
        ) from error
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ConfigError(f"'{path}' is not an elliptic curve key; `ssh-keygen -t ecdsa -b 384` makes one.")
    return public_line(key)


def certificate_problem(server: Path, ca: Path, host: str, now: datetime) -> str | None:
    """Return what is wrong with a server certificate in one sentence, or None.

    Args:
        server: its file.
        ca: file of the certificate that nodes trust.
        host: what nodes call the server by.
        now: the clock; UTC.
    """
    try:
        own, root = _certificate(server), _certificate(ca)
    except ConfigError as error:
        return str(error)
    for path, one in ((server, own), (ca, root)):
        if one.not_valid_after_utc <= now:
            return f"'{path}' expired on {one.not_valid_after_utc:%Y-%m-%d}; `fedrec server renew` makes a new one."
        if one.not_valid_before_utc > now:
            return f"'{path}' is valid from {one.not_valid_before_utc:%Y-%m-%d %H:%M} UTC only; is the clock right?"
    try:
        own.verify_directly_issued_by(root)
    except (InvalidSignature, ValueError, TypeError):
        return f"'{server}' was not signed by '{ca}'; give nodes the CA that signed it."
    names = own.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    known = [*names.get_values_for_type(x509.DNSName), *(str(a) for a in names.get_values_for_type(x509.IPAddress))]
    if host not in known:
        return f"'{server}' is not for '{host}' but for {', '.join(known)}; `fedrec server renew` makes a new one."
    return None


def expires(path: Path) -> datetime:
    """Return when a certificate expires; UTC.

    Raises:
        ConfigError: it cannot be read.
    """
    return _certificate(path).not_valid_after_utc


def utc_clock() -> datetime:
    """Return the time now."""
    return datetime.now(UTC)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime, days: int
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))  # clocks of nodes differ a little
        .not_valid_after(now + timedelta(days=days))
    )


def _name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _private(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _certificate(path: Path) -> x509.Certificate:
    text = read_file(path)
    if text is None:
        raise ConfigError(f"No certificate at '{path}'; `fedrec server init` makes one.")
    try:
        return x509.load_pem_x509_certificate(text)
    except ValueError as error:
        raise ConfigError(f"'{path}' is not a certificate in PEM format.") from error


def _key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        found = serialization.load_pem_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"Cannot read the key '{path}'.") from error
    if not isinstance(found, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"The key '{path}' is not an elliptic curve key.")
    return found
