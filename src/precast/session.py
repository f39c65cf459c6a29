"""What the parts of one compiled model share: configuration, listeners, cache and compilers."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from precast.cache import CacheLoader, CacheStorage, DiskCache, open_cache
from precast.cache.disk import BUCKET
from precast.cache.trust import NO_KEYS, Trust, open_trust
from precast.compilers.chosen import check_compiler, check_saveable
from precast.config import CompilationConfig, read_config
from precast.events import Event, Listeners
from precast.graph.key import HashComputer, explain_misses, hasher_of, toolchain_parts
from precast.manager import CompilerManager
from precast.monitoring.log import LogListener
from precast.monitoring.recorder import Recorder
from precast.monitoring.stats import StatsListener
from precast.passes.chosen import NO_PASSES, choose

if TYPE_CHECKING:
    from pathlib import Path

    from precast.background.service import CompileService
    from precast.cache.interface import CacheInterface
    from precast.monitoring.recording import RecordingWriter

# After a cold start, which took many seconds, or in place of one in mode "cache_only".
_EXPLAIN_BUDGET_S = 0.1


def explain_from(cache_dir: Path, misses: list[dict[str, Any]], budget_s: float) -> None:
    """Find for each miss its cause, among what the disk tier has, in so many seconds at most."""
    from precast.cache.catalog import stored_parts

    explain_misses(misses, stored_parts(DiskCache(cache_dir), time.perf_counter, budget_s))


class Session:
    """What the parts of one compiled model share."""

    def __init__(
        self,
        name: str,
        config: CompilationConfig,
        origins: Mapping[str, str],
        is_disabled: bool,
        listeners: Iterable[Callable[[Event], None]],
    ) -> None:
        self.name = name
        self.config = config
        self.origins = dict(origins)
        self.is_disabled = is_disabled
        log = LogListener()
        self.recorder = Recorder()
        self.recording: RecordingWriter | None = None
        built_in: list[Callable[[Event], None]] = [self.recorder, log]
        may_compile = not is_disabled and config.mode != "cache_only"
        if config.progress is not False and may_compile:
            from precast.monitoring.progress import ProgressListener

            built_in.append(ProgressListener(config.progress, limit_s=config.max_compile_time))
        if not config.disable_compile_cache and not is_disabled:
            built_in.append(self._make_stats())
        folder = None if is_disabled else config.record_path()
        if folder is not None:
            from precast.monitoring.recording import RecordingWriter

            self.recording = RecordingWriter(folder, name, self.recorder, log.note_failed_listener)
            built_in.append(self.recording)
        self.emit = Listeners((*built_in, *listeners), on_failure=log.note_failed_listener)
        self.loader: CacheLoader
        self.storage: CacheStorage
        self.manager: CompilerManager
        is_eager = is_disabled or not config.use_inductor or config.compiler == "eager"
        # Weights are moved only where no thread of ours may be running the model meanwhile.
        is_alone = config.mode != "progressive" and config.verify != "sample"
        self.passes = NO_PASSES if is_eager else choose(config.passes, may_pack=is_alone)
        self.reopen()
        self._hashers: dict[Any, HashComputer] = {}
        self._key_parts: dict[str, dict[str, Any]] = {}

    def reopen(self) -> None:
        """Open the cache and the compilers, anew in a forked process; what was open is let be."""
        self.loader, self.storage = open_cache(
            self.config.cache_path(),
            disabled=self.config.disable_compile_cache,
            emit=self.emit,
            clock=time.perf_counter,
            cache_url=self.config.cache_url,
            further_tiers=_open_bundles(self.config),
            trust=NO_KEYS if self.is_disabled else _open_trust(self.config),
            max_bytes=self.config.cache_max_bytes,
            max_age_s=self.config.cache_max_age,
        )
        self.manager = CompilerManager(
            self.config,
            self.loader,
            self.storage,
            self.emit,
            self._make_service,
            passes=self.passes,
        )

    def _make_stats(self) -> StatsListener:
        """Return what keeps statistics beside the disk tier, for `precast stats`."""
        cache_dir = self.config.cache_path()

        def explain(misses: list[dict[str, Any]]) -> None:
            explain_from(cache_dir, misses, _EXPLAIN_BUDGET_S)

        return StatsListener(str(cache_dir / BUCKET / "stats"), explain)

    @staticmethod
    def for_block(whole: Session, name: str) -> Session:
        """Return a session for a block of a model: the same parts under the block's name."""
        block = object.__new__(Session)
        block.__dict__.update(whole.__dict__)
        block.name = f"{whole.name}.{name}"
        return block

    def share(self, whole: Session) -> None:
        """Use what the whole model's session has opened anew."""
        self.loader, self.storage, self.manager = whole.loader, whole.storage, whole.manager

    def assembly_key(self, fingerprint: str, signature: str, device: str) -> str:
        """Return the key of what serves calls of a signature on a device type."""
        settings = _plain_settings(self.config.key_settings())
        computer, passes = hasher_of(device, self._hashers), self.passes.identities
        key = computer.assembly_key(fingerprint, signature, settings, passes)
        self._key_parts[key.digest] = key.parts
        return key.digest

    def key_parts(self, key: str) -> dict[str, Any]:
        """Return what a key that `assembly_key` returned was made from."""
        return self._key_parts[key]

    def find_key_parts(self, key: str) -> dict[str, Any] | None:
        """Return the same, None for another key."""
        return self._key_parts.get(key)

    def _worker_environment(self) -> dict[str, str]:
        # Inductor writes a loop for the number of threads that its process has.
        environment = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        if self.config.compilation_level != "full":
            # Pieces are compiled side by side; a pool of compile processes in each worker takes
            # longer to start than a piece's few kernels take.
            environment["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
        return environment

    def _make_service(self) -> CompileService:
        from precast.background.limits import NICE, NICE_BESIDE_CALLS
        from precast.background.service import CompileService

        return CompileService(
            num_workers=self.config.num_compile_workers(),
            timeout_s=self.config.max_compile_time,
            memory_bytes=self.config.max_compile_memory,
            emit=self.emit,
            clock=time.perf_counter,
            environment=self._worker_environment(),
            devices=_gpus(),
            nice=NICE_BESIDE_CALLS if self.config.mode == "progressive" else NICE,
        )

    def close(self) -> None:
        """End workers and remove temporary files; give waiting writes a last while."""
        self.manager.close()
        self.manager.stored.remove_unsaved()
        self.storage.close()
        self.loader.close()


def open_session(
    name: str,
    config: CompilationConfig | None,
    settings: Mapping[str, Any],
    listeners: Iterable[Callable[[Event], None]],
) -> Session:
    """Read the configuration and open what one model needs.

    Raises:
        ConfigError: A setting is unknown or not usable.
    """
    resolved = read_config(config, **settings)
    check_compiler(resolved.config.compiler)
    if resolved.config.mode == "progressive":
        check_saveable(resolved.config)
    return Session(name, resolved.config, resolved.origins, resolved.is_disabled, listeners)


def _open_trust(config: CompilationConfig) -> Trust:
    return open_trust(
        signing_key=config.signing_key,
        trusted_keys=config.trusted_key_sources(),
        allow_unsigned=config.allow_unsigned,
    )


def _open_bundles(config: CompilationConfig) -> list[CacheInterface]:
    """Return the bundles that the settings name, as tiers."""
    paths = config.bundle_paths()
    if not paths:
        return []
    from precast.cache.bundle import BundleCache

    return [BundleCache(path, parts_of=toolchain_parts) for path in paths]


def _gpus() -> list[str]:
    """Return the GPUs that compile jobs spread over: those like the one in use."""
    from precast.background.limits import gpu_names

    if not torch.cuda.is_initialized():
        return []
    kind = torch.cuda.get_device_capability()
    count = torch.cuda.device_count()
    if count == 1:
        return []  # Nothing to choose from.
    alike = [n for n in range(count) if torch.cuda.get_device_capability(n) == kind]
    return gpu_names(alike, os.environ.get("CUDA_VISIBLE_DEVICES"))


def _plain_settings(settings: Mapping[str, Any]) -> dict[str, str]:
    """The settings that count in a key, as text; an object counts by its identity or repr."""
    plain = {}
    for name, value in settings.items():
        identity = getattr(value, "identity", None)
        plain[name] = repr(identity() if callable(identity) else value)
    return plain
