"""Which of a tier's entries may go, and their removal: old ones, the least used of too many.

A manifest goes when it was not used for longer than allowed, or as the least recently used one
while all together take too much. One that another manifest needs (its `needs`) is used when that
one is. A blob goes when no manifest that stays names it; whoever writes publishes blobs first, so
young blobs without a manifest stay. What is removed is found missing, and that is a miss: readers
are not asked, and what they have mapped stays mapped.

`make_plan` decides and touches nothing; `prune` is the rest, `Collector` does that now and then.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from precast.cache.attempt import report_failure
from precast.cache.lease import Leases
from precast.cache.manifest import complete_payload, decode_manifest, encode_manifest
from precast.cache.names import COLLECTION_KEY
from precast.cache.scratch import sweep_dead_folders
from precast.errors import ArtifactCorruptError
from precast.events import CacheCollected
from precast.values import Value

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from precast.cache.interface import CacheInterface, Entry
    from precast.events import Emit

#: What is younger stays in any case: it may be in use, or half of what a writer publishes.
GRACE_S = 3600.0

#: A tier is collected once in this time by all who share it, however many start and publish.
INTERVAL_S = 6 * 3600.0


class ManifestUse(Value):
    """What decides about one manifest: what it takes, its last use, what it names."""

    key: str
    num_bytes: int
    used_s: float
    digests: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()


class Plan(Value):
    """What may go, and the bytes of all entries before and after."""

    keys: tuple[str, ...]
    digests: tuple[str, ...]
    num_bytes_before: int
    num_bytes_after: int


def make_plan(
    manifests: Iterable[ManifestUse],
    blobs: Iterable[Entry],
    *,
    now_s: float,
    max_bytes: int | None,
    max_age_s: float | None,
    grace_s: float = GRACE_S,
) -> Plan:
    """Return what may go, so that what stays is neither too old nor too much.

    What is younger than `grace_s` stays even where that is too much.

    Args:
        manifests: All of them, or blobs that are named would be taken for orphans.
        blobs: All, listed before the manifests were.
        now_s: By the clock that the entries' times go by.
        max_bytes: Of all entries together; None: any number.
        max_age_s: Since the last use; None: any time.
        grace_s: See above.
    """
    uses = {use.key: use for use in manifests}
    sizes = {blob.name: blob.num_bytes for blob in blobs}
    total = sum(sizes.values()) + sum(use.num_bytes for use in uses.values())
    last_used_s = _last_uses(uses)
    num_users: dict[str, int] = {}
    for use in uses.values():
        for digest in use.digests:
            num_users[digest] = num_users.get(digest, 0) + 1
    young_blobs = {blob.name for blob in blobs if now_s - blob.used_s < grace_s}
    removable = {name for name in sizes if name not in num_users and name not in young_blobs}
    left = total - sum(sizes[name] for name in removable)
    needed = {key for use in uses.values() for key in use.needs}
    dropped: list[str] = []
    # A manifest that needs another was used no later than that one; at a tie it goes first, for
    # it is of no use alone.
    for key in sorted(uses, key=lambda key: (last_used_s[key], key in needed, key)):
        age_s = now_s - last_used_s[key]
        is_old = max_age_s is not None and age_s > max_age_s
        is_too_much = max_bytes is not None and left > max_bytes
        if age_s < grace_s or not (is_old or is_too_much):
            continue
        dropped.append(key)
        left -= uses[key].num_bytes
        for digest in uses[key].digests:
            num_users[digest] -= 1
            if not num_users[digest] and digest in sizes and digest not in young_blobs:
                removable.add(digest)
                left -= sizes[digest]
    return Plan(tuple(dropped), tuple(sorted(removable)), total, left)


def _last_uses(uses: Mapping[str, ManifestUse]) -> dict[str, float]:
    """Return when each manifest was last used, by itself or by one that needs it."""
    last = {key: use.used_s for key, use in uses.items()}
    # Latest first, so that a need of a need is reached in a single walk.
    waiting = sorted(last, key=lambda key: last[key])
    while waiting:
        key = waiting.pop()
        for needed in uses[key].needs:
            if needed in last and last[needed] < last[key]:
                last[needed] = last[key]
                waiting.append(needed)
    return last


class Pruned(Value):
    """What became of one tier: counts, bytes, or why nothing did."""

    tier: str
    num_manifests: int = 0
    num_blobs: int = 0
    num_bytes_before: int = 0
    num_bytes_after: int = 0
    keys: tuple[str, ...] = ()  # Of the manifests that went, or would go.
    skipped: str | None = None


def prune(
    tiers: Sequence[CacheInterface],
    *,
    emit: Emit,
    clock: Callable[[], float] = time.perf_counter,
    max_bytes: int | None,
    max_age_s: float | None,
    grace_s: float = GRACE_S,
    interval_s: float = 0.0,
    is_trial: bool = False,
    is_called_off: Callable[[], bool] = lambda: False,
) -> list[Pruned]:
    """Remove what is too old or too much from each tier that outlives this process.

    One process at a time collects a tier. A tier that fails is reported and left as it is, a whole
    one: nothing is removed before all of it was read. Costs about 50 µs a manifest on a disk.

    Args:
        tiers: Each is looked at by itself; memory and what cannot be written is left out.
        emit: Is told what happens.
        clock: Seconds, for durations.
        max_bytes: Of each tier; None: any number.
        max_age_s: Since the last use; None: any time.
        grace_s: What is younger stays.
        interval_s: A tier whose last collection is not that long ago is left out.
        is_trial: Say what would go, and remove nothing.
        is_called_off: Asked between steps; once true, the rest is left for another time.
    """
    done = []
    for tier in tiers:
        if tier.is_in_memory or not tier.is_writable:
            continue
        started_s = clock()
        try:
            with Leases([tier], emit) as leases:
                if not is_trial and not leases.try_acquire(COLLECTION_KEY):
                    done.append(Pruned(tier.name, skipped="another process collects it"))
                    continue
                pruned = _prune_tier(
                    tier,
                    max_bytes,
                    max_age_s,
                    grace_s,
                    0.0 if is_trial else interval_s,
                    is_trial,
                    is_called_off,
                )
        except Exception as error:  # noqa: BLE001 - tiers are plug-ins, and none may stop a model
            report_failure(emit, tier, "collect", error)
            done.append(Pruned(tier.name, skipped=str(error)))
            continue
        done.append(pruned)
        if pruned.skipped is None and not is_trial:
            freed = pruned.num_bytes_before - pruned.num_bytes_after
            emit(
                CacheCollected(
                    tier.name,
                    pruned.num_manifests,
                    pruned.num_blobs,
                    freed,
                    clock() - started_s,
                )
            )
    if not is_trial:
        sweep_dead_folders()
    return done


def _prune_tier(
    tier: CacheInterface,
    max_bytes: int | None,
    max_age_s: float | None,
    grace_s: float,
    interval_s: float,
    is_trial: bool,
    is_called_off: Callable[[], bool],
) -> Pruned:
    now_s = tier.now_s()
    if interval_s and _was_collected_since(tier, now_s - interval_s):
        return Pruned(tier.name, skipped="it was collected a short time ago")
    # Blobs first: whatever names them was published later, and is then among the manifests.
    blobs = [entry for entry in tier.entries() if not entry.is_manifest]
    manifests = []
    for entry in tier.entries():
        if is_called_off():
            return Pruned(tier.name, skipped="called off")
        if entry.is_manifest and entry.name != COLLECTION_KEY:
            manifests.append(_read_use(tier, entry))
    plan = make_plan(
        manifests,
        blobs,
        now_s=now_s,
        max_bytes=max_bytes,
        max_age_s=max_age_s,
        grace_s=grace_s,
    )
    if not is_trial:
        # Manifests first: a manifest without its blob is looked at for nothing.
        for remove, names in ((tier.delete_manifest, plan.keys), (tier.delete_blob, plan.digests)):
            for name in names:
                if is_called_off():
                    return Pruned(tier.name, skipped="called off")
                remove(name)
        tier.sweep(grace_s)
        tier.write_manifest(COLLECTION_KEY, _stamp(now_s))
    return Pruned(
        tier.name,
        len(plan.keys),
        len(plan.digests),
        plan.num_bytes_before,
        plan.num_bytes_after,
        plan.keys,
    )


def _read_use(tier: CacheInterface, entry: Entry) -> ManifestUse:
    """Return what decides about a manifest; one that is damaged names nothing, being a miss."""
    payload: Mapping[str, Any] = {}
    data = tier.read_manifest(entry.name)
    if data is not None:
        with suppress(ArtifactCorruptError):
            payload = decode_manifest(entry.name, data, f"{tier.name}:{entry.name}")
    needs = payload.get("needs")
    return ManifestUse(
        entry.name,
        entry.num_bytes,
        entry.used_s,
        tuple(set(payload.get("files", {}).values())),
        tuple(str(key) for key in needs) if isinstance(needs, list) else (),
    )


def _stamp(now_s: float) -> bytes:
    payload = {"kind": "collection", "collected_s": now_s}
    return encode_manifest(complete_payload(COLLECTION_KEY, payload, {}))


def _was_collected_since(tier: CacheInterface, since_s: float) -> bool:
    data = tier.read_manifest(COLLECTION_KEY)
    if data is None:
        return False
    try:
        collected_s = float(decode_manifest(COLLECTION_KEY, data, tier.name)["collected_s"])
    except (ArtifactCorruptError, KeyError, TypeError, ValueError):
        return False
    # One from the future is of a clock that was wrong.
    return since_s < collected_s <= tier.now_s() + GRACE_S


class Collector:
    """Prunes tiers now and then, in a thread of low priority, once something was published."""

    def __init__(
        self,
        tiers: Sequence[CacheInterface],
        emit: Emit,
        clock: Callable[[], float],
        *,
        max_bytes: int | None,
        max_age_s: float | None,
        interval_s: float = INTERVAL_S,
        delay_s: float = 1.0,
    ) -> None:
        """Start nothing yet.

        Args:
            tiers: Those that are files of this machine are collected; a server's own limits, or
                `precast cache prune`, care for the others.
            emit: Is told what happens, from the thread.
            clock: Seconds that only go forward.
            max_bytes: Of each tier; None: any number.
            max_age_s: Since the last use; None: any time.
            interval_s: Between two collections of one tier, whoever does them.
            delay_s: Between the publishing and the collection, so that several share one.
        """
        self._tiers = [tier for tier in tiers if tier.keeps_files]
        self._emit = emit
        self._clock = clock
        self._max_bytes = max_bytes
        self._max_age_s = max_age_s
        self._interval_s = interval_s
        self._delay_s = delay_s
        self._looked_s: float | None = None
        self._called_off = threading.Event()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        # At exit, too: a thread that is cut off would leave its lease behind.
        self._stop = weakref.finalize(self, _stop, self._called_off, self._threads)

    def note_publish(self) -> None:
        """Collect soon, unless that was looked into within the interval."""
        with self._lock:
            now_s = self._clock()
            if self._called_off.is_set() or (
                self._looked_s is not None and now_s - self._looked_s < self._interval_s
            ):
                return
            self._looked_s = now_s
            thread = threading.Thread(
                target=_collect,
                args=(
                    self._called_off,
                    self._delay_s,
                    self._tiers,
                    {
                        "emit": self._emit,
                        "clock": self._clock,
                        "max_bytes": self._max_bytes,
                        "max_age_s": self._max_age_s,
                        "interval_s": self._interval_s,
                    },
                ),
                name="precast-collect",
                daemon=True,
            )
            self._threads[:] = [thread]
            thread.start()

    def close(self) -> None:
        """End a collection that runs, and begin no other."""
        self._stop()


def _collect(
    called_off: threading.Event,
    delay_s: float,
    tiers: Sequence[CacheInterface],
    arguments: Mapping[str, Any],
) -> None:
    if called_off.wait(delay_s):
        return
    if sys.platform == "linux":  # Where a thread has a priority of its own.
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
    prune(tiers, **arguments, is_called_off=called_off.is_set)


def _stop(called_off: threading.Event, threads: Sequence[threading.Thread]) -> None:
    called_off.set()
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join()
