"""Names to objects: built-in compilers, splitters and stores, then entry points; loaded on use.

A name is looked up in the table of its kind, then among the entry points of the group
`precast.<kind>`, so that another package adds a compiler by declaring

    [project.entry-points."precast.compilers"]
    mine = "my_package.compiler:MyAdaptor"

Nothing is registered while running: an object may always be given in place of a name. Built-in
names win, so that an installed package cannot quietly replace one.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from precast.errors import ConfigError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

Kind = Literal["compilers", "splitters", "stores"]

#: Built-in names of each kind, as `module:attribute`. The module is imported when a name is used.
BUILT_IN: dict[Kind, dict[str, str]] = {
    "compilers": {
        "eager": "precast.compilers.eager:EagerAdaptor",
        "inductor": "precast.compilers.inductor:InductorAdaptor",
        "inductor_standalone": "precast.compilers.inductor_standalone:InductorStandaloneAdaptor",
        "aot_inductor": "precast.compilers.aot_inductor:AOTInductorAdaptor",
    },
    "splitters": {
        "ops": "precast.split.at_ops:SplitAtOps",
        "layers": "precast.split.at_layers:SplitAtLayers",
        "memory": "precast.split.by_memory:SplitByMemory",
        "compute": "precast.split.by_compute:SplitByCompute",
    },
    "stores": {
        "memory": "precast.cache.memory:MemoryCache",
        "disk": "precast.cache.disk:DiskCache",
        "redis": "precast.cache.redis:RedisCache",
        "rediss": "precast.cache.redis:RedisCache",
        "unix": "precast.cache.redis:RedisCache",
        "s3": "precast.cache.object_store:ObjectStoreCache",
        "gs": "precast.cache.object_store:ObjectStoreCache",
        "az": "precast.cache.object_store:ObjectStoreCache",
        "hf": "precast.cache.object_store:ObjectStoreCache",
        "file": "precast.cache.object_store:ObjectStoreCache",
    },
}

_FIELDS: dict[Kind, str] = {"compilers": "compiler", "splitters": "split", "stores": "cache_url"}


def load_plugin(kind: Kind, name: str) -> Any:
    """Return the class or factory that a name stands for.

    Raises:
        ConfigError: The name is unknown (lists the known and the nearest), or what it stands for
            cannot be imported.
    """
    found = find_plugin(kind, name)
    if found is None:
        raise _unknown_name(kind, name)
    return found


def find_plugin(kind: Kind, name: str) -> Any | None:
    """Return the class or factory that a name stands for, None for an unknown name.

    Raises:
        ConfigError: What it stands for cannot be imported.
    """
    target = BUILT_IN[kind].get(name)
    if target is None:
        target = _entry_point_targets(kind).get(name)
    if target is None:
        return None
    module, _, attribute = target.partition(":")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            _FIELDS[kind],
            name,
            f"loadable from {target}",
            f"Loading it said {str(error)!r}; install what it needs, or choose another",
        ) from error


def check_installed(package: str, requirement: str, *, setting: str, wanted_by: str) -> None:
    """Refuse what needs an optional package that is not there; imports nothing.

    Args:
        package: The name it is imported by.
        requirement: What pip installs it by.
        setting: The setting that asks for it.
        wanted_by: What in the setting's value does.

    Raises:
        ConfigError: Says what to install.
    """
    from importlib.util import find_spec

    if find_spec(package) is None:
        raise ConfigError(
            setting,
            wanted_by,
            f"usable here, which needs the package {package!r}",
            f"Run `pip install {requirement}`, or leave it out",
        )


def known_names(kind: Kind) -> list[str]:
    """Return all names of a kind, built-in ones first."""
    return list(dict.fromkeys([*BUILT_IN[kind], *sorted(_entry_point_targets(kind))]))


def _entry_point_targets(kind: Kind) -> dict[str, str]:
    # Imported late: it costs 20 ms, and only foreign or misspelt names come here.
    from importlib.metadata import entry_points

    found: tuple[EntryPoint, ...] = tuple(entry_points(group=f"precast.{kind}"))
    return {entry.name: entry.value for entry in found}


def _unknown_name(kind: Kind, name: str) -> ConfigError:
    import difflib

    names = known_names(kind)
    near = difflib.get_close_matches(name, names, n=1)
    remedy = f"Did you mean {near[0]!r}?" if near else f"Install the package that brings {name!r}"
    return ConfigError(_FIELDS[kind], name, "one of " + ", ".join(map(repr, names)), remedy)
