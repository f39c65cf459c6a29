from __future__ import annotations

import copy
import os
import pickle
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from precast.cache import CacheLoader, CacheStorage, DiskCache, MemoryCache
from precast.cache.manifest import decode_manifest, encode_manifest
from precast.cache.trust import (
    NO_KEYS,
    SigningKey,
    Trust,
    generate_key,
    key_id,
    load_private_key,
    load_public_keys,
    mark_unsigned,
    open_trust,
    public_text,
)
from precast.errors import ConfigError
from precast.events import ArtifactQuarantined, ArtifactRefused, CacheMiss, Event
from precast.testing import BLOB, KEY, OTHER_KEY

FILES = {"piece.so": BLOB}
PAYLOAD = {"kind": "piece", "seconds": 1.5, "nested": {"list": [1, None, "é"]}}


class SharedCache(DiskCache):
    """A tier that others may write to."""

    is_shared = True


class Fleet:
    """A shared tier and machines that each have a disk of their own."""

    def __init__(self, folder: Path, events: list[Event]) -> None:
        self.folder = folder
        self.events = events
        self.shared = SharedCache(folder / "shared", name="shared")
        self.num_machines = 0

    def machine(self, trust: Trust, disk: DiskCache | None = None) -> Any:
        self.num_machines += 1
        disk = disk or DiskCache(self.folder / f"disk{self.num_machines}")
        tiers = (MemoryCache(), disk, self.shared)
        loader = CacheLoader(tiers, self.events.append, lambda: 0.0, trust=trust)
        storage = CacheStorage(tiers, self.events.append, lambda: 0.0, trust=trust)
        return loader, storage, disk

    def refusals(self) -> list[ArtifactRefused]:
        return [event for event in self.events if isinstance(event, ArtifactRefused)]


@pytest.fixture
def fleet(tmp_path: Path, events: list[Event]) -> Fleet:
    return Fleet(tmp_path, events)


def trusting(*keys: SigningKey, **settings: Any) -> Trust:
    return Trust({key.key_id: key.public_key for key in keys}, **settings)


def publish(fleet: Fleet, trust: Trust, key: str = KEY, **payload: Any) -> DiskCache:
    disk: DiskCache
    _, storage, disk = fleet.machine(trust)
    storage.publish(key, {**PAYLOAD, **payload}, FILES)
    return disk


# -- keys ------------------------------------------------------------------------------


def test_a_generated_key_is_the_users_alone_and_signs(tmp_path: Path) -> None:
    path = tmp_path / "signing.pem"
    text = generate_key(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert Path(f"{path}.pub").read_text() == f"{text}\n"
    signed = load_private_key(path).sign({"a": 1})
    for sources in ([text], [f"{path}.pub"], [tmp_path / "signing.pem.pub"]):
        assert Trust(load_public_keys(sources)).find_signature_problem(signed) is None


def test_an_existing_key_is_never_replaced(tmp_path: Path) -> None:
    generate_key(tmp_path / "key")
    before = (tmp_path / "key").read_bytes()
    with pytest.raises(ConfigError, match="new file"):
        generate_key(tmp_path / "key")
    assert (tmp_path / "key").read_bytes() == before


@pytest.mark.skipif(shutil.which("openssl") is None, reason="compares with openssl's own files")
def test_keys_are_those_of_openssl(tmp_path: Path) -> None:
    """Both ways: its files are read here, and it reads ours as the same public key."""
    path, public = tmp_path / "key.pem", tmp_path / "key.pub.pem"

    def openssl(*arguments: object) -> None:
        subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)

    openssl("genpkey", "-algorithm", "ed25519", "-out", path)
    openssl("pkey", "-in", path, "-pubout", "-out", public)
    key = load_private_key(path)
    assert load_public_keys([public]) == {key.key_id: key.public_key}
    assert load_public_keys([public.read_text()]) == {key.key_id: key.public_key}
    text = generate_key(tmp_path / "ours")
    openssl("pkey", "-in", tmp_path / "ours", "-pubout", "-out", tmp_path / "ours.pem")
    assert load_public_keys([tmp_path / "ours.pem"]) == load_public_keys([text])


