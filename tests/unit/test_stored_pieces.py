"""What is loaded from the cache: sound, and trusted as far as its compiler needs."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import pytest

from precast.cache import DiskCache
from precast.cache.trust import SigningKey, Trust
from precast.events import ArtifactRefused
from unit.compilers.example_pieces import TINY
from unit.planted_manager import Planted, PlantedWithoutPickle, Setup, X


def test_a_record_is_enough_to_load_a_piece(tmp_path: Path) -> None:
    [result] = Setup(tmp_path, Planted()).manager.compile([TINY], ["tiny"])
    assert result.record is not None

    call = Setup(tmp_path, Planted()).manager.stored.load(result.record)
    assert call is not None
    assert call(X)[0].sum() == 12


def test_damaged_files_are_compiled_anew(tmp_path: Path) -> None:
    """A blob that is not what its digest says is never opened, and is replaced."""
    Setup(tmp_path, Planted()).manager.compile([TINY], ["tiny"])
    blobs = [path for path in tmp_path.rglob("*") if path.is_file() and path.read_bytes() == b"3"]
    assert blobs
    for blob in blobs:
        blob.chmod(0o600)
        blob.write_bytes(b"4")

    again = Setup(tmp_path, Planted())
    [result] = again.manager.compile([TINY], ["tiny"])
    assert len(again.service.jobs) == 1
    assert result.call(X)[0].sum() == 12


@pytest.mark.parametrize("kind", [Planted, PlantedWithoutPickle])
def test_of_a_shared_tier_only_what_is_signed_is_loaded(
    tmp_path: Path, kind: type[Planted]
) -> None:
    key = SigningKey(b"k" * 32)
    shared = tmp_path / "shared"
    Setup(tmp_path / "a", kind(), shared=shared, trust=Trust(signing_key=key)).manager.compile(
        [TINY], ["tiny"]
    )
    stranger = Setup(tmp_path / "b", kind(), shared=shared)
    assert not stranger.manager.compile([TINY], ["tiny"])[0].from_cache
    assert stranger.kinds(ArtifactRefused) == ["ArtifactRefused"]
    Setup(tmp_path / "c", kind(), shared=shared, trust=Trust(signing_key=key)).manager.compile(
        [TINY], ["tiny"]
    )  # The stranger's has taken its place, unsigned; this one signs it again.
    friend = Setup(tmp_path / "d", kind(), shared=shared, trust=Trust({key.key_id: key.public_key}))
    [result] = friend.manager.compile([TINY], ["tiny"])
    assert result.from_cache
    assert result.record is not None
    assert "unsigned" not in result.record


def test_nothing_unsigned_is_unpickled_whatever_the_settings(tmp_path: Path) -> None:
    """A compiler that does not say that it does without pickles is taken to need them."""
    shared = tmp_path / "shared"
    Setup(tmp_path / "a", Planted(), shared=shared).manager.compile([TINY], ["tiny"])
    for _ in range(2):  # The second time, the marked copy in the own tier.
        compiler = Planted()
        admitted = Setup(tmp_path / "b", compiler, shared=shared, trust=Trust(allow_unsigned=True))
        piece_key = admitted.manager.compilers.compute_hash_keys(TINY, compiler).digest
        assert admitted.manager.stored.find(TINY, "tiny") is None
        assert compiler.num_loads == 0
        [event] = [event for event in admitted.events if isinstance(event, ArtifactRefused)]
        assert event.key == piece_key
        assert event.reason.code == "untrusted"
        assert "unpickles" in event.reason.message


@pytest.mark.parametrize("is_marked", ["record", "assembly"])
def test_inductors_own_artifact_is_not_opened_unsigned(tmp_path: Path, is_marked: str) -> None:
    """Its file holds pickles, which torch loads. Here it is not so much as looked at."""
    artifact = b"not what torch expects: opening it would raise"
    setup = Setup(tmp_path / "a", "inductor_standalone", trust=Trust(allow_unsigned=True))
    digest = sha256(artifact).hexdigest()
    DiskCache(tmp_path / "a").write_blob(digest, artifact)
    record = {
        "key": "0123",
        "compiler": "inductor_standalone",
        "details": {"entry": "artifact.bin"},
        "files": {"artifact.bin": digest},
        "seconds": 1.0,
        **({"unsigned": True} if is_marked == "record" else {}),
    }
    assert setup.manager.stored.load(record, unsigned=is_marked == "assembly") is None
    assert setup.kinds(ArtifactRefused) == ["ArtifactRefused"]


def test_an_assembly_of_unsigned_pieces_is_unsigned(tmp_path: Path) -> None:
    """Permission for its pieces is needed for it too, and whoever assembled it does not sign it."""
    shared = tmp_path / "shared"
    Setup(tmp_path / "a", PlantedWithoutPickle(), shared=shared).manager.compile([TINY], ["tiny"])
    trust = Trust(signing_key=SigningKey(b"k" * 32), allow_unsigned=True)
    admitted = Setup(tmp_path / "b", PlantedWithoutPickle(), shared=shared, trust=trust)
    [result] = admitted.manager.compile([TINY], ["tiny"])
    assert result.from_cache
    assert result.call(X)[0].sum() == 12
    admitted.manager.save("assembly-0", {"pieces": [result.record]})
    stored = admitted.loader.manifest("assembly-0")
    assert stored is not None
    assert stored["unsigned"] is True
    assert "signature" not in stored
    later = Setup(
        tmp_path / "b", PlantedWithoutPickle(), trust=Trust(signing_key=trust.signing_key)
    )
    assert later.loader.manifest("assembly-0") is None
