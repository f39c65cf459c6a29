"""What every wrapper of a tier says of it: what the tier itself says."""

from __future__ import annotations

TYPE_CHECKING = False  # `typing` itself is too dear to import here.
if TYPE_CHECKING:
    from precast.cache.interface import CacheInterface


class WrappedCache:
    """Base of wrappers that add behaviour to one tier."""

    def __init__(self, tier: CacheInterface) -> None:
        self._tier = tier

    @property
    def name(self) -> str:
        """The tier's."""
        return self._tier.name

    @property
    def is_writable(self) -> bool:
        """The tier's."""
        return self._tier.is_writable

    @property
    def is_in_memory(self) -> bool:
        """The tier's."""
        return self._tier.is_in_memory

    @property
    def is_shared(self) -> bool:
        """The tier's."""
        return self._tier.is_shared

    @property
    def keeps_files(self) -> bool:
        """The tier's."""
        return self._tier.keeps_files
