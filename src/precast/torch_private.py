"""Every use of torch's internals, a function each.

Each begins with four facts: the torch range it was checked on, what it replaces (what one would
call if torch offered it), where upstream stands, and when it goes. Importing this module imports
nothing: torch, Dynamo and Inductor are imported inside of the functions that need them.
"""

from __future__ import annotations

import dataclasses
import re
import struct
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# --- Symbolic sizes.


def make_fake_mode(
    ranges: Mapping[str, tuple[int, int | None]], hints: Mapping[str, int]
) -> tuple[Any, dict[str, Any]]:
    """Return a FakeTensorMode and a SymInt for each named symbol, with its range and its hint."""
    # torch:    2.11 to 2.13
    # replaces: `torch.export.Dim` for graphs that did not come from `torch.export`
    # upstream: ShapeEnv has no public constructor for symbols
    # goes:     when fake inputs can be made from named dimensions by a public function
    import sympy  # type: ignore[import-untyped]
    from torch._dynamo.source import ConstantSource
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
    from torch.utils._sympy.numbers import int_oo
    from torch.utils._sympy.value_ranges import ValueRanges

    shape_env = ShapeEnv(specialize_zero_one=False, duck_shape=False)
    symbols = {}
    for name, (low, high) in ranges.items():
        source = ConstantSource(name)
        symbol = shape_env.create_symbol(
            hints[name],
            source,
            dynamic_dim=DimDynamic.DYNAMIC,
            constraint_dim=None,
            do_not_specialize_zero_one=True,
        )
        shape_env.var_to_range[symbol] = ValueRanges(
            sympy.Integer(low), int_oo if high is None else sympy.Integer(high)
        )
        symbols[name] = shape_env.create_symintnode(symbol, hint=hints[name], source=source)
    return FakeTensorMode(shape_env=shape_env, allow_non_fake_inputs=True), symbols


def record_values(graph_module: Any, fake_mode: Any, inputs: Sequence[Any]) -> None:
    """Run a graph on fake inputs; note each node's value as `example_value`, as Dynamo does."""
    # torch:    2.11 to 2.13
    # replaces: `torch.fx.passes.shape_prop`, which keeps shapes but no aliasing
    # upstream: the Python dispatcher, which keeps open sizes open, has no public name
    # goes:     when the dispatcher does, or fake mode switches it on by itself
    import torch
    from torch._dispatch.python import enable_python_dispatcher

    class Recorder(torch.fx.Interpreter):
        def run_node(self, n: Any) -> Any:
            result = super().run_node(n)
            if n.op != "output":
                n.meta["example_value"] = result
            return result

    with fake_mode, torch.no_grad(), enable_python_dispatcher():
        Recorder(graph_module).run(*inputs)


def count_flops(run: Callable[[], Any]) -> int | None:
    """Return the FLOPs that torch counts while tensors made by `run` are fake; None: it failed."""
    # torch:    2.11 to 2.13
    # replaces: `FlopCounterMode` over real tensors; it counts the attention of GPUs only
    # upstream: FakeTensorMode is private
    # goes:     when fake tensors are public
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        batch, heads, rows, width = query
        return int(2 * batch * heads * rows * key[-2] * (width + value[-1]))

    mapping: Any = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), counter:
        try:
            run()
        except Exception:  # noqa: BLE001 - a count is not worth a failure.
            return None
    return int(counter.get_total_flops())


# ---------------------------------------------------------------------------
# Capture (Dynamo)


@dataclasses.dataclass(slots=True)
class RawCapture:
    """What Dynamo gave for one call: the graph, its guards and the code around it."""

    graph_module: Any
    bytecode: types.CodeType  # Calls `backend_id` with `arguments` only, then rebuilds outputs.
    backend_id: str
    import_sources: dict[str, str]  # Alias in the bytecode's globals -> module.
    globals: dict[str, Any]
    closure_names: tuple[str, ...]
    traced_code: list[types.CodeType]
    guards: list[Any]  # GuardFilterEntry
    sizes_strides: dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]]
    arguments: list[str]  # Names of the placeholders that the bytecode passes, in order.
    shape_env: Any


