"""Where compiled code is kept: tiers, and the loader and storage that the rest talks to.

`interface.py` is what a tier must do; `loader.py` reads, `storage.py` writes, and neither ever
stops a model. Keys are made elsewhere (`graph/key.py`), and nothing here knows what an artifact is.
"""

from __future__ import annotations

from precast.cache.disk import DiskCache
from precast.cache.loader import CacheLoader
from precast.cache.memory import MemoryCache
from precast.cache.scratch import ScratchCache
from precast.cache.storage import CacheStorage
from precast.cache.trust import NO_KEYS

TYPE_CHECKING = False  # `typing` itself is too dear to import here.
if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence

    from precast.cache.collect import Collector
    from precast.cache.interface import CacheInterface
    from precast.cache.trust import Trust
    from precast.cache.writer import BackgroundWriter
    from precast.events import Emit

__all__ = ["CacheLoader", "CacheStorage", "DiskCache", "MemoryCache", "ScratchCache", "open_cache"]


def open_cache(
    cache_dir: str | os.PathLike[str],
    *,
    disabled: bool,
    emit: Emit,
    clock: Callable[[], float],
    further_tiers: Sequence[CacheInterface] = (),
    trust: Trust = NO_KEYS,
    cache_url: str | None = None,
    max_bytes: int | None = None,
    max_age_s: float | None = None,
) -> tuple[CacheLoader, CacheStorage]:
    """Return what reads and what writes the cache of one model. Touches no disk yet.

    Args:
        cache_dir: Root of the disk tier. It may be unwritable, or impossible.
        disabled: Use a private directory in its place, so that libraries compiled in this process
            can be opened, and forget everything when the loader is closed. Then `cache_dir` is
            neither read nor written.
        emit: Is told what happens, also by threads of shared tiers.
        clock: Seconds, for durations.
        further_tiers: Asked after the others; left alone where the cache is disabled.
        trust: Signs what is published, and says what of shared tiers may be used.
        cache_url: The tiers after memory, nearest first (`chain.py`); None: the disk alone.
        max_bytes: Of each tier that keeps files here; None: any number. Others are collected by
            their servers, or by `precast cache prune`.
        max_age_s: Since the last use of what is in those tiers; None: any time.

    Raises:
        ConfigError: The chain is not usable.
    """
    scratch: ScratchCache | None = None
    writer: BackgroundWriter | None = None
    read_only: frozenset[str] = frozenset()
    tiers: tuple[CacheInterface, ...]
    if disabled:
        scratch = ScratchCache()
        tiers = (MemoryCache(), scratch)
    elif cache_url is None:
        tiers = (MemoryCache(), DiskCache(cache_dir), *further_tiers)
    else:
        # Imported here, since most starts have no other tier than the disk.
        from precast.cache.chain import open_chain

        chain = open_chain(cache_url, cache_dir, emit, clock)
        tiers = (*chain.tiers, *further_tiers)
        writer, read_only = chain.writer, chain.read_only

    def make_collector() -> Collector:
        from precast.cache.collect import Collector  # Few starts publish.

        return Collector(tiers, emit, clock, max_bytes=max_bytes, max_age_s=max_age_s)

    is_bounded = not disabled and (max_bytes is not None or max_age_s is not None)
    return (
        CacheLoader(tiers, emit, clock, scratch=scratch, trust=trust, writer=writer),
        CacheStorage(
            tiers,
            emit,
            clock,
            trust=trust,
            writer=writer,
            read_only=read_only,
            make_collector=make_collector if is_bounded else None,
        ),
    )
