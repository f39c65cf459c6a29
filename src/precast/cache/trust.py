"""Who vouches for stored code: Ed25519 signatures over manifests, and which manifests may be used.

A manifest names its files by digest, so a signature over it covers all of an artifact. Keys are
PEM files as `openssl genpkey -algorithm ed25519` writes them, or one line of text for a public key.
They are read here without `cryptography`; it is imported for the first signature, so that a start
from the user's own tiers never pays for it. `docs/security.md` says what this promises.
"""

from __future__ import annotations

import os

from precast.cache.manifest import encode_body, encode_manifest
from precast.errors import ConfigError, Reason

TYPE_CHECKING = False  # `typing` itself is too dear to import here.
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from precast.cache.interface import CacheInterface

#: Stands before what is signed, lest a signature for something else fit a manifest.
_CONTEXT = b"precast-manifest-signature 1\n"
_ALGORITHM = "ed25519"
_TEXT_PREFIX = "ed25519:"
# DER of the only shape that PKCS #8 and SubjectPublicKeyInfo have for Ed25519 (RFC 8410).
_PRIVATE_DER = bytes.fromhex("302e020100300506032b657004220420")
_PUBLIC_DER = bytes.fromhex("302a300506032b6570032100")
_KEY_BYTES = 32
_MAX_KEY_FILE_BYTES = 1 << 20
_EXTRA = "Install it: pip install 'precast[trust]'"

REMEDY = (
    "Publish with `signing_key` and name its public key in `trusted_keys` here; "
    "`allow_unsigned=True` runs code that nobody vouches for"
)


class SigningKey:
    """A private key. It does not show itself, and is not pickled."""

    __slots__ = ("_key_id", "_public", "_seed", "_signer")

    def __init__(self, seed: bytes) -> None:
        self._seed = seed
        self._signer: Any = None
        self._public = b""
        self._key_id = ""

    def __repr__(self) -> str:
        return "SigningKey(...)"

    def __reduce__(self) -> str:
        raise TypeError("a private key is not pickled; hand over the path of its file")

    @property
    def public_key(self) -> bytes:
        """The 32 bytes of the public key."""
        self._load()
        return self._public

    @property
    def key_id(self) -> str:
        """What signatures call this key."""
        self._load()
        return self._key_id

    def sign(self, payload: Mapping[str, Any]) -> dict[str, Any]:
        """Return a complete payload with this key's signature, in place of any other."""
        self._load()
        value = self._signer.sign(signed_bytes(payload))
        return {
            **payload,
            "signature": {
                "algorithm": _ALGORITHM,
                "key": self._key_id,
                "value": _to_base64(value),
            },
        }

    def _load(self) -> None:
        if self._signer is None:
            private_key, _, _ = _import_ed25519("signing_key")
            signer = private_key.from_private_bytes(self._seed)
            self._public = signer.public_key().public_bytes_raw()
            self._key_id = key_id(self._public)
            self._signer = signer