def raised_while_traced(error: Exception) -> str | None:
    """Return what traced code raised, where that is why Dynamo gave up; None: it is not."""
    # torch:    2.11 to 2.13
    # replaces: nothing public: the exception is an `Unsupported` like that of any graph break
    # upstream: the first line names the kind of graph break, the debug context the exception
    # goes:     when Dynamo chains the exception itself
    text = str(error)
    if not text.startswith("Observed exception"):
        return None
    found = re.search(r"raised exception (.+)", text)
    return "an exception" if found is None else found[1]


def capture_full_graph(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    select_arguments: Callable[[list[str]], list[int]],
) -> RawCapture | None:
    """Trace one call of `function` into one graph; None when it computes no tensor.

    `select_arguments` gets the source of every graph input (`L['x']`) and returns the positions
    of those that the bytecode around the graph must fetch at each call.

    Raises whatever Dynamo raises where the call cannot be captured whole.
    """
    # torch 2.11-2.13. Replaces torch.compile's frame hook, which gives neither the guards
    # as data nor the code around the graph. Upstream: torch.compiler.precompile
    # (2.14) may serve later. Goes when that is stable.
    import torch._dynamo.config as dynamo_config
    import torch.fx.experimental._config as symbolic_config
    from torch._dynamo import convert_frame
    from torch._dynamo.codegen import PyCodegen
    from torch._dynamo.hooks import Hooks
    from torch._dynamo.output_graph import OutputGraph
    from torch._dynamo.utils import dynamo_timed, get_metrics_context

    # torch's annotations know nothing of what is patched here.
    frames: Any = convert_frame
    config: Any = dynamo_config
    symbols: Any = symbolic_config
    codegen_class: Any = PyCodegen
    output_class: Any = OutputGraph
    kept: list[int] = []

    def make_call(codegen: Any, fn_name: str) -> Any:
        everything = original_property.fget(codegen.tx.output)
        if any(argument.pass_arg_as_tensor for argument in everything):
            raise NotImplementedError("a Python float enters the graph as a tensor")
        kept[:] = select_arguments([source_name(found.source) for found in everything])
        output_class.graphargs = property(lambda _: [everything[i] for i in kept])
        try:
            return original_call(codegen, fn_name)
        finally:
            output_class.graphargs = original_property

    entries: list[Any] = []

    def record(found: Any) -> list[bool]:
        entries.extend(found)
        return [False] * len(found)  # We check them; Dynamo's own guard manager stays empty.

    # The lock keeps other threads' compilations out of the two patched methods.
    with (
        frames.compile_lock,
        get_metrics_context(),
        dynamo_timed("precast_capture"),
        config.patch(
            record_runtime_overhead=False,
            automatic_dynamic_shapes=False,
            assume_static_by_default=True,
            suppress_errors=False,
            skip_guards_on_constant_func_defaults=False,  # torch 2.11 would skip them.
        ),
        symbols.patch(backed_size_oblivious=True),
    ):
        # A copy: Dynamo installs helper names, and a user's module is no place for them.
        frame = frames._get_frame(function, args, kwargs)
        frame = dataclasses.replace(frame, globals=dict(frame.globals))
        # Read under the lock: before, another thread's patches may be in their place.
        original_call = codegen_class.make_call_generated_code
        original_property = output_class.graphargs
        codegen_class.make_call_generated_code = make_call
        try:
            with frames.compile_context(frames.CompileContext(frames.get_compile_id({}))):
                output = frames._fullgraph_capture_frame(frame)
        finally:
            codegen_class.make_call_generated_code = original_call
        if output.backend_input is None:
            return None
        captured = output.graph_capture_output
        captured.build_guards(frame.code, hooks=Hooks(guard_filter_fn=record))

    graph_module = output.backend_input.graph_module
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    graph = captured.output_graph
    return RawCapture(
        graph_module=graph_module,
        bytecode=captured.bytecode,
        backend_id=output.backend_input.backend_id,
        import_sources=dict(captured.import_sources),
        globals=captured.f_globals,
        closure_names=tuple(frame.code.co_freevars),
        traced_code=list(captured.traced_code or ()),
        guards=entries,
        sizes_strides={
            source_name(source): (tuple(found["size"]), tuple(found["stride"]))
            for source, found in (graph.input_source_to_sizes_strides or {}).items()
        },
        arguments=[placeholders[i].name for i in kept],
        shape_env=graph.shape_env,
    )


