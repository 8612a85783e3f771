"""The envelope of a record: DSSE, signed with a local key or not at all.

Signing and checking a signature need the extra ``sign`` (securesystemslib); reading needs nothing.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megu_cli.errors import ArtifactError, ConfigError
from megu_cli.run import artifacts, reading

PAYLOAD = "application/vnd.in-toto+json"
_LARGEST = 256 * 1024 * 1024


@dataclass(frozen=True)
class Envelope:
    """A record as it lies on disk.

    Attributes:
        payload: The bytes that are signed: the statement as canonical JSON.
        payload_type: What they are.
        signatures: Key id and signature (base64) of each signer.
    """

    payload: bytes
    payload_type: str
    signatures: list[dict[str, str]]

    @property
    def digest(self) -> str:
        """sha256 of the payload: it names the record, whoever signs it."""
        return hashlib.sha256(self.payload).hexdigest()

    @property
    def written(self) -> bytes:
        """The file."""
        plain = {
            "payload": base64.b64encode(self.payload).decode(),
            "payloadType": self.payload_type,
            "signatures": self.signatures,
        }
        return json.dumps(plain, indent=1).encode() + b"\n"


def read(path: Path) -> Envelope:
    """Read a record.

    Raises:
        ArtifactError: The file cannot be read, or is no envelope.
    """
    try:
        with reading.opened(path) as stream:
            raw = stream.read(_LARGEST + 1)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror or error}") from None
    try:
        plain = artifacts.strict_json(raw)
        signatures = [{"keyid": str(one["keyid"]), "sig": str(one["sig"])} for one in plain["signatures"]]
        for one in signatures:
            base64.b64decode(one["sig"], validate=True)
        payload = base64.b64decode(plain["payload"], validate=True)
        if plain.keys() != {"payload", "payloadType", "signatures"}:
            raise ValueError
        return Envelope(payload, str(plain["payloadType"]), signatures)
    except (ValueError, KeyError, TypeError, AttributeError, binascii.Error):
        raise ArtifactError(
            f"{path} is no record: it is not a DSSE envelope in JSON", "`megu record` writes one."
        ) from None


def sealed(statement: dict[str, Any], key: Path | None) -> Envelope:
    """A statement in its envelope, signed with a private key in a PEM file, or unsigned.

    Raises:
        ConfigError: The extra is missing, or the key cannot be used.
    """
    unsigned = Envelope(artifacts.canonical(statement), PAYLOAD, [])
    if key is None:
        return unsigned
    signer = _library().CryptoSigner(_pem(key, private=True))
    from securesystemslib.dsse import Envelope as Dsse

    made = Dsse(unsigned.payload, PAYLOAD, {})
    made.sign(signer)
    return Envelope(unsigned.payload, PAYLOAD, made.to_dict()["signatures"])


def signed_by(envelope: Envelope, key: Path) -> str:
    """What is wrong with the signature of a public key's owner; empty: it holds.

    Raises:
        ConfigError: The extra is missing, or the key cannot be used.
    """
    public = _library().SSlibKey.from_crypto(_pem(key, private=False))
    from securesystemslib.dsse import Envelope as Dsse
    from securesystemslib.exceptions import FormatError, VerificationError

    if not envelope.signatures:
        return "it is not signed"
    if all(one["keyid"] != public.keyid for one in envelope.signatures):
        return f"it is signed with another key than {key.name}"
    try:
        Dsse.from_dict(json.loads(envelope.written)).verify([public], 1)
    except (VerificationError, FormatError, ValueError, KeyError):
        return "the signature does not fit the content: the record was changed after it was signed"
    return ""


def _library() -> Any:
    try:
        import securesystemslib.signer

        return securesystemslib.signer
    except ImportError:
        raise ConfigError("signatures need the extra `sign`", "pip install 'megu-cli[sign]'") from None


def _pem(path: Path, private: bool) -> Any:
    """A key in a PEM file.

    Raises:
        ConfigError: It cannot be read, or is no such key.
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ed25519

    try:
        content = reading.content(path)
        key: Any = (
            serialization.load_pem_private_key(content, password=None)
            if private
            else serialization.load_pem_public_key(content)
        )
    except OSError as error:
        raise ConfigError(f"the key {path} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # ValueError, TypeError for an encrypted one, and cryptography's own
        what = "private" if private else "public"
        raise ConfigError(f"{path} holds no {what} key that can be read: {error}", _KEYS) from None
    kind = ed25519.Ed25519PrivateKey if private else ed25519.Ed25519PublicKey
    if not isinstance(key, kind):
        raise ConfigError(f"{path} is no Ed25519 key", _KEYS)
    return key


_KEYS = "Make a pair: openssl genpkey -algorithm ed25519 -out key.pem; openssl pkey -in key.pem -pubout -out key.pub."
