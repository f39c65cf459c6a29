"""What a warm start loads: everything needed to rebuild a compiled model, and how it is bound.

An `Assembly` is plain data: contract, call check, entry code, execution code, and a record of
each artifact. `open_assembly` makes it callable without tracing, without a graph and without
a pickle; `LoadedAssembly.bind` ties it to one model's weights.
"""

from __future__ import annotations

import base64
import builtins
import linecache
import marshal
import math
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from precast.binding import CAPTURED_AGAIN, Binding, bind
from precast.contract import Contract, decode, encode
from precast.errors import ArtifactIncompatibleError, Reason
from precast.machine import python_identity
from precast.runtime.gpu import on_gpu, run_on
from precast.runtime.packed import CannotPack, pack
from precast.runtime.slot import SlotTable
from precast.stitch import SerializableFunction

ASSEMBLY_VERSION = 4
_FIELDS = (
    "call_check",
    "contract",
    "entry",
    "example",
    "execution",
    "gpu",
    "groups",
    "mutates",
    "packs",
    "passes",
    "pieces",
    "rest",
    "seconds",
    "slots",
    "texts",
)


class Assembly:
    """A compiled model for one call signature, as plain data.

    `pieces` are the unique pieces' records, `slots` says which of them each slot runs (None: the
    slot was inlined). `groups` are the positions of each slot's weights in the contract's list,
    `rest` the weights that the execution code takes by name. Positions past that list's end are
    tensors of `packs`: each stacks the weights at the positions that it names. `passes` says what
    passes did to the whole graph. `gpu` is None for a model that is on none, "any", or the number
    of the one that its contract names. `example` is the shape of each tensor of the captured call,
    `texts` are the digests of the pieces' texts, for revalidation. `mutates`: a call writes into
    its arguments or the model.
    """

    __slots__ = _FIELDS

    call_check: Mapping[str, Any]
    contract: Mapping[str, Any]
    entry: Mapping[str, Any]
    example: Sequence[Sequence[int]]
    execution: Mapping[str, Any]
    gpu: str | int | None
    groups: Sequence[Sequence[int]]
    mutates: bool
    packs: Sequence[Sequence[int]]
    passes: Sequence[Mapping[str, Any]]
    pieces: Sequence[Mapping[str, Any]]
    rest: Sequence[int]
    seconds: float
    slots: Sequence[tuple[int | None, str]]
    texts: Sequence[str]

    def __init__(self, **fields: Any) -> None:
        for name in _FIELDS:
            setattr(self, name, fields[name])

    def gpu_for(self, model_gpu: int | None) -> int | None:
        """Return the number of the GPU to open this for; None: on none.

        Args:
            model_gpu: That of the model. None: it is not known, and so the current one.
        """
        if self.gpu != "any":
            return self.gpu  # type: ignore[return-value]
        if model_gpu is not None:
            return model_gpu
        import torch

        return torch.cuda.current_device()

    def to_json(self) -> dict[str, Any]:
        """Return the assembly as JSON data."""
        return {
            "kind": "assembly",
            "version": ASSEMBLY_VERSION,
            "python": python_identity(),
            # For the cache: these stay as long as the assembly is used.
            "needs": sorted({record["key"] for record in self.pieces or () if "key" in record}),
            **{name: getattr(self, name) for name in _FIELDS},
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Assembly:
        """Read what `to_json` wrote.

        Raises:
            ArtifactIncompatibleError: It is of another format, or incomplete.
        """
        if data.get("version") != ASSEMBLY_VERSION or any(name not in data for name in _FIELDS):
            raise ArtifactIncompatibleError(
                "assembly",
                f"format {ASSEMBLY_VERSION}, complete",
                f"format {data.get('version')} with {sorted(data)}",
            )
        return Assembly(**{name: data[name] for name in _FIELDS})


class Bound:
    """A loaded assembly tied to one model: `entry(model, *args)` is the compiled call."""

    __slots__ = ("binding", "entry", "is_current", "weights")

    def __init__(self, binding: Binding, entry: Callable[..., Any]) -> None:
        self.binding = binding
        self.entry = entry
        self.is_current = binding.is_current
        self.weights = binding.weights


class _NotBound:
    """Stands for the binding of an assembly that the next call is to bind."""

    weights: tuple[Any, ...] = ()

    @staticmethod
    def is_current() -> bool:
        return False


_NOT_BOUND = _NotBound()


class LoadedAssembly:
    """An assembly whose code is loaded. `check(*args)` is 0 where it serves a call."""

    __slots__ = (
        "__weakref__",
        "_code",
        "_contract",
        "_execution",
        "assembly",
        "bound",
        "check",
        "gpu",
        "key",
        "slots",
    )

    def __init__(
        self,
        assembly: Assembly,
        key: str,
        slots: SlotTable,
        check: Callable[..., int],
        code: types.CodeType,
        execution: Callable[..., Any],
        gpu: int | None,
    ) -> None:
        self.assembly = assembly
        self.gpu = gpu
        self.key = key
        self.slots = slots
        self.check = check
        self.bound: Bound | _NotBound = _NOT_BOUND
        self._code = code
        self._contract = Contract.from_json(assembly.contract)
        self._execution = execution

    @property
    def mutates(self) -> bool:
        """Whether a call writes into its arguments or the model."""
        return self.assembly.mutates

    @property
    def entry_code(self) -> types.CodeType:
        """The bytecode around the graph."""
        return self._code

    def follow_defaults(self, function: types.FunctionType) -> None:
        """Let the call check bind arguments with the defaults that the function has now."""
        check: Any = self.check
        check.__defaults__ = function.__defaults__
        check.__kwdefaults__ = function.__kwdefaults__

    def why_not(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
        """Return the condition of the call check that a call does not meet; None: it meets all."""
        try:
            number = self.check(*args, **kwargs)
        except Exception as error:  # noqa: BLE001 - The arguments are anything a user may pass.
            return f"the arguments have another structure ({type(error).__name__}: {error})"
        if not number:
            return None
        return f"not so: {self.assembly.call_check['conditions'][number]}"

    def bind(self, function: types.FunctionType, owner: Any) -> Bound | Reason:
        """Tie the assembly to a model as it is now, or say why it is not for it."""
        binding = bind(self._contract, function, owner, gpu=self.gpu)
        if isinstance(binding, Reason):
            return binding
        try:
            return self._tied(binding, function)
        except CannotPack as problem:
            return Reason(
                "outside-contract",
                f"a weight cannot be packed: {problem}{CAPTURED_AGAIN}",
                "Nothing to do: the new capture has an assembly of its own",
            )
        except LookupError as error:
            return Reason(
                "outside-contract",
                f"{error} is not there; the model is captured again",
                "Nothing to do: the new capture has an assembly of its own",
            )

    def bound_as(self, other: LoadedAssembly, function: types.FunctionType) -> Bound | None:
        """Return this tied to what another assembly of the same contract is bound to."""
        if isinstance(other.bound, _NotBound):
            return None
        return self._tied(other.bound.binding, function)

    def _tied(self, binding: Binding, function: types.FunctionType) -> Bound:
        weights = binding.weights
        if self.assembly.packs:
            packed = [pack([weights[i] for i in group]) for group in self.assembly.packs]
            binding.note_moved()
            weights = [*weights, *packed]
        groups = [[weights[i] for i in group] for group in self.assembly.groups]
        rest = [weights[i] for i in self.assembly.rest]
        execute = run_on(self.gpu, partial(self._execution, self.slots.callables, groups, *rest))
        entry = self.assembly.entry
        entry_globals = _entry_globals(entry["recipes"], function)
        entry_globals[entry["backend_name"]] = execute
        return Bound(binding, make_entry(self._code, entry_globals, function))


def make_entry(
    code: types.CodeType, entry_globals: dict[str, Any], function: types.FunctionType
) -> Callable[..., Any]:
    """Return the captured call's bytecode as a function that takes what `function` takes."""
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    entry = types.FunctionType(
        code,
        entry_globals,
        f"precast_{function.__name__}",
        function.__defaults__,
        tuple(cells[name] for name in code.co_freevars),
    )
    entry.__kwdefaults__ = function.__kwdefaults__
    return entry


def _entry_globals(
    recipes: Mapping[str, Sequence[Any]], function: types.FunctionType
) -> dict[str, Any]:
    found: dict[str, Any] = {"__builtins__": builtins.__dict__}
    for name, recipe in recipes.items():
        match recipe[0]:
            case "module":
                found[name] = _module(recipe[1])
            case "global":
                found[name] = function.__globals__[name]
            case "builtins":
                found[name] = builtins.__dict__
            case _:
                found[name] = decode(recipe[1])
    return found


def _module(name: str) -> Any:
    if name == "torch._dynamo.utils" and name not in sys.modules:
        return _DynamoUtils()
    return decode(["module", name])


class _DynamoUtils:
    """The few helpers of `torch._dynamo.utils` that Dynamo's bytecode calls, without Dynamo."""

    @staticmethod
    def object_setattr_ignore_descriptor(target: Any, name: str, value: Any) -> None:
        object.__getattribute__(target, "__dict__")[name] = value

    @staticmethod
    def call_size(tensor: Any, dim: int) -> int:
        return tensor.size(dim)  # type: ignore[no-any-return]

    @staticmethod
    def call_stride(tensor: Any, dim: int) -> int:
        return tensor.stride(dim)  # type: ignore[no-any-return]

    @staticmethod
    def call_storage_offset(tensor: Any) -> int:
        return tensor.storage_offset()  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Any:
        # Slow and right: what is not above is taken from where Dynamo itself would.
        return getattr(decode(["module", "torch._dynamo.utils"]), name)


def open_check(
    data: Mapping[str, Any], function: types.FunctionType, gpu: int | None = None
) -> Callable[..., int]:
    """Return a call check as a function that takes what `function` takes.

    Args:
        data: The check, as captured.
        function: What it checks calls of.
        gpu: The number of the GPU that tensors have to be on; None: on none.

    Raises:
        LookupError: A class or function that it names is not there.
        ValueError, EOFError, TypeError: The marshalled code is of another Python.
    """
    import torch

    linecache.cache[data["filename"]] = (
        len(data["source"]),
        None,
        data["source"].splitlines(keepends=True),
        data["filename"],
    )
    namespace: dict[str, Any] = {
        "GPU": gpu,
        "TENSORS": frozenset((torch.Tensor, torch.nn.Parameter)),
        "are_apart": are_apart,
        "current_gpu": torch.cuda.current_device,
        "encode": encode,
        "is_grad_enabled": torch.is_grad_enabled,
        "math": math,
    }
    for name, constant in data["constants"].items():
        namespace[name] = constant[1] if constant[0] == "json" else decode(constant)
    exec(marshal.loads(base64.b64decode(data["marshalled"])), namespace)
    check: types.FunctionType = namespace["check"]
    check.__defaults__ = function.__defaults__
    check.__kwdefaults__ = function.__kwdefaults__
    return check


def open_assembly(
    assembly: Assembly,
    key: str,
    slots: SlotTable,
    function: types.FunctionType,
    model_gpu: int | None = None,
) -> LoadedAssembly:
    """Return an assembly with its code loaded.

    Args:
        assembly: To open.
        key: Its name in the cache.
        slots: With its pieces, loaded on the GPU of the model.
        function: What it serves.
        model_gpu: Its number, as `Assembly.gpu_for` takes it.

    Raises:
        ArtifactIncompatibleError: A part is of another Python or names what is not there.
    """
    gpu = assembly.gpu_for(model_gpu)
    try:
        check = open_check(assembly.call_check, function, gpu)
        code = marshal.loads(base64.b64decode(assembly.entry["marshalled"]))
        for place, data in assembly.entry["objects"]:
            code = _with_constant(code, place, decode(data))
        with on_gpu(gpu):  # Constants go there.
            execution = SerializableFunction.from_json(assembly.execution).function
        return LoadedAssembly(assembly, key, slots, check, code, execution, gpu)
    except (LookupError, ValueError, EOFError, TypeError) as error:
        raise ArtifactIncompatibleError(
            "assembly",
            "code for this Python and these libraries",
            f"{type(error).__name__}: {error}",
        ) from error


def _with_constant(code: types.CodeType, place: Sequence[int], value: Any) -> types.CodeType:
    """Put back a constant that `marshal` could not hold (`capture.entry_code`)."""
    constants = list(code.co_consts)
    first, *inner = place
    constants[first] = _with_constant(constants[first], inner, value) if inner else value
    return code.replace(co_consts=tuple(constants))


def are_apart(written: Sequence[Any], others: Sequence[Any]) -> bool:
    """Whether no tensor shares memory with a written one but itself.

    `others` holds the written ones too. One object at two places shares with itself: code for
    two arguments does not know that they are one.
    """
    storages = [tensor.untyped_storage().data_ptr() for tensor in others]
    if len(set(storages)) == len(storages):
        return True
    ranges = sorted((*_extent(tensor), id(tensor)) for tensor in others)
    ids = {id(tensor) for tensor in written}
    end, holder = -1, 0
    for start, stop, identity in ranges:
        if start < end and stop > start and (identity in ids or holder in ids):
            return False
        if stop > end:
            end, holder = stop, identity
    return True


def _extent(tensor: Any) -> tuple[int, int]:
    start = tensor.data_ptr()
    if 0 in tensor.shape:
        return start, start
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.element_size()