def source_name(source: Any) -> str:
    """The expression over `L` and `G` that reads a Dynamo source."""
    # torch 2.11-2.13: a method before 2.11, a property since. Replaces nothing.
    if isinstance(source, str):
        return source
    name = source.name
    return str(name() if callable(name) else name)


def placeholder_source(node: Any) -> str:
    """Where a graph input comes from, as an expression over `L` and `G`."""
    # torch 2.11-2.13. Set by Dynamo's output graph on every placeholder.
    return source_name(node._dynamo_source)


@contextmanager
def tracing_sizes_obliviously() -> Iterator[None]:
    """Trace so that sizes 0 and 1 take the same way as all others, where the result allows it."""
    # torch:    2.11 to 2.13
    # replaces: marking every dimension unbacked, which fewer operators can be traced with
    # upstream: `backed_size_oblivious` is an experimental setting
    # goes:     when `torch.export` traces so by default
    import torch.fx.experimental._config as symbolic_config

    config: Any = symbolic_config
    with config.patch(backed_size_oblivious=True):
        yield


class SizesSpecializedError(Exception):
    """Compiled code holds only for some of the sizes, in a way that no range can say."""


def narrowed_ranges(
    fake_mode: Any, symbols: Mapping[str, Any], ranges: Mapping[str, tuple[int, int | None]]
) -> tuple[dict[str, tuple[int, int | None]], dict[str, list[int]]]:
    """Return for which sizes compiled code holds, from the guards that compiling has added.

    Args:
        fake_mode: What `make_fake_mode` returned, after compiling.
        symbols: The SymInts that came with it.
        ranges: What the code should hold for.

    Returns:
        The ranges that are left, and sizes 0 and 1 that are in them although a guard excludes
        them. Inductor adds such guards where it asks about strides, mostly without need: whether
        these sizes work has to be tried, else they are to be left out.

    Raises:
        SizesSpecializedError: What is left is no range; says the guard.
    """
    # torch:    2.11 to 2.13
    # replaces: reading what `torch.export` reports as suggested fixes, which is text
    # upstream: AOTInductor and `CompiledArtifact.load` drop these guards without a word
    # goes:     when a compiled artifact says what it was specialised for
    import sympy
    from torch.utils._sympy.numbers import int_oo
    from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy

    names = {symint.node.expr: name for name, symint in symbols.items()}
    left: dict[str, list[Any]] = {name: list(bounds) for name, bounds in ranges.items()}
    unproven: dict[str, set[int]] = {}
    usual: dict[Any, Any] = {
        symbol: ValueRanges(
            sympy.Integer(max(ranges[name][0], 2)),
            int_oo if ranges[name][1] is None else sympy.Integer(ranges[name][1]),
        )
        for symbol, name in names.items()
        if ranges[name][1] is None or ranges[name][1] >= 2  # type: ignore[operator]
    }
    for guard in fake_mode.shape_env.guards:
        free = sorted(guard.expr.free_symbols & names.keys(), key=str)
        if all(symbol in usual for symbol in free):
            bound = bound_sympy(guard.expr, {**fake_mode.shape_env.var_to_range, **usual})
            if bound.is_singleton() and bool(bound.lower):
                for symbol in free:
                    low = ranges[names[symbol]][0]
                    unproven.setdefault(names[symbol], set()).update(range(low, 2))
                continue
        _narrow(guard.expr, free, names, left)
    for name, (low, high) in left.items():
        if high is not None and (
            low > high or (low == high and ranges[name][0] != ranges[name][1])
        ):
            raise SizesSpecializedError(f"{name} was specialised to {low}")
    return (
        {name: (low, high) for name, (low, high) in left.items()},
        {name: sorted(sizes) for name, sizes in unproven.items() if sizes},
    )


