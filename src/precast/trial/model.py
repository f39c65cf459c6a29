"""MODEL of the command line: `package.module:factory`, or a directory that transformers wrote.

Looks at nothing but this machine: a directory's weights are local files, never a download. What a
module or factory of the user's raises becomes one sentence, with the line of their code.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys
import traceback
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from precast.errors import ModelError
from precast.values import Value

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import ModuleType

_OWN_FOLDER = str(Path(__file__).parent.parent)


class Call(Value):
    """The arguments of one call of a model."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}  # noqa: RUF012 - never written to.


class LoadedModel(Value):
    """A model ready to be called, in evaluation mode, and the calls that came with it.

    `module` is an `nn.Module`, or a function. `config` is that of transformers where it is theirs.
    """

    module: Any
    name: str
    examples: tuple[Call, ...] = ()
    config: Any = None


def load_model(source: str, dtype: str | None = None, device: str | None = None) -> LoadedModel:
    """Load what MODEL names, with the current directory importable.

    A factory is called without arguments. It returns an `nn.Module`, or a pair of it and example
    inputs: a tensor, a tuple of arguments, a dict of keyword arguments, or a list of such calls.

    Args:
        source: `package.module:factory`, or a directory with a `config.json` and weights.
        dtype: torch's name of the dtype that floating point weights and examples get.
        device: Where they are put.

    Raises:
        ModelError: There is no such thing, or the user's code failed.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        loaded = _load_directory(path, dtype)
    elif ":" in source and not source.startswith(("/", ".")):
        loaded = _load_factory(source)
    else:
        raise ModelError(
            f"{source!r} is neither a directory nor `package.module:factory`",
            "Write app.models:make_model, where make_model() returns an nn.Module, "
            "or the path of a directory that save_pretrained() wrote",
            is_usage=True,
        )
    return _placed(loaded, dtype, device)


# -- a factory ------------------------------------------------------------------


def _load_factory(source: str) -> LoadedModel:
    module_name, _, attribute = source.partition(":")
    if str(Path.cwd()) not in sys.path and "" not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    module = _import(module_name)
    made: Any = module
    for name in attribute.split("."):
        try:
            made = getattr(made, name)
        except AttributeError:
            _refuse_attribute(source, made, name)
    import torch

    if not isinstance(made, torch.nn.Module):
        if not callable(made):
            raise ModelError(
                f"{source} is {_article(type(made).__name__)}, which cannot be called",
                "Name a function that returns an nn.Module",
                is_usage=True,
            )
        try:
            made = made()
        except Exception as error:
            raise failed(f"the factory {source} failed", error, "Mend it") from error
    examples: Any = ()
    if isinstance(made, tuple) and len(made) == 2:
        made, examples = made
    if not isinstance(made, torch.nn.Module) and not hasattr(made, "__code__"):
        raise ModelError(
            f"the factory {source} returned {_article(type(made).__name__)}",
            "It has to return an nn.Module, or a pair of it and example inputs",
        )
    return LoadedModel(made, source, tuple(_as_calls(examples)))


def _import(name: str) -> ModuleType:
    """Import a module of the user's.

    Raises:
        ModelError: There is none of that name, or it cannot be imported.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            _refuse_module(name, error.name)
        raise failed(f"importing {name} failed", error, "Install or mend it") from error
    except Exception as error:
        raise failed(f"importing {name} failed", error, "Mend it") from error


def _refuse_module(name: str, missing: str) -> NoReturn:
    parent, _, last = missing.rpartition(".")
    hint = ""
    if parent and parent in sys.modules:
        searched = list(getattr(sys.modules[parent], "__path__", ()))
        if not searched:
            hint = f"{parent} is a module, not a package"
    else:
        searched = [entry or str(Path.cwd()) for entry in sys.path]
    # Without the standard library: nobody's model is there, and its names are near to much.
    folders = [entry for entry in searched if not _is_standard(entry)]
    names = {found.name for found in pkgutil.iter_modules(folders)}
    near = get_close_matches(last, names | _folders_in(folders), n=1)
    if last == "py" or Path(name).suffix == ".py":
        hint = f"Write {name.removesuffix('.py')} without `.py`"
    elif near:
        hint = f"Did you mean {'.'.join(filter(None, (parent, near[0])))!r}?"
    where = ", ".join(folders[:4] or searched) + (
        f" and {len(folders) - 4} more" if len(folders) > 4 else ""
    )
    raise ModelError(
        f"there is no module {missing!r}" + (f"; looked in {where}" if where else ""),
        hint or "Run the command where it can be imported, or set PYTHONPATH",
        is_usage=True,
    )