def test_a_file_may_list_several_public_keys(
    tmp_path: Path, key: SigningKey, other_key: SigningKey
) -> None:
    lines = ["# the fleet", public_text(key.public_key), f"{public_text(other_key.public_key)} # b"]
    (tmp_path / "keys").write_text("\n".join(lines))
    assert load_public_keys([tmp_path / "keys"]) == {
        one.key_id: one.public_key for one in (key, other_key)
    }


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"nonsense",
        b"ed25519:AAAA",
        b"ed25519:" + b"A" * 44,
        b"\xff\xfe",
        b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n",
        b"-----BEGIN PRIVATE KEY-----\n!\n-----END PRIVATE KEY-----\n",
    ],
)
def test_what_is_no_key_is_a_sentence(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="setting 'signing_key'"):
        load_private_key(path)
    with pytest.raises(ConfigError, match="setting 'trusted_keys'"):
        load_public_keys([path])


def test_a_key_with_a_pass_phrase_is_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text(
        "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n"
    )
    with pytest.raises(ConfigError, match="no pass phrase"):
        load_private_key(path)


def test_a_key_that_is_not_there_is_refused_before_any_work(tmp_path: Path) -> None:
    path = str(tmp_path / "absent")
    with pytest.raises(ConfigError, match=r"signing_key.*No such file"):
        open_trust(signing_key=path, trusted_keys=[], allow_unsigned=False)
    with pytest.raises(ConfigError, match=r"trusted_keys.*No such file"):
        open_trust(signing_key=None, trusted_keys=[path], allow_unsigned=False)


def test_without_cryptography_the_extra_is_named(
    tmp_path: Path, key: SigningKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = public_text(key.public_key)
    signed = key.sign({"a": 1})
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"precast\[trust\]"):
        open_trust(signing_key=None, trusted_keys=[text], allow_unsigned=False)
    monkeypatch.setitem(sys.modules, "cryptography.exceptions", None)
    problem = Trust(load_public_keys([text])).find_signature_problem(signed)
    assert problem is not None
    assert "the package `cryptography`" in problem


def test_a_private_key_does_not_show_itself(key: SigningKey) -> None:
    assert "kkkk" not in repr(key)
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(key)


# -- signatures --------------------------------------------------------------------------


def changes_of(value: Any) -> list[Any]:
    """Every way to change one leaf, drop one entry or add one, of plain data."""
    changed: list[Any] = []
    if isinstance(value, dict):
        for name in value:
            changed.append({k: v for k, v in value.items() if k != name})
            changed.extend({**value, name: other} for other in changes_of(value[name]))
        changed.append({**value, "added": 1})
    elif isinstance(value, list):
        changed.extend(
            [*value[:i], x, *value[i + 1 :]] for i, y in enumerate(value) for x in changes_of(y)
        )
        changed.append([*value, 1])
    else:
        changed.append([value])
        changed.append(f"{value}x" if isinstance(value, str) else "other")
    return changed


def test_a_signature_covers_everything_that_a_manifest_says(key: SigningKey) -> None:
    """Whatever is altered, dropped or added, the signature does not fit any more."""
    signed = key.sign({"key": KEY, "files": {"a": "0" * 64}, "format": 1, **PAYLOAD})
    trust = trusting(key)
    assert trust.find_signature_problem(signed) is None
    altered = changes_of(signed)
    assert len(altered) > 30
    for payload in altered:
        assert trust.find_signature_problem(payload) is not None, payload


def test_a_signature_lives_through_the_manifest(key: SigningKey) -> None:
    payload = {"key": KEY, "files": {}, "sizes": {}, "format": 1, **PAYLOAD, "x": 1e-7, "y": 2**60}
    data = encode_manifest(key.sign(payload))
    assert trusting(key).find_signature_problem(decode_manifest(KEY, data, "here")) is None
    assert encode_manifest(key.sign(payload)) == data  # Same input, same bytes.


@pytest.mark.parametrize(
    "signature",
    [None, 1, "x", [], {}, {"algorithm": "none", "key": "", "value": ""},
     {"algorithm": "ed25519", "key": [], "value": ""},
     {"algorithm": "ed25519", "key": "f" * 1000, "value": ""}],
)  # fmt: skip
def test_a_malformed_signature_is_none(key: SigningKey, signature: object) -> None:
    problem = trusting(key).find_signature_problem({"a": 1, "signature": signature})
    assert problem is not None
    assert len(problem) < 200


# -- what a shared tier gives -------------------------------------------------------------