def _as_inequality(expression: Any) -> Any:
    """Write `x == Min(a, x)`, as slices of position tables ask, as the `x <= a` that it says."""
    # torch 2.11-2.13. torch's own Min and Max, which sympy's solvers do not know.
    import sympy
    from torch.utils._sympy.functions import Max, Min

    if isinstance(expression, sympy.Eq):
        for one, other in (expression.args, expression.args[::-1]):
            rest = [argument for argument in other.args if argument != one]
            if len(rest) == 1 and len(other.args) == 2 and isinstance(other, Min | Max):
                return sympy.Le(one, rest[0]) if isinstance(other, Min) else sympy.Ge(one, rest[0])
    return expression


def _narrow(expression: Any, free: Sequence[Any], names: Mapping[Any, str], left: Any) -> None:
    """Cut `left` to where an inequality holds, if it bounds its symbols from above or below.

    Where one of several is enough ("or"), the one that leaves most is taken. Decided by interval
    arithmetic over whole boxes of sizes: what is kept holds everywhere, however the expression is
    built (32-bit indexing on a GPU asks for products of rounded sizes, say).
    """
    import sympy
    from torch.utils._sympy.numbers import int_oo
    from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy

    problem = SizesSpecializedError(f"it holds only where {expression}")
    if isinstance(expression, sympy.Or):
        kept = [ranges for arm in expression.args if (ranges := _left_by(arm, names, left))]
        if not kept:
            raise problem
        left.update(max(kept, key=_num_sizes))
        return
    expression = _as_inequality(expression)
    if not free or not hasattr(expression, "lhs"):
        raise problem
    difference = expression.lhs - expression.rhs
    if isinstance(expression, sympy.Ge | sympy.Gt):
        difference = -difference
    elif not isinstance(expression, sympy.Le | sympy.Lt):
        raise problem
    is_strict = isinstance(expression, sympy.Lt | sympy.Gt)

    def holds(lows: Sequence[int], highs: Sequence[int | None]) -> bool:
        box = {
            symbol: ValueRanges(sympy.Integer(low), int_oo if high is None else sympy.Integer(high))
            for symbol, low, high in zip(free, lows, highs, strict=True)
        }
        greatest = bound_sympy(difference, box).upper
        return bool(greatest < 0 if is_strict else greatest <= 0)

    lows = [left[names[symbol]][0] for symbol in free]
    highs = [left[names[symbol]][1] for symbol in free]
    if holds(lows, highs):
        return
    if holds(lows, lows):  # Bounded from above: the largest box of equal proportions.
        best = 0
        for step in (1 << n for n in range(40, -1, -1)):
            grown = [
                _capped(low + best + step, high) for low, high in zip(lows, highs, strict=True)
            ]
            if holds(lows, grown):
                best += step
        for low, high, symbol in zip(lows, highs, free, strict=True):
            left[names[symbol]][1] = _capped(low + best, high)
        return
    if len(free) != 1 or not holds([_capped(1 << 16, highs[0])], highs):
        raise problem
    low, enough = lows[0], _capped(1 << 16, highs[0])  # Bounded from below.
    while low < enough:
        middle = (low + enough) // 2
        low, enough = (low, middle) if holds([middle], highs) else (middle + 1, enough)
    left[names[free[0]]][0] = low


def _left_by(expression: Any, names: Mapping[Any, str], left: Any) -> Any:
    """Return what of `left` an inequality leaves; None where that cannot be said."""
    ranges = {name: list(bounds) for name, bounds in left.items()}
    free = sorted(expression.free_symbols & names.keys(), key=str)
    try:
        _narrow(expression, free, names, ranges)
    except SizesSpecializedError:
        return None
    return ranges


def _num_sizes(ranges: Mapping[str, Sequence[int | None]]) -> int:
    """Return how many sizes ranges have, together; of one without an end as many as can be."""
    return sum((1 << 62 if high is None else high) - (low or 0) for low, high in ranges.values())


def _capped(size: int, high: int | None) -> int:
    return size if high is None else min(size, high)


# --- Inductor's compilers. All of these import Inductor; none is called on a warm start.


