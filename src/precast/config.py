"""What a user may set: frozen plain data, checked on creation, and where each value came from.

The only module that reads environment variables and configuration files. It does not choose
compilers or caches, and does not import torch: names are turned into objects by `plugins.py`, and
`api.py` joins the parts.

Precedence: argument, environment (`PRECAST_*`), `[tool.precast]` in pyproject.toml, user file
(`~/.config/precast/config.toml`), default.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress

from precast.errors import ConfigError
from precast.values import Value

TYPE_CHECKING = False  # As in `values.py`: `typing` and `pathlib` are too dear to import here.
if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any, ClassVar, Literal


class Setting(Value, kw_only=True):
    """The rule of one field: what it accepts, in words and as a check.

    `in_key`: another value asks for another assembly. Limits, cache, background and monitoring do
    not. The key of a *piece* holds no setting at all: its text shows the cut, and the compiler's
    identity its options, so that pieces are shared between configurations.
    """

    wanted: str
    accepts: Callable[[Any], bool]
    remedy: str = "Leave it out for the default"
    in_key: bool = False


def _flag(in_key: bool = False) -> Setting:
    return Setting(
        wanted="True or False",
        accepts=lambda value: isinstance(value, bool),
        remedy="Write true or false (1 or 0 in the environment)",
        in_key=in_key,
    )


def _choice(*names: str, in_key: bool = False) -> Setting:
    return Setting(
        wanted="one of " + ", ".join(map(repr, names)),
        accepts=lambda value: isinstance(value, str) and value in names,
        in_key=in_key,
    )


_PATHS = (str, os.PathLike)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_named(value: object) -> bool:
    """Tell a name or an object from an empty name or a number."""
    return value != "" and not isinstance(value, (bool, int, float))


def _is_list_of_names(value: object) -> bool:
    """Tell a path or text, or several, from anything else."""
    several = value if isinstance(value, (tuple, list)) else (value,)
    return bool(several) and all(one != "" and isinstance(one, _PATHS) for one in several)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


#: One rule for each field of `CompilationConfig`.
SETTINGS: dict[str, Setting] = {
    "use_inductor": _flag(in_key=True),
    "compilation_level": _choice("none", "full", "piecewise", in_key=True),
    "disable_compile_cache": _flag(),
    "cache_dir": Setting(
        wanted="a path or None",
        accepts=lambda value: value is None or (_is_named(value) and isinstance(value, _PATHS)),
        remedy="Give a folder that this user may write, or leave it out",
    ),
    "bundle": Setting(
        wanted="a path, several as a tuple or separated by commas, or None",
        accepts=lambda value: value is None or _is_list_of_names(value),
        remedy="Give files that `precast bundle create` wrote",
    ),
    "signing_key": Setting(
        wanted="the path of a private key, or None",
        accepts=lambda value: value is None or (_is_named(value) and isinstance(value, _PATHS)),
        remedy="Make one: precast keys generate FILE",
    ),
    "trusted_keys": Setting(
        wanted="public keys or paths of them, as a tuple or separated by commas",
        accepts=lambda value: value == () or _is_list_of_names(value),
        remedy="Write each as `ed25519:<base64>`, or as the path of its .pub file",
    ),
    "allow_unsigned": _flag(),
    "cache_url": Setting(
        wanted="tiers with commas between, such as 'disk,redis://host/0', or None",
        accepts=lambda value: value is None or (isinstance(value, str) and value.strip() != ""),
        remedy="Leave it out for the disk alone",
    ),
    "cache_max_bytes": Setting(
        wanted="a positive number of bytes or None",
        accepts=lambda value: value is None or (_is_whole(value) and value > 0),
        remedy="Write whole bytes, such as 20 * 2**30, or None for no limit",
    ),
    "cache_max_age": Setting(
        wanted="a positive number of seconds or None",
        accepts=lambda value: value is None or (_is_number(value) and value > 0),
        remedy="Write seconds, such as 90 * 86400, or None for no limit",
    ),
    "lease_wait": Setting(
        wanted="a number of seconds of at least 0, or None",
        accepts=lambda value: value is None or (_is_number(value) and 0 <= value < float("inf")),
        remedy="Write 0 to wait for nobody, or None to wait as long as a compile may take",
    ),
    "failure_memory": Setting(
        wanted="a number of seconds of at least 0",
        accepts=lambda value: _is_number(value) and value >= 0,
        remedy="Write 0 to try failed pieces at every start",
    ),
    "max_compile_time": Setting(
        wanted="a positive number of seconds",
        accepts=lambda value: _is_number(value) and 0 < value < float("inf"),
        remedy="Give a large number to wait without a limit in practice",
    ),
    "compiler": Setting(
        wanted="the name of a compiler, or an object with CompilerInterface",
        accepts=lambda value: value is not None and _is_named(value),
        remedy="Write 'auto' to have one chosen for each piece",
        in_key=True,
    ),
    "mode": _choice("blocking", "progressive", "cache_only"),
    "max_compile_memory": Setting(
        wanted="a positive number of bytes or None",
        accepts=lambda value: value is None or (_is_whole(value) and value > 0),
        remedy="Write whole bytes, such as 8 * 2**30, or None for no limit",
    ),
    "split": Setting(
        wanted="None, the name of a rule, or an object such as SplitAtLayers()",
        accepts=lambda value: value is None or _is_named(value),
        in_key=True,
    ),
    "dynamic_shapes": Setting(
        wanted="None, or a dict, tuple or list as torch.export takes it",
        accepts=lambda value: value is None or isinstance(value, (dict, tuple, list)),
        remedy="Leave it out to have every size of an input dynamic that can be",
        in_key=True,
    ),
    "passes": Setting(
        wanted="names of passes, with commas between or as a tuple, pass objects, or None",
        accepts=lambda value: value is None or isinstance(value, (str, tuple, list)),
        remedy="Write () or 'off' for none; docs/passes.md has the names",
    ),
    "dump_passes": Setting(
        wanted="a path or None",
        accepts=lambda value: value is None or (_is_named(value) and isinstance(value, _PATHS)),
        remedy="Give a folder for graphs before and after each pass",
    ),
    "compile_threads": Setting(
        wanted="a whole number of at least 1, or None",
        accepts=lambda value: value is None or (_is_whole(value) and value >= 1),
        remedy="Leave it out to use the cores that this process may use",
    ),
    "verify": Setting(
        wanted="True, False or 'sample'",
        accepts=lambda value: isinstance(value, bool) or value == "sample",
        remedy="Write 'sample' to check some of the calls in service too",
    ),
    "verify_every": Setting(
        wanted="a whole number of at least 1",
        accepts=lambda value: _is_whole(value) and value >= 1,
    ),
    "keep_slower": _flag(in_key=True),
    "on_error": _choice("eager", "raise"),
    "revalidate": _choice("background", "never", "always"),
    "max_assemblies": Setting(
        wanted="a whole number of at least 1",
        accepts=lambda value: _is_whole(value) and value >= 1,
    ),
    "record": Setting(
        wanted="a path or None",
        accepts=lambda value: value is None or (_is_named(value) and isinstance(value, _PATHS)),
        remedy="Give a folder for recordings, for `precast report`",
    ),
    "progress": Setting(
        wanted="True, False or None",
        accepts=lambda value: value is None or isinstance(value, bool),
        remedy="Leave it out for a display on a terminal and seldom a line elsewhere",
    ),
}


class CompilationConfig(Value, kw_only=True):
    """The settings of `precast.compile`; docs/settings.md has their meaning.

    Each is checked here, once, so that no later part has to. `vars(config)` holds the settings
    that were given; the others may still come from the environment or a file.

    Raises:
        ConfigError: A value is not usable, or a name is unknown; says which, and what to write.
    """

    use_inductor: bool = True
    compilation_level: Literal["none", "full", "piecewise"] = "piecewise"
    disable_compile_cache: bool = False
    cache_dir: str | os.PathLike[str] | None = None  # None: `default_cache_dir()`.
    bundle: str | os.PathLike[str] | tuple[str | os.PathLike[str], ...] | None = None
    signing_key: str | os.PathLike[str] | None = None  # What is published is signed with it.
    trusted_keys: str | os.PathLike[str] | tuple[str | os.PathLike[str], ...] = ()
    allow_unsigned: bool = False  # Shared tiers and bundles: run code that nobody signed.
    cache_url: str | None = None  # None: "disk". Tiers, nearest first; see docs/cache.md.
    cache_max_bytes: int | None = 20 << 30  # Of the disk tier.
    cache_max_age: float | None = 90 * 86400.0  # Seconds since an artifact's last use.
    lease_wait: float | None = None  # Seconds for another's compile; None: `max_compile_time`.
    failure_memory: float = 86400.0  # Seconds until a failed piece is tried again.
    max_compile_time: float = 600.0  # Seconds for one piece.
    compiler: object = "auto"
    mode: Literal["blocking", "progressive", "cache_only"] = "blocking"
    max_compile_memory: int | None = None  # Bytes of one worker.
    split: object = None  # None: by layers where there are at least four alike, else by ops.
    dynamic_shapes: Any = None  # None: every size that can be.
    passes: Any = None  # None: those that proved worth it. Counts in keys by identities.
    dump_passes: str | os.PathLike[str] | None = None
    compile_threads: int | None = None  # Side by side; None: usable cores, half when progressive.
    verify: Literal["sample"] | bool = True
    verify_every: int = 1000  # With verify="sample": one call in so many.
    keep_slower: bool = False  # Run compiled code also where eager was measured to be faster.
    on_error: Literal["eager", "raise"] = "eager"
    revalidate: Literal["background", "never", "always"] = "background"
    max_assemblies: int = 8  # Compiled signatures of one model; further ones run eager.
    record: str | os.PathLike[str] | None = None  # Folder for recordings of starts.
    progress: bool | None = None  # False: silent.

    settings: ClassVar[dict[str, Setting]] = SETTINGS

    def __post_init__(self) -> None:
        """Check what was given; defaults are right by themselves."""
        for name, value in vars(self).items():
            _check(name, value, "argument")

    def _unknown_field(self, name: str, value: object) -> Exception:
        return _unknown_setting(name, value, "argument")

    def key_settings(self) -> dict[str, Any]:
        """Return the settings that ask for another assembly when they change, by name."""
        return {name: getattr(self, name) for name, rule in SETTINGS.items() if rule.in_key}

    def shown(self) -> dict[str, Any]:
        """Return all settings as they may be shown: without passwords."""
        settings = self.as_dict()
        if self.cache_url is not None:
            settings["cache_url"] = without_secrets(self.cache_url)
        return settings

    def cache_path(self) -> Path:
        """Return the folder of the disk tier: `cache_dir`, or the user's own."""
        from pathlib import Path

        return default_cache_dir() if self.cache_dir is None else Path(self.cache_dir).expanduser()

    def record_path(self) -> Path | None:
        """Return the folder for recordings, None where none is set."""
        if self.record is None:
            return None
        from pathlib import Path

        return Path(self.record).expanduser()

    def dump_path(self) -> str | None:
        """Return the absolute folder for what passes do, None where none is set."""
        if self.dump_passes is None:
            return None
        from pathlib import Path

        return str(Path(self.dump_passes).expanduser().absolute())

    def bundle_paths(self) -> list[str]:
        """Return the bundles to read, in order."""
        return [os.path.expanduser(path) for path in _several(self.bundle)]  # noqa: PTH111

    def trusted_key_sources(self) -> list[str]:
        """Return public keys, and paths of them."""
        return _several(self.trusted_keys)

    def num_compile_workers(self) -> int:
        """Return how many pieces compile side by side.

        `compile_threads`, or the usable cores, or half of them beside a model that serves.
        """
        if self.compile_threads is not None:
            return self.compile_threads
        has_affinity = hasattr(os, "sched_getaffinity")
        cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
        return max(1, cores // 2) if self.mode == "progressive" else cores


class ResolvedConfig(Value):
    """A complete configuration, and for each setting where its value came from.

    `origins` says `argument`, `environment PRECAST_MODE`, the path of a file, or `default`.
    """

    config: CompilationConfig
    origins: dict[str, str]
    is_disabled: bool = False  # PRECAST_DISABLE: everything runs eager.


def resolve_config(
    config: CompilationConfig | None,
    overrides: Mapping[str, object],
    *,
    environ: Mapping[str, str],
    pyproject: Path | None,
    user_file: Path | None,
) -> ResolvedConfig:
    """Join all sources of settings into one configuration.

    Costs microseconds where no file exists. A file that cannot be read counts as absent: it must
    not stop a model.

    Args:
        config: Settings as an object; those it was given count as arguments.
        overrides: Settings as arguments; they win over `config`.
        environ: Usually `os.environ`. Variables that are no setting are not ours to judge.
        pyproject: A pyproject.toml to look for `[tool.precast]` in, or None.
        user_file: A TOML file whose top level holds settings, or None.

    Raises:
        ConfigError: A value is not usable or a name unknown; says where it was read.
    """
    sources = [
        ("argument", {**(vars(config) if config is not None else {}), **overrides}),
        *((f"environment {_variable(name)}", {name: value}) for name, value in _given_in(environ)),
        (str(pyproject), _read_toml(pyproject, "tool", "precast")),
        (str(user_file), _read_toml(user_file)),
    ]
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for origin, settings in sources:
        for name, value in settings.items():
            if name not in SETTINGS:
                raise _unknown_setting(name, value, origin)
            _check(name, value, origin)
            if name not in values:
                values[name] = value
                origins[name] = origin
    return ResolvedConfig(
        CompilationConfig(**values),
        {name: origins.get(name, "default") for name in SETTINGS},
        is_disabled=is_switched_off(environ),
    )


def is_switched_off(environ: Mapping[str, str] | None = None) -> bool:
    """Whether `PRECAST_DISABLE` is set, in this process's environment or another one."""
    return _as_bool((os.environ if environ is None else environ).get("PRECAST_DISABLE", "")) is True


def read_config(config: CompilationConfig | None = None, **overrides: object) -> ResolvedConfig:
    """Return `resolve_config` with this process's environment, project and user files."""
    return resolve_config(
        config,
        overrides,
        environ=os.environ,
        pyproject=find_pyproject(),
        user_file=default_user_file(),
    )


def find_pyproject(start: Path | None = None, max_levels: int = 3) -> Path | None:
    """Return the nearest pyproject.toml of a folder or, up to `max_levels`, of those above it."""
    from pathlib import Path

    with suppress(OSError):  # The working directory may be gone, or closed to us.
        folder = start or Path.cwd()
        for candidate in (folder, *list(folder.parents)[:max_levels]):
            if (candidate / "pyproject.toml").is_file():
                return candidate / "pyproject.toml"
    return None


def default_user_file(environ: Mapping[str, str] | None = None) -> Path | None:
    """Return where the user's own settings lie, whether or not the file exists."""
    folder = _user_folder("XDG_CONFIG_HOME", ".config", environ)
    return folder / "precast" / "config.toml" if folder else None


def default_cache_dir(environ: Mapping[str, str] | None = None) -> Path:
    """Return the disk tier's folder: `PRECAST_CACHE_DIR`, else `precast` in the user's cache.

    A user without a home gets a folder of their own among the temporary files.
    """
    from pathlib import Path

    environ = os.environ if environ is None else environ
    if given := environ.get("PRECAST_CACHE_DIR"):
        return Path(given).expanduser()
    if folder := _user_folder("XDG_CACHE_HOME", ".cache", environ):
        return folder / "precast"
    import tempfile

    return Path(tempfile.gettempdir()) / f"precast-{os.getuid()}"


def without_secrets(chain: str) -> str:
    """Return a chain of URLs with `***` where a password, a key or a token stands."""
    shown = []
    for part in chain.split(","):
        head, question, query = part.partition("?")
        scheme, slashes, rest = head.partition("://")
        user, at, place = rest.rpartition("@")
        if at:
            head = f"{scheme}{slashes}{user.partition(':')[0]}:***@{place}"
        pairs = [
            f"{pair.partition('=')[0]}=***"
            if any(word in pair.lower() for word in ("key", "password", "secret", "token"))
            else pair
            for pair in query.split("&")
        ]
        shown.append(head + question + "&".join(pairs))
    return ",".join(shown)


def _user_folder(variable: str, name: str, environ: Mapping[str, str] | None) -> Path | None:
    from pathlib import Path

    environ = os.environ if environ is None else environ
    given = environ.get(variable)
    if given and Path(given).is_absolute():  # The XDG specification ignores relative paths.
        return Path(given)
    try:
        return Path(environ.get("HOME") or Path.home()) / name
    except RuntimeError:  # A user id without an entry, as containers have them.
        return None


def _variable(name: str) -> str:
    return f"PRECAST_{name.upper()}"


def _given_in(environ: Mapping[str, str]) -> list[tuple[str, Any]]:
    """Find settings in the environment; an empty variable counts as absent.

    Other `PRECAST_*` names are left alone: clusters put `PRECAST_SERVICE_HOST` and the like there.
    """
    texts = ((name, environ.get(_variable(name), "")) for name in SETTINGS)
    return [(name, _parse(text, SETTINGS[name])) for name, text in texts if text]


def _parse(text: str, rule: Setting) -> Any:
    """Read a variable's text as the first kind of value that the setting accepts."""
    readings: list[Any] = [None] if text.lower() == "none" else []
    if (truth := _as_bool(text)) is not None:
        readings.append(truth)
    for read in (int, float):
        with suppress(ValueError):
            readings.append(read(text))
    return next((value for value in readings if rule.accepts(value)), text)


def _as_bool(text: str) -> bool | None:
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    return False if text.lower() in ("0", "false", "no", "off") else None


def _read_toml(path: Path | None, *tables: str) -> dict[str, Any]:
    """Return a table of a TOML file; empty where the file or the table is missing."""
    if path is None:
        return {}
    try:
        content = path.read_bytes()
    except OSError:
        return {}
    # Most projects have a pyproject.toml without a word about us: do not pay for a parser.
    if tables and tables[-1].encode() not in content:
        return {}
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        found: Any = tomllib.loads(content.decode())
    except ValueError as error:
        raise ConfigError(
            "/".join(tables) or "user file", str(error), "valid TOML", "Mend the file", str(path)
        ) from error
    for table in tables:
        found = found.get(table, {})
    if not isinstance(found, dict):
        raise ConfigError(
            "/".join(tables),
            found,
            "a table",
            "Write `[tool.precast]` and settings below it",
            str(path),
        )
    return found


def _several(value: Any) -> list[str]:
    """Return a setting's paths or texts: one by one, or separated by commas in one text."""
    if value is None:
        return []
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return [os.fspath(one) for one in (value if isinstance(value, (tuple, list)) else (value,))]


def _check(name: str, value: object, origin: str) -> None:
    rule = SETTINGS[name]
    if not rule.accepts(value):
        raise ConfigError(name, value, rule.wanted, rule.remedy, origin)


def _unknown_setting(name: str, value: object, origin: str) -> ConfigError:
    import difflib

    near = difflib.get_close_matches(name, SETTINGS, n=1)
    remedy = f"Did you mean {near[0]!r}?" if near else "Settings are " + ", ".join(SETTINGS)
    return ConfigError(name, value, "the name of a setting", remedy, origin)