def _is_standard(folder: str) -> bool:
    if "site-packages" in folder:
        return False
    return folder.endswith(".zip") or folder.startswith(str(Path(os.__file__).parent))


def _folders_in(folders: Iterable[str]) -> set[str]:
    """Return the folders that are packages without an `__init__.py`."""
    found = set()
    for folder in folders:
        if "site-packages" not in folder and Path(folder).is_dir():
            found |= {
                p.name for p in Path(folder).iterdir() if p.is_dir() and p.name.isidentifier()
            }
    return found


def _refuse_attribute(source: str, owner: Any, name: str) -> NoReturn:
    names = [each for each in dir(owner) if not each.startswith("_")]
    near = get_close_matches(name, names, n=1)
    where = getattr(owner, "__file__", None) or repr(owner)
    raise ModelError(
        f"{source.partition(':')[0]} ({where}) has no {name!r}",
        f"Did you mean {near[0]!r}?" if near else f"It has {', '.join(names[:8]) or 'nothing'}",
        is_usage=True,
    )


def _as_calls(examples: Any) -> list[Call]:
    """Return example inputs as calls; see `load_model` for what they may be."""
    if isinstance(examples, list):
        return [call for example in examples for call in _as_calls(example)]
    if isinstance(examples, dict):
        return [Call((), dict(examples))]
    if isinstance(examples, tuple):
        return [Call(examples, {})] if examples else []
    return [Call((examples,), {})]


def _article(name: str) -> str:
    return f"an {name}" if name[:1].lower() in "aeiou" else f"a {name}"


# -- a directory of transformers --------------------------------------------------


def _load_directory(path: Path, dtype: str | None) -> LoadedModel:
    if not (path / "config.json").is_file():
        has_pipeline = (path / "model_index.json").is_file()
        raise ModelError(
            f"{path} has no config.json",
            "Name the directory of one model in it, or write a factory"
            if has_pipeline
            else "Name a directory that save_pretrained() wrote, or package.module:factory",
            is_usage=True,
        )
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        import transformers
    except ImportError as error:
        raise ModelError(
            "a directory is loaded by transformers, which is not installed",
            "Run pip install 'precast[transformers]'",
            is_usage=True,
        ) from error
    import torch

    transformers.utils.logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
        names = getattr(config, "architectures", None) or ["AutoModel"]
        kind = getattr(transformers, names[0], None)
        if kind is None:
            raise ModelError(
                f"transformers {transformers.__version__} has no class {names[0]!r}, which "
                f"{path / 'config.json'} names",
                "Write a factory that builds it",
                is_usage=True,
            )
        wanted = "auto" if dtype is None else getattr(torch, dtype)
        model = kind.from_pretrained(path, local_files_only=True, dtype=wanted)
    except ModelError:
        raise
    except Exception as error:
        raise failed(
            f"transformers could not load {path}", error, "Check its config.json and weights"
        ) from error
    return LoadedModel(model, str(path), (), model.config)


# -- both ----------------------------------------------------------------------------


def _placed(loaded: LoadedModel, dtype: str | None, device: str | None) -> LoadedModel:
    import torch

    if device is not None:
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ModelError(
                f"device {device!r} cannot be used: {_first_line(error)}",
                "Write cpu, cuda or cuda:1",
                is_usage=True,
            ) from error
    float_dtype = None if dtype is None else getattr(torch, dtype)

    def placed(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            is_cast = float_dtype is not None and value.is_floating_point()
            return value.to(device=device, dtype=float_dtype if is_cast else None)
        if isinstance(value, dict):
            return {key: placed(item) for key, item in value.items()}
        if type(value) in (tuple, list):
            return type(value)(map(placed, value))
        return value

    module = loaded.module
    if isinstance(module, torch.nn.Module):
        module = module.eval()
        if device is not None or float_dtype is not None:
            module = module.to(device=device, dtype=float_dtype)
    examples = tuple(Call(placed(call.args), placed(call.kwargs)) for call in loaded.examples)
    return loaded.replace(module=module, examples=examples)


def failed(what: str, error: BaseException, remedy: str) -> ModelError:
    """Return the error for code of the user's that raised: its line, and what it said."""
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [
        frame
        for frame in frames
        if not frame.filename.startswith((_OWN_FOLDER, "<")) and "importlib" not in frame.filename
    ]
    own = [frame for frame in theirs if "site-packages" not in frame.filename] or theirs
    where = f" at {own[-1].filename}:{own[-1].lineno}, in {own[-1].name}" if own else ""
    last = traceback.format_exception_only(error)[-1].strip()
    return ModelError(f"{what}{where}. {last}", remedy)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