def prepare_inductor() -> None:
    """Import Inductor, and let it remember which instruction sets the C++ compiler can build.

    Inductor probes each instruction set that the CPU's flags list: it compiles a test and loads it
    in a new Python that imports torch. Ten probes, in each new cache folder: 11 s on a quiet
    2-core machine, 50 s on one with an H100. The flags say what the CPU can do and compiling says
    what g++ can; loading adds nothing that verifying the compiled piece would not find. So they
    are only compiled, and a success is remembered beside the precompiled headers, by compiler,
    torch version and test. TORCHINDUCTOR_VEC_ISA_OK=1 would skip four of the ten unseen.
    """
    # torch:    2.11 to 2.13
    # replaces: TORCHINDUCTOR_VEC_ISA_OK=1
    # upstream: https://github.com/pytorch/pytorch/issues/100378
    # goes:     when Inductor keeps the probes' answers between processes
    import contextlib
    import subprocess
    from hashlib import sha256

    import torch._inductor.compile_fx  # noqa: F401 - the slow import, of all that compiles.
    from torch._inductor import cpu_vec_isa
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    isa: Any = cpu_vec_isa.VecISA
    if getattr(isa, "remembers_builds", False):
        return
    isa.remembers_builds = True
    isa.has_built = False
    original = isa.check_build
    folder = Path(default_cache_dir()) / "precast-instruction-sets"

    class WithoutLoading:
        """Stands for `subprocess` in a module that only uses it for these probes."""

        def check_call(self, *_: Any, **__: Any) -> int:
            return 0

        def __getattr__(self, name: str) -> Any:
            return getattr(subprocess, name)

    if hasattr(isa, "_probe_load"):  # torch 2.12 and later
        isa._probe_load = lambda *_: True
    else:
        cpu_vec_isa.subprocess = WithoutLoading()  # type: ignore

    def check_build(self: Any, code: str) -> bool:
        if isa.has_built:
            return True
        compiler: Any = cpu_vec_isa._get_isa_dry_compile_fingerprint(self.build_arch_flags())
        mark = folder / sha256(f"{compiler}\n{code}".encode()).hexdigest()
        isa.has_built = mark.exists() or bool(original(self, code))
        if isa.has_built:
            with contextlib.suppress(OSError):
                folder.mkdir(parents=True, exist_ok=True)
                mark.touch()
        return bool(isa.has_built)

    isa.check_build = check_build


def warm_inductor() -> None:
    """Do now what the first compile of a process would do: pattern tables, instruction sets."""
    # torch:    2.11 to 2.13
    # replaces: nothing: the first compile does it, while somebody waits
    # upstream: both are private and idempotent
    # goes:     when the tables are made at import, or shared between processes
    import torch
    from torch._inductor import cpu_vec_isa
    from torch._inductor.fx_passes import joint_graph, post_grad

    cpu_vec_isa.pick_vec_isa()
    # Called as Inductor calls them: the answers are kept by argument, and a second time with
    # another one registers patterns twice.
    with torch.no_grad():
        post_grad.lazy_init()
        joint_graph.lazy_init(
            torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        )


def inductor_options(**more: Any) -> dict[str, Any]:
    """Return Inductor's settings for pieces; those that this torch does not know are left out."""
    # torch:    2.11 to 2.13
    # replaces: `options` of `torch.compile`, which refuses a name that one version lacks
    # upstream: settings come and go without notice
    # goes:     never; the names are checked at each use
    from torch._inductor import config as inductor_config

    config: Any = inductor_config
    wanted = {
        "freezing": False,  # Weights are inputs.
        "fallback_random": True,  # Random numbers as eager draws them.
        "triton.cudagraphs": False,
        # Padding is decided by sizes, and each decision would become a condition on them.
        "shape_padding": False,
        # As many threads as the serving process has, not as many as the worker had.
        "cpp.dynamic_threads": True,
        **more,
    }
    return {name: value for name, value in wanted.items() if name in config._config}


@contextmanager
def compile_commands_through(run: Callable[[Sequence[str], str], bool]) -> Iterator[None]:
    """Offer each command line of Inductor's C++ compiler to `run` first: (command, folder).

    What it answers False to is run as ever.
    """
    # torch:    2.11 to 2.13
    # replaces: a script in the compiler's place, which would have to pass for g++
    # upstream: no hook; the command line is built and run in one class
    # goes:     when AOTInductor compiles what is the same for all models once
    import shlex

    from torch._inductor import cpp_builder

    builder: Any = cpp_builder
    original = builder._run_compile_cmd

    def run_compile_cmd(cmd_line: str, cwd: str) -> None:
        if not run(shlex.split(cmd_line), cwd):
            original(cmd_line, cwd)

    builder._run_compile_cmd = run_compile_cmd
    try:
        yield
    finally:
        builder._run_compile_cmd = original


