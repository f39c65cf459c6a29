"""What must hold for an assembly to be right, as data: recorded when a model is captured.

A `Contract` names places in the model and what was found there; this page also says how each
kind of thing is written down: values, code, tensors, hooks, the state of the process. Capture
fills it (`capture/guards.py`); a warm start checks it and never writes one (`binding.py`).

Deliberately without Dynamo: guards are data, and a guard that cannot be written as data
makes no contract.
"""

from __future__ import annotations

import hashlib
import sys
import types
from collections.abc import Mapping
from typing import Any

CONTRACT_VERSION = 3
#: The condition of a call check that is about gradients.
NO_GRADIENTS = "no argument records gradients"


class Unrecordable(Exception):  # noqa: N818 - a finding that is answered, not an error that is shown.
    """A value or a guard that cannot be written as data; says which."""


class Contract:
    """Everything that must hold for an assembly to be right, as plain data.

    `nodes` is a table of places: `[parent, step, key]`. Steps: "a" (attribute), "g" (attribute,
    past the class's `__getattribute__`), "i" (item), "k" (nth key), "v" (nth value), "t" (type
    of), "n" (length). Parents -1, -2 and -3 are the roots `L` (the function's bound locals: the
    model, closure cells), `G` (globals) and `T` (a class).
    `checks` is a list of `[node, kind, payload]`. `weights` are the nodes of the tensors
    that the execution code gets bound, `specs` theirs. `hooks` are the forward hooks of
    sub-modules that had any (`hooks_of`).
    """

    __slots__ = (
        "checks",
        "code",
        "files",
        "hooks",
        "imports",
        "nodes",
        "specs",
        "state",
        "weights",
    )

    def __init__(
        self,
        *,
        nodes: list[list[Any]],
        checks: list[list[Any]],
        weights: list[int],
        specs: list[list[Any]],
        code: list[list[str]],
        files: list[list[str]],
        imports: dict[str, str],
        state: dict[str, Any],
        hooks: dict[str, Any],
    ) -> None:
        self.nodes = nodes
        self.checks = checks
        self.weights = weights
        self.specs = specs
        self.code = code
        self.files = files
        self.imports = imports
        self.state = state
        self.hooks = hooks

    def to_json(self) -> dict[str, Any]:
        """Return the contract as JSON data."""
        return {
            "version": CONTRACT_VERSION,
            **{name: getattr(self, name) for name in self.__slots__},
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Contract:
        """Read what `to_json` wrote; a KeyError says that it was another format."""
        if data["version"] != CONTRACT_VERSION:
            raise KeyError("version")
        return Contract(**{name: data[name] for name in Contract.__slots__})

    def node_name(self, index: int) -> str:
        """Return the expression that a node stands for, for a person."""
        if index < 0:
            return ""
        parent, step, key = self.nodes[index]
        base = self.node_name(parent)
        if parent < 0:
            return str(key)
        match step:
            case "a" | "g":
                return f"{base}.{key}"
            case "i":
                return f"{base}[{key!r}]"
            case "k":
                return f"list({base})[{key}]"
            case "v":
                return f"list({base}.values())[{key}]"
            case "t":
                return f"type({base})"
        return f"len({base})"


# ---------------------------------------------------------------------------
# Values as data


def encode(value: Any) -> Any:
    """Return JSON data that equals another value's exactly when both mean the same.

    Raises:
        Unrecordable: The value has an identity that no text can carry.
    """
    kind = type(value)
    if value is None or kind is int or kind is str:
        return value
    if kind is bool:
        return ["bool", value]  # Or True would equal 1.
    if kind is float:
        # Also tells 0.0 from -0.0 and 1.0 from 1, and NaN equals itself.
        return ["float", value.hex()]
    if kind in (tuple, list):
        return [kind.__name__, *map(encode, value)]
    if kind is dict:
        return ["dict", *([encode(key), encode(item)] for key, item in value.items())]
    if kind in (set, frozenset):
        return [kind.__name__, *sorted((encode(item) for item in value), key=repr)]
    if kind in (bytes, complex, slice, range) or value is Ellipsis or value is NotImplemented:
        return [kind.__name__, repr(value)]
    if isinstance(value, type):
        name = f"{value.__module__}:{value.__qualname__}"
        # The order of a named tuple's fields is in no code that Dynamo of torch 2.11 follows.
        fields = getattr(value, "_fields", None) if issubclass(value, tuple) else None
        return ["type", name, list(fields)] if fields else ["type", name]
    if kind is types.ModuleType:
        return ["module", value.__name__]
    if kind is types.FunctionType:
        return ["function", f"{value.__module__}:{value.__qualname__}", digest_code(value.__code__)]
    if kind is types.CodeType:
        return ["code", digest_code(value)]
    if kind is types.MethodType and isinstance(value.__self__, type):
        return ["classmethod", encode(value.__self__), value.__name__, encode(value.__func__)]
    if kind is types.MethodType:
        return ["method", encode(value.__func__)]
    if kind in (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType):
        return ["builtin", f"{getattr(value, '__module__', '')}:{value.__qualname__}"]
    module = kind.__module__
    if module == "torch" and kind.__name__ in (
        "dtype",
        "device",
        "layout",
        "memory_format",
        "Size",
    ):
        return [kind.__name__, str(value)]
    if "enum" in sys.modules and isinstance(value, sys.modules["enum"].Enum):
        return ["enum", f"{module}:{kind.__qualname__}.{value.name}"]
    if module.startswith("torch._ops"):
        return ["op", str(value)]
    raise Unrecordable(f"a {module}.{kind.__qualname__} cannot be written as data")


def decode(data: Any) -> Any:
    """Return the object that `encode` described, for kinds that name one.

    Raises:
        LookupError: It is not there, or the data describe no object.
    """
    if not isinstance(data, list):
        return data
    kind = data[0]
    match kind:
        case "bool":
            return bool(data[1])
        case "float":
            return float.fromhex(data[1])
        case "tuple":
            return tuple(map(decode, data[1:]))
        case "list":
            return list(map(decode, data[1:]))
        case "dict":
            return {decode(key): decode(value) for key, value in data[1:]}
        case "module":
            return _module(data[1])
        case "type" | "function" | "builtin" | "enum":
            module_name, _, qualname = data[1].partition(":")
            found: Any = _module(module_name or "builtins")
            try:
                for name in qualname.split("."):
                    found = getattr(found, name)
            except AttributeError as error:
                raise LookupError(data[1]) from error
            return found
        case "classmethod":
            try:
                return getattr(decode(data[1]), data[2])
            except AttributeError as error:
                raise LookupError(repr(data)) from error
        case "dtype" | "layout" | "memory_format":
            return getattr(_module("torch"), data[1].removeprefix("torch."))
        case "device":
            return _module("torch").device(data[1])
    raise LookupError(repr(data))


def _module(name: str) -> Any:
    from importlib import import_module

    try:
        return sys.modules.get(name) or import_module(name)
    except ImportError as error:
        raise LookupError(name) from error


# ---------------------------------------------------------------------------
# Code and its files

# Modules of torch and the standard library's builtins are fixed by the torch and Python
# builds, which are in the key: what tracing read of them is not checked again.
_FIXED_ROOTS = ("torch", "builtins", "functools", "operator", "math", "collections", "typing")
_STANDARD_LIBRARY = sys.stdlib_module_names


def digest_code(code: types.CodeType) -> str:
    """Return a digest of what a code object does; where it stands in its file is left out."""
    digest = hashlib.sha256()
    _feed_code(digest, code)
    return digest.hexdigest()


def _feed_code(digest: Any, code: types.CodeType) -> None:
    digest.update(code.co_code)
    digest.update(
        repr(
            (
                code.co_names,
                code.co_varnames,
                code.co_freevars,
                code.co_cellvars,
                code.co_flags,
                code.co_argcount,
                code.co_posonlyargcount,
                code.co_kwonlyargcount,
                getattr(code, "co_exceptiontable", b""),
            )
        ).encode()
    )
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            _feed_code(digest, constant)
        elif isinstance(constant, frozenset):
            digest.update(repr(sorted(map(repr, constant))).encode())
        else:
            digest.update(f"{type(constant).__name__}:{constant!r}".encode())


def find_code(
    path: str,
    function: types.FunctionType | None = None,
    places: list[tuple[Any, Any, Any]] | None = None,
) -> types.CodeType | None:
    """Follow a path such as `package.module:Class.forward/func` to the code it names now.

    `places` gets (holder, key, value) of every name on the way, for `Binding`.

    `@` is the captured function itself. After the name, each `/step` unwraps: `fget`,
    `__wrapped__`, `__func__`, `func` (of a partial), `cell:NAME` (a closure's cell).
    """
    where, _, steps = path.partition("/")
    module_name, _, qualname = where.partition(":")
    found: Any = function if where == "@" else sys.modules.get(module_name)
    for name in qualname.split(".") if qualname else ():
        if found is None:
            return None
        # A class's descriptor itself: `getattr` would have unwrapped it already.
        holder = getattr(found, "__dict__", {})
        is_class = isinstance(found, type)
        found = holder.get(name) if is_class else getattr(found, name, None)
        if places is not None and name in holder:
            places.append((holder, name, holder[name]))
    for step in steps.split("/") if steps else ():
        found = unwrap(found, step)
    code = getattr(found, "__code__", None)
    return code if isinstance(code, types.CodeType) else None


def unwrap(value: Any, step: str) -> Any:
    """Take one step into a wrapped function; None where there is nothing to take."""
    if step.startswith("cell:"):
        code = getattr(value, "__code__", None)
        names = getattr(code, "co_freevars", ())
        if step[5:] not in names:
            return None
        try:
            return value.__closure__[names.index(step[5:])].cell_contents
        except ValueError:  # An empty cell.
            return None
    return getattr(value, step, None)


_file_digests: dict[tuple[str, int, int], str] = {}


def file_digest(module_name: str) -> str:
    """Return the digest of a module's source file, "" where it has none."""
    import os

    path = getattr(sys.modules.get(module_name), "__file__", None)
    if not path:
        return ""
    try:
        status = os.stat(path)  # noqa: PTH116 - pathlib costs a warm start its import.
        # The cache of a pure function: equal stat, equal bytes.
        known = (path, status.st_mtime_ns, status.st_size)
        if known not in _file_digests:
            with open(path, "rb") as file:  # noqa: PTH123 - as above.
                _file_digests[known] = hashlib.sha256(file.read()).hexdigest()
        return _file_digests[known]
    except OSError:
        return ""


def is_fixed(module_name: str) -> bool:
    """Whether a module's contents are settled by the torch and Python builds in the key."""
    return module_name.partition(".")[0] in _FIXED_ROOTS


def has_fixed_code(module_name: str) -> bool:
    """Whether a module's functions are settled by the builds; its variables may not be."""
    root = module_name.partition(".")[0]
    return root in _FIXED_ROOTS or root in _STANDARD_LIBRARY


# ---------------------------------------------------------------------------
# State of the process and of a model's parts


def ambient_state() -> dict[str, Any]:
    """Return the settings of this process and thread that change a model's result."""
    import torch

    state: dict[str, Any] = {
        "default_dtype": str(torch.get_default_dtype()),
        "default_device": str(
            getattr(sys.modules.get("torch.utils._device"), "CURRENT_DEVICE", None)
        ),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "function_modes": torch._C._len_torch_function_stack(),
        "dispatch_modes": torch._C._len_torch_dispatch_stack(),
        "autocast": autocast_state(),
        "sdp": [
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
            torch.backends.cuda.cudnn_sdp_enabled(),
        ],
        "mkldnn": torch._C._get_mkldnn_enabled(),
    }
    if torch.backends.cuda.is_built():
        state["tf32"] = [
            torch.backends.cuda.matmul.allow_tf32,
            torch.backends.cudnn.allow_tf32,
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
            torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
        ]
    return state


def autocast_state() -> list[list[str]]:
    """Return (device type, dtype) of every active autocast."""
    import torch

    return [
        [device, str(torch.get_autocast_dtype(device))]
        for device in ("cpu", "cuda")
        if torch.is_autocast_enabled(device)
    ]


def tensor_spec(tensor: Any, gpu: int | None = None) -> list[Any]:
    """What must not change of a bound tensor.

    dtype, shape, strides, device, and that it is a conjugate or a negative view if it is one.

    Args:
        tensor: That is bound.
        gpu: The number of the GPU that the model is on, which is not part of a contract.
    """
    device = str(tensor.device)
    spec = [
        str(tensor.dtype),
        list(tensor.shape),
        list(tensor.stride()),
        "cuda" if device == f"cuda:{gpu}" else device,
    ]
    if tensor.is_conj():
        spec.append("conjugate view")
    if tensor.is_neg():
        spec.append("negative view")
    return spec


def hooks_of(module: Any) -> list[Any]:
    """Return the forward hooks of a sub-module as data, in the order in which they run.

    Tracing went through them, and Dynamo's guards leave out which ones they were.

    Raises:
        Unrecordable: One of them is no plain function: it may have a state of its own.
    """
    found: list[Any] = []
    for when, hooks in (("before", module._forward_pre_hooks), ("after", module._forward_hooks)):
        with_kwargs = (
            module._forward_pre_hooks_with_kwargs
            if when == "before"
            else module._forward_hooks_with_kwargs
        )
        for key, hook in hooks.items():
            if type(hook) is not types.FunctionType or hook.__closure__:
                raise Unrecordable(f"the hook {hook!r} is no plain function")
            defaults = encode((hook.__defaults__, hook.__kwdefaults__))
            always = key in module._forward_hooks_always_called
            found.append([when, encode(hook), defaults, key in with_kwargs, always])
    return found
