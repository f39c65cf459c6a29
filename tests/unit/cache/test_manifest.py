from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

import pytest

from precast.cache.manifest import (
    MAX_MANIFEST_BYTES,
    complete_payload,
    decode_manifest,
    encode_manifest,
)
from precast.errors import ArtifactCorruptError
from precast.testing import KEY, OTHER_KEY

FILES = {"piece.so": b"code", "kernel.cubin": b"more code"}


def encode_body(body: bytes) -> bytes:
    return b"precast-manifest 1 " + sha256(body).hexdigest().encode() + b"\n" + body


def encode_changed(**changes: object) -> bytes:
    payload = complete_payload(KEY, {}, FILES) | changes
    return encode_body(json.dumps(payload).encode())


def test_a_manifest_says_its_key_its_files_and_what_was_given() -> None:
    payload = complete_payload(KEY, {"compiler": "eager", "seconds": 1.5}, FILES)
    data = encode_manifest(payload)
    assert decode_manifest(KEY, data, "here") == {
        "compiler": "eager",
        "seconds": 1.5,
        "format": 1,
        "key": KEY,
        "files": {name: sha256(content).hexdigest() for name, content in FILES.items()},
        "sizes": {"piece.so": 4, "kernel.cubin": 9},
    }


def test_the_bytes_are_those_of_the_specification() -> None:
    """
    `docs/format.md` shows this one. Other bytes need another `FORMAT` and bucket.
    """
    data = encode_manifest(complete_payload("0123abcd", {"b": [1, None], "a": "é"}, {"x": b""}))
    body = (
        b'{"a":"\\u00e9","b":[1,null],"files":{"x":"e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b93'
        b'4ca495991b7852b855"},"format":1,"key":"0123abcd","sizes":{"x":0}}'
    )
    assert data == encode_body(body)
    page = (Path(__file__).parents[3] / "docs" / "format.md").read_text(encoding="utf-8")
    assert f"```text\n{data.decode()}\n```" in page
    assert f"({len(data)} bytes;" in page


def test_the_order_in_which_fields_were_given_does_not_show() -> None:
    one = complete_payload(KEY, {"a": 1, "b": {"c": 2, "d": 3}}, FILES)
    other = complete_payload(KEY, {"b": {"d": 3, "c": 2}, "a": 1}, dict(reversed(FILES.items())))
    assert encode_manifest(one) == encode_manifest(other)


def test_every_flipped_byte_is_found() -> None:
    data = encode_manifest(complete_payload(KEY, {"note": "short"}, {}))
    for i in range(len(data)):
        for bit in (0x01, 0x80):
            damaged = data[:i] + bytes([data[i] ^ bit]) + data[i + 1 :]
            with pytest.raises(ArtifactCorruptError):
                decode_manifest(KEY, damaged, "here")


def test_every_truncation_is_found() -> None:
    data = encode_manifest(complete_payload(KEY, {}, FILES))
    for length in range(len(data)):
        with pytest.raises(ArtifactCorruptError):
            decode_manifest(KEY, data[:length], "here")
    with pytest.raises(ArtifactCorruptError):
        decode_manifest(KEY, data + b" ", "here")


@pytest.mark.parametrize(
    "data",
    [
        encode_body(b"not json"),
        encode_body(b"\xff\xfe"),
        encode_body(b"[" * 200_000),
        encode_body(b"[]"),
        encode_body(b"null"),
        encode_body(b"{}"),
        encode_changed(format=2),
        encode_changed(key=OTHER_KEY),
        encode_changed(files=[]),
        encode_changed(files={}),
        encode_changed(files={"piece.so": "short"}, sizes={"piece.so": 1}),
        encode_changed(files={"piece.so": 7}, sizes={"piece.so": 1}),
        encode_changed(files={"../up": "0" * 64}, sizes={"../up": 1}),
        encode_changed(files={".": "0" * 64}, sizes={".": 1}),
        encode_changed(sizes={"piece.so": "4", "kernel.cubin": 9}),
        encode_changed(sizes={"piece.so": -1, "kernel.cubin": 9}),
        encode_changed(sizes={"piece.so": True, "kernel.cubin": 9}),
        b" " * (MAX_MANIFEST_BYTES + 1),
    ],
    ids=range(18),
)
def test_a_right_digest_over_wrong_contents_is_damage(data: bytes) -> None:
    """
    A digest proves that the bytes are the ones written, not that they were written by us.
    """
    with pytest.raises(ArtifactCorruptError, match="here"):
        decode_manifest(KEY, data, "here")


def test_a_payload_that_could_not_be_read_again_is_refused() -> None:
    with pytest.raises(ValueError, match="files"):
        complete_payload(KEY, {"files": {}}, {})
    with pytest.raises(ValueError, match="not a file name"):
        complete_payload(KEY, {}, {"a/b": b""})
    with pytest.raises(ValueError, match="not a cache key"):
        complete_payload("A", {}, {})
    with pytest.raises(TypeError):
        encode_manifest(complete_payload(KEY, {"x": {1, 2}}, {}))
    with pytest.raises(ValueError, match="JSON"):
        encode_manifest(complete_payload(KEY, {"x": float("nan")}, {}))
    with pytest.raises(ValueError, match="put what is large into a file"):
        encode_manifest(complete_payload(KEY, {"x": "y" * MAX_MANIFEST_BYTES}, {}))