def aoti_interface() -> tuple[str, Path]:
    """Return the text that begins every wrapper of AOTInductor, and where builds are kept."""
    # torch:    2.11 to 2.13
    # replaces: nothing
    # upstream: the file is spliced into each wrapper
    # goes:     with `compile_commands_through`
    import torch._inductor
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    codegen = Path(torch._inductor.__file__).parent / "codegen"
    text = (codegen / "aoti_runtime" / "interface.cpp").read_text()
    return text, Path(default_cache_dir())


def aoti_compile(graph: Any, fake_mode: Any, inputs: Sequence[Any], directory: str) -> list[str]:
    """Compile an FX graph ahead of time into `directory`; return all files that loading needs.

    The library is the one file that ends in `.so`; with it `.json` where operators run through
    the proxy executor, and `.cubin` files where they could not be put into the library.
    """
    # torch:    2.11 to 2.13
    # replaces: `torch._inductor.aoti_compile_and_package`, which needs `torch.export` and zips
    # upstream: `compile_fx_aot` is what it calls, with fake inputs
    # goes:     when a public function takes an FX graph and leaves a bare library
    import shutil

    import torch
    from torch._inductor.compile_fx import compile_fx_aot

    has_binutils = shutil.which("ld") is not None and shutil.which("objcopy") is not None
    options = inductor_options(
        **{
            "aot_inductor.output_path": str(Path(directory) / "model.so"),
            # -O0 costs 26 us a call where -O1 costs 18, and line tables cost three seconds.
            "aot_inductor.enable_line_tables": False,
            "aot_inductor.enable_frame_pointer": False,
            "aot_inductor.compile_wrapper_opt_level": "O1",
            "aot_inductor.use_runtime_constant_folding": False,
            # 5 to 9 s for each of two headers, to save one or two a piece.
            "aot_inductor.precompile_headers": False,
            "aot_inductor.embed_kernel_binary": True if has_binutils else None,
        }
    )
    options["aot_inductor.metadata"] = {}  # A dictionary that torch writes into: a fresh one.
    tracing = torch._guards.tracing(torch._guards.TracingContext(fake_mode))
    with torch.no_grad(), tracing:
        compile_fx_aot(graph, list(inputs), config_patches=options)
    kernels = () if has_binutils else (".cubin",)  # Else they are in the library.
    return [
        str(path)
        for path in sorted(Path(directory).iterdir())
        if path.suffix in (".so", *kernels)
        or (path.suffix == ".json" and not path.stem.endswith("_metadata"))
    ]


def prefer_single_threaded_entry(library: str) -> None:
    """Make a compiled library's ordinary entry the one without a lock.

    The ordinary one hands out a model instance and, on a GPU, waits for the previous run of that
    instance to finish: with one instance for all layers the host runs in step with the device,
    and a CUDA graph cannot be captured. On a CPU it waits with Python's lock held, which is a
    deadlock when an operator written in Python lets another thread in. Compiled pieces keep no
    state between runs, so no lock is needed.

    The two entries have equal signatures; their addresses are exchanged in the symbol table.
    """
    # torch:    2.11 to 2.13
    # replaces: the constructor argument `run_single_threaded`, which C++ has and Python lacks
    # upstream: bound only in AOTIModelPackageLoader, which unpacks an archive at each load
    # goes:     when AOTIModelContainerRunnerCuda takes the argument from Python
    path = Path(library)
    data = bytearray(path.read_bytes())
    swap_symbols(data, "AOTInductorModelContainerRun", "AOTInductorModelContainerRunSingleThreaded")
    path.write_bytes(data)