class Trust:
    """Says of each manifest whether it may be used, by where it was read and who signed it.

    Tiers that only this user can write need no signature. From a tier that others may write to, a
    manifest is used only if a trusted key signed it, or if `allow_unsigned` says that anybody's
    code may run; then it is marked, see `mark_unsigned`.
    """

    __slots__ = ("_public_keys", "allow_unsigned", "signing_key")

    def __init__(
        self,
        public_keys: Mapping[str, bytes] | None = None,
        signing_key: SigningKey | None = None,
        allow_unsigned: bool = False,
    ) -> None:
        """Trust some keys, and the own signing key.

        Args:
            public_keys: By their ids, as `load_public_keys` returns them.
            signing_key: Signs what is published.
            allow_unsigned: Use what nobody signed, from shared tiers too.
        """
        self._public_keys = dict(public_keys or {})
        self.signing_key = signing_key
        self.allow_unsigned = allow_unsigned

    def find_problem(self, tier: CacheInterface, payload: Mapping[str, Any]) -> str | None:
        """Return why nobody vouches for a manifest of a tier; None: somebody does."""
        if is_unsigned(payload):
            return "it holds code that nobody signed"
        return self.find_signature_problem(payload) if is_shared(tier) else None

    def find_signature_problem(self, payload: Mapping[str, Any]) -> str | None:
        """Return why a manifest does not count as signed by a trusted key; None: it does."""
        signature = payload.get("signature")
        if signature is None:
            return "it is not signed"
        if not isinstance(signature, dict) or signature.keys() != {"algorithm", "key", "value"}:
            return "its signature is malformed"
        if signature["algorithm"] != _ALGORITHM:
            return f"its signature is of kind {_shown(signature['algorithm'])}, not {_ALGORITHM}"
        name = signature["key"]
        try:
            public = self._find_key(name)
            if public is None:
                return f"it is signed by key {_shown(name)}, which is not a trusted one"
            _, public_key, invalid_signature = _import_ed25519("trusted_keys")
        except ConfigError as error:
            return f"its signature cannot be checked without {error.wanted}"
        try:
            value = _from_base64(signature["value"])
            public_key.from_public_bytes(public).verify(value, signed_bytes(payload))
        except (ValueError, RecursionError, invalid_signature):
            return f"its signature by key {name} does not fit what it says"
        return None

    def _find_key(self, name: object) -> bytes | None:
        """Return the trusted public key of an id."""
        if isinstance(name, str) and name in self._public_keys:
            return self._public_keys[name]
        if self.signing_key is not None and name == self.signing_key.key_id:
            return self.signing_key.public_key
        return None

    def sign(self, payload: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return what to publish: signed where there is a key and nothing in it is unsigned."""
        if self.signing_key is None or is_unsigned(payload):
            return payload
        return self.signing_key.sign(payload)


#: No key is trusted, nothing is signed: for tiers that only this user can write.
NO_KEYS = Trust()


def open_trust(
    *,
    signing_key: str | os.PathLike[str] | None,
    trusted_keys: Sequence[str | os.PathLike[str]],
    allow_unsigned: bool,
) -> Trust:
    """Return what the settings of these names ask for.

    Raises:
        ConfigError: A key cannot be read, or `cryptography` is missing.
    """
    if signing_key is None and not trusted_keys:
        return Trust(allow_unsigned=True) if allow_unsigned else NO_KEYS
    from importlib.util import find_spec

    if find_spec("cryptography") is None:
        field = "trusted_keys" if signing_key is None else "signing_key"
        raise ConfigError(field, "a key", "used with the package `cryptography`", _EXTRA)
    return Trust(
        load_public_keys(trusted_keys),
        None if signing_key is None else load_private_key(signing_key),
        allow_unsigned,
    )


def is_shared(tier: CacheInterface) -> bool:
    """Whether others than this user may write to a tier."""
    return bool(getattr(tier, "is_shared", False))  # Tiers of this process alone need not say.


def is_unsigned(payload: Mapping[str, Any]) -> bool:
    """Whether a payload is marked as holding code that nobody signed."""
    return payload.get("unsigned", False) is not False


def mark_unsigned(payload: Mapping[str, Any]) -> tuple[dict[str, Any], bytes]:
    """Return a payload, and its manifest, marked as holding code that nobody signed.

    With this mark it may lie in the user's own tiers: it is used only as long as `allow_unsigned`
    is set, never signed, and nothing in it is unpickled.

    Raises:
        ValueError, RecursionError: It holds what a manifest cannot hold, an infinity say.
    """
    marked = {name: value for name, value in payload.items() if name != "signature"}
    marked["unsigned"] = True
    return marked, encode_manifest(marked)


def untrusted_reason(what: str, problem: str) -> Reason:
    """Return why something that a tier has is not used."""
    return Reason("untrusted", f"{what} is not used: {problem}", REMEDY)


def signed_bytes(payload: Mapping[str, Any]) -> bytes:
    """Return what a signature covers: everything that a manifest says except the signature.

    Raises:
        ValueError: It holds what a manifest cannot hold, an infinity say.
    """
    return _CONTEXT + encode_body({k: v for k, v in payload.items() if k != "signature"})


def key_id(public_key: bytes) -> str:
    """Return the name of a public key in signatures: the beginning of its SHA-256."""
    from hashlib import sha256

    return sha256(public_key).hexdigest()[:16]


def public_text(public_key: bytes) -> str:
    """Return a public key as the one line that `trusted_keys` takes."""
    return _TEXT_PREFIX + _to_base64(public_key)


def generate_key(path: str | os.PathLike[str]) -> str:
    """Make a key pair: the private key at `path` (mode 0600), the public one at `<path>.pub`.

    Returns:
        The public key, as `trusted_keys` takes it.

    Raises:
        ConfigError: A file is there already (it is left alone), cannot be written, or
            `cryptography` is missing.
    """
    key = SigningKey(os.urandom(_KEY_BYTES))
    text = public_text(key.public_key)
    encoded = _to_base64(_PRIVATE_DER + key._seed)
    pem = f"-----BEGIN PRIVATE KEY-----\n{encoded}\n-----END PRIVATE KEY-----\n"
    place = os.fspath(path)
    for name, content, mode in ((place, pem, 0o600), (f"{place}.pub", f"{text}\n", 0o644)):
        try:
            file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            with open(file, "w", encoding="ascii") as stream:  # noqa: PTH123
                stream.write(content)
        except OSError as error:
            raise ConfigError(
                "signing_key",
                name,
                f"a new file that can be written ({error.strerror or error})",
                "Choose another place; existing keys are never replaced",
            ) from error
    return text


def load_private_key(path: str | os.PathLike[str]) -> SigningKey:
    """Return the key that a PEM file holds.

    Raises:
        ConfigError: It cannot be read, or is no Ed25519 key without a pass phrase.
    """
    name = os.fspath(path)
    text = _read_key_file("signing_key", name)
    for kind, der in _pem_blocks(text):
        if kind == "PRIVATE KEY" and der is not None and der.startswith(_PRIVATE_DER):
            seed = der[len(_PRIVATE_DER) :]
            if len(seed) == _KEY_BYTES:
                return SigningKey(seed)
    raise ConfigError(
        "signing_key",
        name,
        "a PEM file with an Ed25519 private key that has no pass phrase",
        "Make one: precast keys generate FILE",
    )


def load_public_keys(sources: Sequence[str | os.PathLike[str]]) -> dict[str, bytes]:
    """Return public keys by their ids.

    Args:
        sources: Each `ed25519:<base64>`, a PEM text, or the path of a file with such lines and
            texts in it; `#` begins a comment.

    Raises:
        ConfigError: One cannot be read, or holds no public key.
    """
    found: dict[str, bytes] = {}
    for source in sources:
        name = os.fspath(source)
        is_text = name.startswith((_TEXT_PREFIX, "-----BEGIN"))
        keys = _public_keys_in(name if is_text else _read_key_file("trusted_keys", name))
        if not keys:
            raise ConfigError(
                "trusted_keys",
                name,
                "Ed25519 public keys: `ed25519:<base64>`, PEM, or files of them",
                "Give what `precast keys generate` wrote beside the private key, ending in .pub",
            )
        found.update({key_id(key): key for key in keys})
    return found


def _public_keys_in(text: str) -> list[bytes]:
    """Return the keys of a text; empty where any of it is not understood."""
    keys = []
    for kind, der in _pem_blocks(text):
        if kind != "PUBLIC KEY" or der is None or not der.startswith(_PUBLIC_DER):
            return []
        keys.append(der[len(_PUBLIC_DER) :])
    inside = False
    for line in text.splitlines():
        word = line.partition("#")[0].strip()
        if word.startswith("-----"):
            inside = word.startswith("-----BEGIN")
        elif word and not inside:
            try:
                keys.append(_from_base64(word.split()[0].removeprefix(_TEXT_PREFIX)))
            except ValueError:
                return []
    return keys if all(len(key) == _KEY_BYTES for key in keys) else []


def _pem_blocks(text: str) -> list[tuple[str, bytes | None]]:
    """Return the kind and the bytes of each PEM block; None where its text is not base64."""
    blocks: list[tuple[str, bytes | None]] = []
    for part in text.split("-----BEGIN ")[1:]:
        kind, _, rest = part.partition("-----")
        try:
            der = _from_base64("".join(rest.partition("-----END ")[0].split()))
        except ValueError:
            der = None
        blocks.append((kind, der))
    return blocks


def _read_key_file(field: str, path: str) -> str:
    try:
        with open(os.path.expanduser(path), "rb") as file:  # noqa: PTH111, PTH123
            return file.read(_MAX_KEY_FILE_BYTES).decode()
    except (OSError, ValueError) as error:
        problem = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            field, path, f"a file that can be read ({problem})", "Check the path and its rights"
        ) from error


def _import_ed25519(field: str) -> tuple[Any, Any, type[Exception]]:
    """Return the classes of private keys, public keys and of what a bad signature raises."""
    try:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import (
            Ed25519PrivateKey,
            Ed25519PublicKey,
        )
    except ImportError as error:
        raise ConfigError(field, "a key", "the package `cryptography`", _EXTRA) from error
    return Ed25519PrivateKey, Ed25519PublicKey, InvalidSignature


def _to_base64(data: bytes) -> str:
    import binascii  # Here, because most starts need no keys.

    return binascii.b2a_base64(data, newline=False).decode()


def _from_base64(text: object) -> bytes:
    """Return the bytes of a base64 text in the one form that `_to_base64` writes.

    Raises:
        ValueError: It is in another.
    """
    import binascii

    if not isinstance(text, str):
        raise ValueError("not a text")
    data = binascii.a2b_base64(text)
    if _to_base64(data) != text:
        raise ValueError("not base64")
    return data


def _shown(value: object) -> str:
    """Return what a stranger wrote, short enough for a message."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
