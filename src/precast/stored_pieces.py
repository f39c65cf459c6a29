"""Pieces in the cache: find one, load its code, save what was compiled.

What is found is loaded by the compiler that made it; nothing is compiled here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from precast.cache.trust import is_unsigned
from precast.errors import ArtifactUnopenedError, PrecastError, Reason, in_words
from precast.events import ArtifactRefused, Emit, PieceLoaded, PieceTimed

if TYPE_CHECKING:
    from precast.cache import CacheLoader, CacheStorage
    from precast.cache.scratch import OwnFolder
    from precast.compilers.chosen import ChosenCompilers
    from precast.compilers.interface import CompiledCallable, CompilerInterface
    from precast.compilers.job import JobResult
    from precast.graph.key import Key
    from precast.graph.piece import Piece
    from precast.piece_result import PieceResult


class StoredPieces:
    """The pieces that the cache of one model has."""

    def __init__(
        self,
        compilers: ChosenCompilers,
        loader: CacheLoader,
        storage: CacheStorage,
        emit: Emit,
        clock: Callable[[], float] = time.perf_counter,
        *,
        keep_slower: bool = False,
    ) -> None:
        """Read nothing yet.

        Args:
            compilers: Of the model: they name what is stored, and load it.
            loader: Reads artifacts.
            storage: Writes them.
            emit: Is told what happens.
            clock: Seconds that only go forward.
            keep_slower: Run also what was found to be slower than eager.
        """
        self._compilers = compilers
        self._loader = loader
        self._storage = storage
        self._emit = emit
        self._clock = clock
        self._keep_slower = keep_slower
        self._unsaved: list[OwnFolder] = []
        self._refused: set[str] = set()

    # -- finding and loading ---------------------------------------------------

    def find(self, piece: Piece, name: str) -> PieceResult | None:
        """Return a piece from the cache, by the first compiler that has it."""
        from precast.piece_result import PieceResult, unless_slower

        for compiler_name in self._compilers.names_here(piece):
            compiler = self._compilers.make(compiler_name)
            if not compiler.is_saveable or compiler_name == "eager":
                continue
            key = self._compilers.compute_hash_keys(piece, compiler)
            manifest = self._loader.manifest(key.digest)
            if manifest is None:
                continue
            record = _record_of(key.digest, manifest)
            try:
                call = self.load(record, name=name) if record is not None else None
            except ArtifactUnopenedError:
                continue  # Here it is a miss; others may open it.
            except PrecastError as error:
                # Sound bytes that do not load here are of no use to anybody: compile again.
                self._storage.quarantine(key.digest, error.reason)
                continue
            if record is not None and call is not None:
                found = PieceResult(
                    call=call,
                    key=key.digest,
                    compiler=compiler_name,
                    record=record,
                    seconds=record["seconds"],
                    from_cache=True,
                    ranges=record["details"].get("ranges"),
                    num_parts=record["details"].get("num_parts", 1),
                    passes=record["details"].get("passes", ()),
                    timing=record["timing"],
                )
                return found if self._keep_slower else unless_slower(piece, found)
        return None

    def find_new(self, piece: Piece, name: str) -> PieceResult | None:
        """Return a piece that was not there before; looks no further than it must."""
        for key in self._compilers.digests(piece):
            if self._loader.peek(key) is not None:
                return self.find(piece, name)
        return None

    def load(
        self, record: Mapping[str, Any], *, name: str = "", unsigned: bool = False
    ) -> CompiledCallable | None:
        """Return the code that a record stands for; None where its files are not sound.

        Args:
            record: Of an artifact.
            name: Of the piece, for reports.
            unsigned: Nobody trusted vouches for the record. Then nothing is unpickled,
                whatever the settings are: None for a compiler that would.

        Raises:
            PrecastError: The files are sound and yet cannot be loaded here.
        """
        if "eager" in record:
            from precast.compilers.eager import eager_call
            from precast.graph.piece import Piece

            return eager_call(Piece.from_json(record["eager"]))
        if record.get("kind") == "parts":
            from precast.parts import join

            unsigned = unsigned or is_unsigned(record)
            calls = [
                self.load(part, name=name, unsigned=unsigned)
                for part in record["details"]["records"]
            ]
            return None if None in calls else join(record["details"], calls)
        started = self._clock()
        compiler = self._compilers.make(record["compiler"])
        if (unsigned or is_unsigned(record)) and getattr(compiler, "unpickles", True):
            self._emit(ArtifactRefused("cache", record["key"], _pickle_reason(compiler.name)))
            self._refused.add(record["key"])
            return None
        files = record["files"]
        paths = self._loader.files(files) if files else {}
        if paths is None:
            return None
        call = _open(compiler, record["details"], paths)
        self._emit(
            PieceLoaded(
                name, record["key"], "cache", self._clock() - started, record.get("seconds", 0.0)
            )
        )
        if record.get("timing"):
            self._emit(PieceTimed(name, record["key"], tuple(record["timing"])))
        return call

    @property
    def has_refused(self) -> bool:
        """Whether anything that others made was found to be of no use here."""
        return bool(self._refused)

    def is_refused(self, piece: Piece) -> bool:
        """Whether what others make of a piece was found to be of no use here."""
        return self.has_refused and not self._refused.isdisjoint(self._compilers.digests(piece))

    # -- saving ----------------------------------------------------------------

    def save(
        self, piece: Piece, compiler_name: str, key: Key, done: JobResult
    ) -> dict[str, Any] | None:
        """Publish what a worker compiled under its key, and return its record."""
        payload = self._storage.publish(
            key.digest,
            {
                "kind": "piece",
                "compiler": compiler_name,
                "details": dict(done.details),
                "seconds": done.seconds,
                "parts": key.parts,
                "piece": piece.to_json(),
                "verification": done.verify,
                "timing": list(done.timing) if done.timing else None,
                **({"source": dict(done.source)} if done.source else {}),
            },
            {label: _PathOf(path) for label, path in done.files.items()},
        )
        return _record_of(key.digest, payload)

    def load_unsaved(self, compiler_name: str, done: JobResult) -> CompiledCallable:
        """Return what a worker compiled and no tier could keep (a full disk, say).

        Its files are copied to a folder that lives as long as this process.

        Raises:
            PrecastError: They cannot be loaded here.
        """
        import shutil
        from pathlib import Path

        from precast.cache.scratch import OwnFolder

        self._unsaved.append(OwnFolder("kept"))
        folder = Path(self._unsaved[-1].make())
        files = {name: shutil.copy(path, str(folder / name)) for name, path in done.files.items()}
        return _open(self._compilers.make(compiler_name), done.details, files)

    def discard(self, record: Mapping[str, Any], *, with_code: bool) -> None:
        """Forget what a record stands for, and the parts that it has, in each tier.

        Args:
            record: Of an artifact; of an eager piece there is nothing to forget.
            with_code: Remove the code too: whatever else names it must not run it.
        """
        for part in record.get("details", {}).get("records", ()):
            self.discard(part, with_code=with_code)
        if "key" not in record:
            return
        self._storage.discard(record["key"])
        if with_code:
            files, entry = record["files"], record["details"].get("entry")
            # Files beside the code proper may be those of right pieces as well.
            self._storage.discard_blobs([files[entry]] if entry in files else files.values())

    def remove_unsaved(self) -> None:
        """Remove the files that no tier took; what was loaded from there stays loaded."""
        while self._unsaved:
            self._unsaved.pop().close()


def _open(
    compiler: CompilerInterface, details: Mapping[str, Any], paths: Mapping[str, str]
) -> CompiledCallable:
    try:
        return compiler.load(details, paths, None)
    except PrecastError:
        raise
    except Exception as error:
        # A compiler is somebody else's code, and so is the system's loader: they raise anything.
        raise ArtifactUnopenedError(compiler.name, in_words(error)) from error


def _record_of(key: str, manifest: Mapping[str, Any]) -> dict[str, Any] | None:
    try:
        record = {
            "key": key,
            "compiler": manifest["compiler"],
            "details": manifest["details"],
            "files": manifest["files"],
            "seconds": manifest["seconds"],
            "timing": manifest.get("timing"),
        }
        if manifest["kind"] == "parts":
            record |= {"kind": "parts", "reason": manifest["reason"]}
        return {**record, "unsigned": True} if is_unsigned(manifest) else record
    except KeyError:
        return None  # Another format: a miss.


def _pickle_reason(compiler: str) -> Reason:
    return Reason(
        "untrusted",
        f"an artifact of {compiler} is not used: loading it unpickles, and nobody signed it",
        "Have it signed by a trusted key (`signing_key` where it is published); "
        "`allow_unsigned` does not admit it",
    )


class _PathOf:
    """A path as `os.PathLike`, which tells the storage a file from bytes."""

    __slots__ = ("_path",)

    def __init__(self, path: str) -> None:
        self._path = path

    def __fspath__(self) -> str:
        return self._path
