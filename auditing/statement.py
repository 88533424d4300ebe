"""in-toto statements about audits, signed offline with Ed25519 in a DSSE envelope."""

import base64
import binascii
import os
from pathlib import Path
from typing import Any

from geobased.whole_file import whole_file

from .canonical import audit_package, canonical_json, read_json, sha256

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "urn:geobased:audit:1"
PAYLOAD_TYPE = "application/vnd.in-toto+json"


class SignatureError(ValueError):
    """An envelope that is malformed, or signed by another key."""


def create_key(path: str | Path) -> str:
    """Writes a new private key (PEM, readable by its owner alone), and returns its public half's fingerprint.

    Raises `FileExistsError` where there is one already: what it signed could not be signed again.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} exists already: a key is never replaced")
    key = _ed25519().Ed25519PrivateKey.generate()
    forms = audit_package("cryptography.hazmat.primitives.serialization")
    data = key.private_bytes(forms.Encoding.PEM, forms.PrivateFormat.PKCS8, forms.NoEncryption())
    with whole_file(path) as written, open(os.open(written, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)
    return fingerprint(key.public_key())


def read_private_key(path: str | Path) -> Any:
    """Raises `ValueError` for what is no Ed25519 private key in PEM."""
    forms = audit_package("cryptography.hazmat.primitives.serialization")
    try:
        key = forms.load_pem_private_key(Path(path).read_bytes(), password=None)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} holds no private key without a password: `geobased audit key FILE` makes one") from error
    if not isinstance(key, _ed25519().Ed25519PrivateKey):
        raise ValueError(f"{path} holds a key that is not Ed25519: `geobased audit key FILE` makes one")
    return key


def throwaway_key() -> Any:
    """A private key that nobody keeps: its signature shows later changes, not who signed."""
    return _ed25519().Ed25519PrivateKey.generate()


def public_pem(key: Any) -> bytes:
    """Of a public key."""
    forms = audit_package("cryptography.hazmat.primitives.serialization")
    return key.public_bytes(forms.Encoding.PEM, forms.PublicFormat.SubjectPublicKeyInfo)


def read_public_key(data: bytes) -> Any:
    """From PEM, in the very bytes that `public_pem` writes. Raises `SignatureError` for all else."""
    forms = audit_package("cryptography.hazmat.primitives.serialization")
    unsupported = audit_package("cryptography.exceptions").UnsupportedAlgorithm
    try:
        key = forms.load_pem_public_key(data)
    except (ValueError, TypeError, unsupported) as error:
        raise SignatureError(f"the public key cannot be read: {error}") from error
    if not isinstance(key, _ed25519().Ed25519PublicKey) or public_pem(key) != data:
        raise SignatureError("the public key is no Ed25519 key in plain PEM")
    return key


def fingerprint(public_key: Any) -> str:
    """SHA-256 of the raw public key."""
    return sha256(public_key.public_bytes_raw())


def statement(subjects: dict[str, str], predicate: dict[str, Any]) -> dict[str, Any]:
    """An in-toto statement about files, given by name and SHA-256."""
    return {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": name, "digest": {"sha256": digest}} for name, digest in sorted(subjects.items())],
        "predicateType": PREDICATE_TYPE,
        "predicate": predicate,
    }


def sign(content: dict[str, Any], private_key: Any) -> bytes:
    """The DSSE envelope of a statement, in canonical JSON."""
    payload = canonical_json(content)
    signature = private_key.sign(_signed_bytes(payload))
    envelope = {
        "payload": base64.b64encode(payload).decode(),
        "payloadType": PAYLOAD_TYPE,
        "signatures": [{"keyid": fingerprint(private_key.public_key()), "sig": base64.b64encode(signature).decode()}],
    }
    return canonical_json(envelope) + b"\n"


def open_envelope(data: bytes, public_key: Any) -> dict[str, Any]:
    """The statement in an envelope, if this key signed it.

    Raises `SignatureError` if it did not, and for an envelope in any other form than that of `sign`, down to the last byte.
    """
    try:
        envelope = read_json(data)
        payload = base64.b64decode(envelope["payload"], validate=True)
        (signature,) = envelope["signatures"]
        signed = base64.b64decode(signature["sig"], validate=True)
        again = {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": PAYLOAD_TYPE,
            "signatures": [{"keyid": fingerprint(public_key), "sig": base64.b64encode(signed).decode()}],
        }
    except (binascii.Error, KeyError, TypeError, ValueError) as error:
        raise SignatureError(f"the envelope is malformed: {error}") from error
    if canonical_json(again) + b"\n" != data:
        raise SignatureError("the envelope is not in its canonical form, or names another key")
    try:
        public_key.verify(signed, _signed_bytes(payload))
    except audit_package("cryptography.exceptions").InvalidSignature as error:
        raise SignatureError("the signature does not fit the statement") from error
    content = read_json(payload)
    if canonical_json(content) != payload or content.get("_type") != STATEMENT_TYPE:
        raise SignatureError("the signed content is no statement")
    if content.get("predicateType") != PREDICATE_TYPE:
        raise SignatureError(f"the statement is of another kind: {content.get('predicateType')}")
    return content


def _signed_bytes(payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding."""
    kind = PAYLOAD_TYPE.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def _ed25519() -> Any:
    return audit_package("cryptography.hazmat.primitives.asymmetric.ed25519")


__all__ = [
    "PAYLOAD_TYPE",
    "PREDICATE_TYPE",
    "SignatureError",
    "create_key",
    "fingerprint",
    "open_envelope",
    "public_pem",
    "read_private_key",
    "read_public_key",
    "sign",
    "statement",
    "throwaway_key",
]