def swap_symbols(data: bytearray, first: str, second: str) -> None:
    """Exchange the addresses of two dynamic symbols of a 64-bit little-endian ELF library.

    Raises:
        ValueError: It is no such file, or lacks one of them.
    """
    if data[:6] != b"\x7fELF\x02\x01":
        raise ValueError("not a 64-bit little-endian ELF file")
    (section_offset,) = struct.unpack_from("<Q", data, 0x28)
    size, count = struct.unpack_from("<HH", data, 0x3A)
    sections = [
        struct.unpack_from("<IIQQQQIIQQ", data, section_offset + i * size) for i in range(count)
    ]
    found: dict[str, int] = {}
    for section in sections:
        if section[1] != 11:  # SHT_DYNSYM
            continue
        names = sections[section[6]][4]
        for at in range(section[4], section[4] + section[5], 24):
            start = names + struct.unpack_from("<I", data, at)[0]
            for name in (first, second):
                if data[start : start + len(name) + 1] == name.encode() + b"\0":
                    found[name] = at
    if len(found) != 2:
        raise ValueError(f"the library has no symbol {({first, second} - found.keys()).pop()!r}")
    one, other = (slice(found[name] + 6, found[name] + 24) for name in (first, second))
    data[one], data[other] = data[other], data[one]


def aoti_runner(library: str, device: str, cubin_dir: str) -> Callable[[list[Any]], list[Any]]:
    """Open a library that `aoti_compile` made; return its entry: list of tensors to list.

    Imports neither Dynamo, Inductor, sympy nor Triton. A GPU library runs on the device that is
    current now.
    """
    # torch:    2.11 to 2.13
    # replaces: `torch._inductor.aoti_load_package`, which imports Inductor and unpacks an archive
    # upstream: the runners are private bindings of public C++ classes
    # goes:     when a bare library can be loaded by a public function
    import torch

    runner: Any
    if device == "cpu":
        runner = torch._C._aoti.AOTIModelContainerRunnerCpu(library, 1)
    elif device == "cuda":
        runner = torch._C._aoti.AOTIModelContainerRunnerCuda(library, 1, "cuda", cubin_dir)
    else:
        raise ValueError(f"no runner for device {device!r}")
    run: Callable[[list[Any]], list[Any]] = runner.run
    return run


def standalone_compile(graph: Any, fake_mode: Any, inputs: Sequence[Any], path: str) -> None:
    """Compile an FX graph with `torch._inductor.standalone_compile` and save it at `path`."""
    # torch:    2.11 to 2.13
    # replaces: nothing public
    # upstream: underscored, used by vLLM; the round trip of targets fails its cache key check,
    #           hence `bypass_autograd_cache_key`
    # goes:     when `torch.compiler.precompile` (2.14, prototype) takes graphs with open sizes
    import torch
    import torch._functorch.config
    from torch._inductor import standalone_compile as compile_graph

    tracing = torch._guards.tracing(torch._guards.TracingContext(fake_mode))
    key = torch._functorch.config.patch(bypass_autograd_cache_key=True)
    with torch.no_grad(), tracing, key:
        artifact = compile_graph(
            graph,
            list(inputs),
            dynamic_shapes="from_tracing_context",
            options={"config_patches": inductor_options()},
            aot=True,
        )
        artifact.save(path=path, format="binary")


def load_standalone(path: str) -> Callable[[list[Any]], Sequence[Any]]:
    """Load what `standalone_compile` saved. Imports Inductor."""
    # torch:    2.11 to 2.13
    # replaces: nothing public
    # upstream: checks torch's version by hashing torch's sources
    # goes:     with `standalone_compile`
    from torch._inductor.standalone_compile import CompiledArtifact

    prepare_inductor()
    artifact = CompiledArtifact.load(path=path, format="binary")

    def run(inputs: list[Any]) -> Sequence[Any]:
        outputs: Sequence[Any] = artifact(*inputs)
        return outputs

    return run


def inductor_in_process(
    graph: Any, fake_mode: Any, inputs: Sequence[Any]
) -> Callable[[list[Any]], Sequence[Any]]:
    """Compile an FX graph in this process, with Inductor's own cache."""
    # torch:    2.11 to 2.13
    # replaces: `torch.compile(backend="inductor")`, which captures again and guards again
    # upstream: `compile_fx` is what the backend calls
    # goes:     when a public function compiles an FX graph
    import torch
    from torch._inductor.compile_fx import compile_fx

    tracing = torch._guards.tracing(torch._guards.TracingContext(fake_mode))
    with torch.no_grad(), tracing:
        compiled: Any = compile_fx(graph, list(inputs), config_patches=inductor_options())
    return lambda tensors: compiled(*tensors)  # As Dynamo calls it, whatever `_boxed_call` says.


