"""Settings are checked where they are given, and each knows where it came from."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from precast.config import (
    SETTINGS,
    CompilationConfig,
    ResolvedConfig,
    default_cache_dir,
    default_user_file,
    find_pyproject,
    resolve_config,
)
from precast.errors import ConfigError

UNUSABLE = {
    "use_inductor": 1,
    "compilation_level": "half",
    "disable_compile_cache": "yes",
    "cache_dir": "",
    "bundle": ("a.bundle", ""),
    "signing_key": 7,
    "trusted_keys": None,
    "allow_unsigned": "perhaps",
    "cache_url": 3,
    "cache_max_bytes": 0,
    "cache_max_age": -1.0,
    "lease_wait": -1.0,
    "failure_memory": None,
    "max_compile_time": 0,
    "compiler": None,
    "mode": "fast",
    "max_compile_memory": True,
    "split": 3,
    "dynamic_shapes": "all",
    "passes": 3,
    "dump_passes": "",
    "compile_threads": 0,
    "verify": "always",
    "verify_every": 0,
    "keep_slower": "often",
    "on_error": "ignore",
    "revalidate": True,
    "max_assemblies": 1.5,
    "record": 3,
    "progress": "bar",
}


def resolve(
    config: CompilationConfig | None = None,
    environ: dict[str, str] | None = None,
    pyproject: Path | None = None,
    user_file: Path | None = None,
    **overrides: object,
) -> ResolvedConfig:
    return resolve_config(
        config, overrides, environ=environ or {}, pyproject=pyproject, user_file=user_file
    )


def test_every_field_has_a_rule_and_its_default_keeps_it() -> None:
    defaults = CompilationConfig().as_dict()
    assert list(defaults) == list(SETTINGS) == list(UNUSABLE)
    assert all(SETTINGS[name].accepts(value) for name, value in defaults.items())


@pytest.mark.parametrize("name", UNUSABLE)
def test_an_unusable_value_is_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        CompilationConfig(**{name: UNUSABLE[name]})
    assert caught.value.field == name
    assert f"setting {name!r} must be {SETTINGS[name].wanted}" in str(caught.value)
    assert repr(UNUSABLE[name]) in str(caught.value)


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), "600", True])
def test_a_time_limit_is_a_positive_finite_number(value: object) -> None:
    with pytest.raises(ConfigError, match="max_compile_time"):
        CompilationConfig(max_compile_time=value)  # type: ignore[arg-type]


def test_an_unknown_setting_gets_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'compile_threads'"):
        CompilationConfig(compile_thread=4)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="Did you mean 'mode'"):
        resolve(mod="blocking")


@pytest.mark.parametrize("value", [("a", Path("b")), ["a", "b"], "a, b", "a,b,"])
def test_keys_and_bundles_can_be_several(value: object) -> None:
    config = CompilationConfig(bundle=value, trusted_keys=value)  # type: ignore[arg-type]
    assert config.bundle_paths() == ["a", "b"]
    assert config.trusted_key_sources() == ["a", "b"]
    given = resolve(environ={"PRECAST_TRUSTED_KEYS": "ed25519:x,/keys/y.pub"}).config
    assert given.trusted_key_sources() == ["ed25519:x", "/keys/y.pub"]
    assert CompilationConfig().bundle_paths() == []


def test_a_config_is_frozen_and_pickles() -> None:
    config = CompilationConfig(mode="progressive")
    with pytest.raises(AttributeError, match="frozen"):
        config.mode = "blocking"  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(config)) == config


def test_limits_cache_background_and_monitoring_are_not_in_the_key() -> None:
    assert list(CompilationConfig().key_settings()) == [
        "use_inductor",
        "compilation_level",
        "compiler",
        "split",
        "dynamic_shapes",
        "keep_slower",
    ]


def test_precedence_is_argument_environment_project_user_default(tmp_path: Path) -> None:
    pyproject = tmp_path / "pyproject.toml"
    user_file = tmp_path / "config.toml"
    every = {"max_assemblies": 1, "compile_threads": 1, "max_compile_time": 1, "verify": False}
    user_file.write_text("".join(f"{n} = {str(v).lower()}\n" for n, v in every.items()))
    pyproject.write_text(
        "[tool.precast]\nmax_assemblies = 2\ncompile_threads = 2\nmax_compile_time = 2\n"
    )
    environ = {"PRECAST_MAX_ASSEMBLIES": "3", "PRECAST_COMPILE_THREADS": "3"}

    resolved = resolve(None, environ, pyproject, user_file, max_assemblies=4)

    assert resolved.config == CompilationConfig(
        max_assemblies=4, compile_threads=3, max_compile_time=2, verify=False
    )
    origins = {name: where for name, where in resolved.origins.items() if where != "default"}
    assert origins == {
        "max_assemblies": "argument",
        "compile_threads": "environment PRECAST_COMPILE_THREADS",
        "max_compile_time": str(pyproject),
        "verify": str(user_file),
    }


def test_a_config_object_leaves_what_it_does_not_give_to_the_environment() -> None:
    config = CompilationConfig(mode="progressive")
    resolved = resolve(config, {"PRECAST_VERIFY": "0", "PRECAST_MODE": "cache_only"})
    assert resolved.config == CompilationConfig(mode="progressive", verify=False)
    assert resolve(config, mode="blocking").config.mode == "blocking"


@pytest.mark.parametrize(
    ("variable", "text", "value"),
    [
        ("USE_INDUCTOR", "0", False),
        ("USE_INDUCTOR", "True", True),
        ("COMPILATION_LEVEL", "none", "none"),
        ("CACHE_DIR", "1", "1"),
        ("MAX_COMPILE_TIME", "2.5", 2.5),
        ("MAX_COMPILE_MEMORY", "none", None),
        ("COMPILE_THREADS", "1", 1),
        ("PROGRESS", "off", False),
    ],
)
def test_variables_are_read_as_the_kind_of_their_setting(
    variable: str, text: str, value: object
) -> None:
    config = resolve(environ={f"PRECAST_{variable}": text}).config
    assert getattr(config, variable.lower()) == value
    assert type(getattr(config, variable.lower())) is type(value)


def test_a_bad_variable_is_named() -> None:
    with pytest.raises(ConfigError, match="from environment PRECAST_MODE"):
        resolve(environ={"PRECAST_MODE": "fast"})


def test_variables_that_are_no_setting_are_left_alone() -> None:
    environ = {"PRECAST_SERVICE_HOST": "10.0.0.1", "PRECAST_MODE": ""}
    assert resolve(environ=environ).config == CompilationConfig()


@pytest.mark.parametrize(("text", "is_disabled"), [("1", True), ("0", False), ("", False)])
def test_precast_disable_switches_everything_off(text: str, is_disabled: bool) -> None:
    assert resolve(environ={"PRECAST_DISABLE": text}).is_disabled is is_disabled


def test_files_that_cannot_be_read_count_as_absent(tmp_path: Path) -> None:
    resolved = resolve(pyproject=tmp_path, user_file=tmp_path / "none" / "config.toml")
    assert resolved.config == CompilationConfig()


def test_another_projects_file_is_not_parsed(tmp_path: Path) -> None:
    pyproject = tmp_path / "pyproject.toml"
    pyproject.write_text("this is [not TOML")
    assert resolve(pyproject=pyproject).config == CompilationConfig()


@pytest.mark.parametrize("text", ["precast [", "[tool]\nprecast = 3", "[tool.precast]\nmod = 1"])
def test_a_bad_file_is_named(tmp_path: Path, text: str) -> None:
    pyproject = tmp_path / "pyproject.toml"
    pyproject.write_text(text)
    with pytest.raises(ConfigError, match=r"pyproject\.toml"):
        resolve(pyproject=pyproject)


def test_pyproject_is_looked_for_upward(tmp_path: Path) -> None:
    deep = tmp_path / "a" / "b"
    deep.mkdir(parents=True)
    (tmp_path / "pyproject.toml").touch()
    assert find_pyproject(deep) == tmp_path / "pyproject.toml"
    assert find_pyproject(deep, max_levels=1) is None


def test_the_cache_lies_where_the_user_or_the_system_says(tmp_path: Path) -> None:
    home = {"HOME": "/home/me"}
    assert default_cache_dir({"PRECAST_CACHE_DIR": "/x", **home}) == Path("/x")
    assert default_cache_dir({"XDG_CACHE_HOME": "/c", **home}) == Path("/c/precast")
    assert default_cache_dir({"XDG_CACHE_HOME": "c", **home}) == Path("/home/me/.cache/precast")
    assert default_user_file(home) == Path("/home/me/.config/precast/config.toml")
    assert CompilationConfig(cache_dir=tmp_path).cache_path() == tmp_path


def test_a_user_without_a_home_gets_a_temporary_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    assert default_cache_dir({}).name.startswith("precast-")
    assert default_user_file({}) is None


def test_workers_default_to_the_usable_cores() -> None:
    assert CompilationConfig().num_compile_workers() >= 1
    assert CompilationConfig(compile_threads=3).num_compile_workers() == 3


def test_compiling_beside_calls_leaves_them_half_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _pid: set(range(16)), raising=False)
    assert CompilationConfig().num_compile_workers() == 16
    assert CompilationConfig(mode="progressive").num_compile_workers() == 8
    assert CompilationConfig(mode="progressive", compile_threads=3).num_compile_workers() == 3
    monkeypatch.setattr("os.sched_getaffinity", lambda _pid: {0})
    assert CompilationConfig(mode="progressive").num_compile_workers() == 1