def test_what_a_trusted_key_signed_is_used_and_stays_signed(
    fleet: Fleet, key: SigningKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the nearer tiers too, where it is found again without looking at the signature."""
    publish(fleet, Trust(signing_key=key))
    loader, _, disk = fleet.machine(trusting(key))
    payload = loader.manifest(KEY)
    assert payload["nested"] == PAYLOAD["nested"]
    assert "unsigned" not in payload
    assert Path(loader.files(payload["files"])["piece.so"]).read_bytes() == BLOB
    assert disk.read_manifest(KEY) == fleet.shared.read_manifest(KEY)
    fleet.shared.delete_manifest(KEY)
    assert fleet.machine(NO_KEYS, disk)[0].manifest(KEY) == payload
    assert fleet.refusals() == []


def test_who_signs_trusts_its_own_key(fleet: Fleet, key: SigningKey) -> None:
    publish(fleet, Trust(signing_key=key))
    assert fleet.machine(Trust(signing_key=SigningKey(b"k" * 32)))[0].manifest(KEY) is not None


def forgeries(fleet: Fleet, key: SigningKey, other_key: SigningKey) -> dict[str, bytes]:
    signed = decode_manifest(KEY, fleet.shared.read_manifest(KEY) or b"", "here")
    stripped = {name: value for name, value in signed.items() if name != "signature"}
    renamed = copy.deepcopy(other_key.sign(stripped))
    renamed["signature"]["key"] = key.key_id
    return {
        "unsigned": encode_manifest(stripped),
        "foreign": encode_manifest(other_key.sign(stripped)),
        "foreign under our name": encode_manifest(renamed),
        "altered": encode_manifest({**signed, "files": {"piece.so": "0" * 64}}),
        "of another artifact": encode_manifest(
            {**stripped, "signature": key.sign({**stripped, "key": OTHER_KEY})["signature"]}
        ),
        "marked and signed": encode_manifest(key.sign({**stripped, "unsigned": True})),
    }


FORGERIES = [
    "unsigned",
    "foreign",
    "foreign under our name",
    "altered",
    "of another artifact",
    "marked and signed",
]


@pytest.mark.parametrize("forgery", FORGERIES)
def test_what_nobody_trusted_signed_is_a_miss_and_left_alone(
    fleet: Fleet, key: SigningKey, other_key: SigningKey, forgery: str
) -> None:
    """Neither used nor copied nor set aside, and reported once however often it is asked for."""
    publish(fleet, Trust(signing_key=key))
    data = forgeries(fleet, key, other_key)[forgery]
    fleet.shared.write_manifest(KEY, data)
    fleet.events.clear()
    loader, storage, disk = fleet.machine(trusting(key))
    assert loader.manifest(KEY) is None
    assert loader.manifest(KEY) is None
    assert disk.read_manifest(KEY) is None
    storage.quarantine(KEY, fleet.refusals()[0].reason)
    assert fleet.shared.read_manifest(KEY) == data
    reasons = [event.reason for event in fleet.refusals() if event.tier == "shared"]
    assert {reason.code for reason in reasons} == {"untrusted"}
    assert len(reasons) == 2  # Once by what reads, once by what writes.
    assert "trusted_keys" in reasons[0].remedy
    assert [type(event) for event in fleet.events].count(CacheMiss) == 2
    assert not any(isinstance(event, ArtifactQuarantined) for event in fleet.events)


def test_a_forgery_does_not_hide_a_sound_copy_farther_away(
    fleet: Fleet, key: SigningKey, other_key: SigningKey, tmp_path: Path
) -> None:
    publish(fleet, Trust(signing_key=key))
    near = SharedCache(tmp_path / "near", name="near")
    near.write_manifest(KEY, forgeries(fleet, key, other_key)["unsigned"])
    tiers = (DiskCache(tmp_path / "own"), near, fleet.shared)
    loader = CacheLoader(tiers, fleet.events.append, lambda: 0.0, trust=trusting(key))
    assert loader.manifest(KEY) is not None
    assert tiers[0].read_manifest(KEY) == fleet.shared.read_manifest(KEY)


def test_keys_can_be_rotated(fleet: Fleet, key: SigningKey, other_key: SigningKey) -> None:
    """With both trusted, old and new entries are used; once the old one is not, only new ones."""
    publish(fleet, Trust(signing_key=key))
    publish(fleet, Trust(signing_key=other_key), OTHER_KEY)
    both = fleet.machine(trusting(key, other_key))[0]
    assert both.manifest(KEY) is not None
    assert both.manifest(OTHER_KEY) is not None
    new = fleet.machine(trusting(other_key))[0]
    assert new.manifest(KEY) is None
    assert new.manifest(OTHER_KEY) is not None
    assert key_id(key.public_key) in fleet.refusals()[0].reason.message


# -- opting out ----------------------------------------------------------------------------


def test_unsigned_code_is_used_only_as_long_as_the_user_admits_it(
    fleet: Fleet, key: SigningKey
) -> None:
    """Its copy in the own disk tier is marked, and worth nothing once the opt-out is gone."""
    publish(fleet, NO_KEYS)
    loader, _, disk = fleet.machine(Trust(allow_unsigned=True))
    assert loader.manifest(KEY)["unsigned"] is True
    assert fleet.machine(Trust(allow_unsigned=True), disk)[0].manifest(KEY)["unsigned"] is True
    assert fleet.refusals() == []
    assert fleet.machine(trusting(key), disk)[0].manifest(KEY) is None
    assert {event.tier for event in fleet.refusals()} == {"disk", "shared"}


def test_a_signed_entry_takes_the_place_of_a_marked_copy(fleet: Fleet, key: SigningKey) -> None:
    publish(fleet, NO_KEYS)
    loader, _, disk = fleet.machine(Trust(allow_unsigned=True))
    loader.manifest(KEY)
    publish(fleet, Trust(signing_key=key))
    assert "unsigned" not in fleet.machine(trusting(key), disk)[0].manifest(KEY)
    assert "unsigned" not in fleet.machine(NO_KEYS, disk)[0].manifest(KEY)


def test_what_is_marked_is_never_signed(fleet: Fleet, key: SigningKey) -> None:
    """An assembly of pieces that nobody vouches for is not vouched for by who assembled it."""
    publish(fleet, Trust(signing_key=key), unsigned=True)
    stored = decode_manifest(KEY, fleet.shared.read_manifest(KEY) or b"", "here")
    assert stored["unsigned"] is True
    assert "signature" not in stored
    assert fleet.machine(trusting(key))[0].manifest(KEY) is None


def test_a_manifest_that_cannot_be_marked_is_refused(fleet: Fleet) -> None:
    """A number that JSON reads as infinite, from a stranger, stops nothing."""
    publish(fleet, NO_KEYS)
    plain = decode_manifest(KEY, fleet.shared.read_manifest(KEY) or b"", "here")
    body = encode_manifest({**plain, "x": 1.25}).partition(b"\n")[2].replace(b"1.25", b"1e999")
    from hashlib import sha256

    head = b"precast-manifest 1 " + sha256(body).hexdigest().encode() + b"\n"
    fleet.shared.write_manifest(KEY, head + body)
    assert fleet.machine(Trust(allow_unsigned=True))[0].manifest(KEY) is None
    assert len(fleet.refusals()) == 1


def test_marking_drops_the_signature(key: SigningKey) -> None:
    payload, data = mark_unsigned(key.sign({"key": KEY, "files": {}, "sizes": {}, "format": 1}))
    assert decode_manifest(KEY, data, "here") == payload
    assert "signature" not in payload


# -- what it costs ---------------------------------------------------------------------------


@pytest.mark.parametrize("settings", ["none", "keys"])
def test_local_tiers_never_import_cryptography(
    tmp_path: Path, key: SigningKey, settings: str, run_isolated: Callable[[str], str]
) -> None:
    """With keys in the settings too: they are read at the start, and not used before need be."""
    disk = DiskCache(tmp_path / "disk")
    CacheStorage([disk], lambda _: None, lambda: 0.0).publish(KEY, {}, FILES)
    sources = [] if settings == "none" else [public_text(key.public_key)]
    said = run_isolated(f"""
import sys
from precast.cache import open_cache
from precast.cache.trust import open_trust
trust = open_trust(signing_key=None, trusted_keys={sources!r}, allow_unsigned=False)
loader, _ = open_cache({str(tmp_path / "disk")!r}, disabled=False, emit=print,
                       clock=lambda: 0.0, trust=trust)
assert loader.files(loader.manifest({KEY!r})["files"]) is not None
print([name for name in sys.modules if name.startswith("cryptography.")])
""")
    assert said.splitlines()[-1] == "[]"


@pytest.fixture
def run_isolated(tmp_path: Path) -> Callable[[str], str]:
    source = str(Path(__file__).parents[3] / "src")

    def run(program: str) -> str:
        return subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONPATH": source},
        ).stdout

    return run