@contextmanager
def calling_after_grad_passes(run: Callable[[Any], None], identity: str) -> Iterator[None]:
    """Let Inductor hand each graph to `run` after its own passes; `identity` is for its cache."""
    # torch:    2.11 to 2.13
    # replaces: nothing public
    # upstream: `post_grad_custom_post_pass` is a documented setting of a private module
    # goes:     never; what it is given may need another base class
    from torch._inductor import config as inductor_config
    from torch._inductor.custom_graph_pass import CustomGraphPass

    config: Any = inductor_config
    others = config.post_grad_custom_post_pass  # A user's own, where this process compiles.
    others = list(others) if isinstance(others, (list, tuple)) else [others] if others else []

    class Calling(CustomGraphPass):
        def __call__(self, graph: Any) -> None:
            for other in others:
                other(graph)
            run(graph)

        def uuid(self) -> Any:
            return identity if not others else [identity, *(other.uuid() for other in others)]

    with config.patch(post_grad_custom_post_pass=Calling()):
        yield


@contextmanager
def fake_mode_of(values: Iterable[Any]) -> Iterator[None]:
    """Enter the fake mode that the first fake tensor among some values belongs to."""
    # torch:    2.11 to 2.13
    # replaces: nothing public
    # upstream: `torch._guards.detect_fake_mode` looks at the tracing context too, which may differ
    # goes:     when fake tensors are public
    from torch._subclasses.fake_tensor import FakeTensor

    mode = next((value.fake_mode for value in values if isinstance(value, FakeTensor)), None)
    if mode is None:
        yield
        return
    with mode:
        yield


def storage_use_count(tensor: Any) -> int:
    """Return how many tensors, and Python objects of storages, hold a tensor's memory."""
    # torch:    2.11 to 2.13
    # replaces: nothing public; `sys.getrefcount` knows only of Python's references
    # upstream: private, used by CUDA graph trees
    # goes:     when torch can tell whether a storage is shared
    import torch

    count: int = torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)
    return count


def replacement_matcher(
    pattern: Callable[..., Any],
    replacement: Callable[..., Any],
    examples: Callable[[], Sequence[Any]],
    name: str,
) -> Any:
    """Return Inductor's matcher for one pattern: `apply(graph)` gives the number of matches."""
    # torch:    2.11 to 2.13
    # replaces: nothing public for ATen graphs
    # upstream: `register_replacement` is what Inductor's own patterns use
    # goes:     when the pattern matcher has a public home
    import torch
    from torch._inductor import pattern_matcher

    matcher: Any = pattern_matcher
    found = matcher.PatternMatcherPass(pass_name=name)
    with torch.no_grad():
        matcher.register_replacement(
            pattern, replacement, list(examples()), matcher.fwd_only, found
        )
    return found


def find_graph_breaks(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[tuple[str, str | None, str | None]]:
    """Return each place at which Dynamo cannot go on: why, `file.py:12`, and that line's text.

    Runs the function once, in parts. Costs as much as capturing it.
    """
    # torch:    2.11 to 2.13
    # replaces: reading the log of TORCH_LOGS=graph_breaks
    # upstream: `explain` is documented and experimental
    # goes:     when a capture that fails names all breaks, not the first alone
    import torch._dynamo

    torch._dynamo.reset()
    found = torch._dynamo.explain(function)(*args, **kwargs)
    torch._dynamo.reset()
    breaks = []
    for each in found.break_reasons:
        why = str(each.reason).strip().splitlines()[0]
        if why.startswith("generic_jump"):
            why = "a branch depends on the value of a tensor"
        frame = each.user_stack[-1] if each.user_stack else None
        where = None if frame is None else f"{frame.filename}:{frame.lineno}"
        breaks.append((why, where, None if frame is None else frame.line))
    return list(dict.fromkeys(breaks))
