"""Every error that Precast raises, and `Reason`: why something does not run compiled.

An error is for the caller who has to act; a reason is kept, counted and shown while the model goes
on eager. The two say the same three things: what happened, what happens now, what to do. Errors
survive pickling, because compile workers and data-loader processes raise them too.

Nothing here logs, counts or decides; see `events.py` and `monitoring/`.
"""

from __future__ import annotations

from precast.values import Value

TYPE_CHECKING = False  # As in `values.py`: `typing` itself is too dear to import here.
if TYPE_CHECKING:
    from typing import ClassVar

#: Every code a `Reason` may carry, and what it stands for. Codes are stable: people alert on them.
REASON_CODES: dict[str, str] = {
    # Getting a graph.
    "capture-failed": "no graph could be captured for the model or a part of it",
    "grad-enabled": "the call wants gradients; compiled pieces are for inference",
    "capture-in-process": "the model cannot be sent to a child and was captured beside its calls",
    "trace-on-start": "a guard cannot be kept as data, so each start captures again",
    "random-op": "the piece draws random numbers, which compiled code would draw differently",
    "aliasing": "inputs or outputs share memory in a way that compiled code would not keep",
    # Cutting and compiling it.
    "split-failed": "no cut plan satisfies the rule",
    "pass-failed": "a graph pass failed or broke an invariant and is left out",
    "foreign-op": "an operator of another library runs natively between pieces",
    "op-unsupported": "no compiler takes an operator, or it has no text, and it runs natively",
    "compile-pending": "the piece is still being compiled",
    "compile-failed": "a compiler refused a piece",
    "compile-crashed": "a compile worker died, ended without an answer or could not be started",
    "compile-timeout": "a piece was still compiling when `max_compile_time` ran out",
    "compile-memory": "a compile worker outgrew `max_compile_memory`",
    "verify-mismatch": "the compiled piece does not compute what the eager one does",
    "not-worth-it": "the compiled piece was measured to be slower than the eager one",
    # Keeping and finding it.
    "tier-failed": "a cache tier could not be read or written",
    "artifact-corrupt": "stored bytes are not what they should be",
    "artifact-incompatible": "code is for another machine or version, or cannot be opened here",
    "untrusted": "stored code is not signed by a trusted key, or lies where others can write",
    "stale-assembly": "the stored assembly is no longer right for this model",
    "cache-disabled": "caching is switched off, so nothing is found and nothing kept",
    "not-recorded": "nothing is stored for this model and `cache_only` may not compile",
    # Using it.
    "outside-contract": "the call or the model is not what was compiled for",
    "recompile-limit": "the model already has `max_assemblies` compiled signatures",
    "config-invalid": "a setting is not usable",
    "disabled": "Precast is switched off by `PRECAST_DISABLE` or a setting",
}


class Reason(Value):
    """Why something is not compiled, cached or used, for people and for alerts.

    `message` is a sentence with the figures, `remedy` what a person can do, and `location` the
    line of the user's code (`file.py:12`) where that is known.
    """

    code: str
    message: str
    remedy: str
    location: str | None = None

    def __post_init__(self) -> None:
        """Refuse a code that is not in `REASON_CODES`."""
        if self.code not in REASON_CODES:
            raise ValueError(
                f"unknown reason code {self.code!r}; use one of {', '.join(sorted(REASON_CODES))}, "
                "or add it to REASON_CODES with what it stands for"
            )

    def __str__(self) -> str:
        where = f" at {self.location}" if self.location else ""
        return f"{self.code}{where}: {_ended(self.message)} {_ended(self.remedy)}"


class PrecastError(Exception):
    """Base of all errors that Precast raises.

    A subclass hands its fields to `super().__init__` in the order in which it takes them, so that
    unpickling can call it again, and says three things: `summary`, `outcome` and `remedy`.
    """

    code: ClassVar[str] = "compile-failed"  # One of `REASON_CODES`.
    outcome: ClassVar[str] = "the model runs eager"  # What happens now.
    summary: str = "something failed"  # What happened, with the values.
    remedy: str = "Run with `on_error='raise'` to see where it comes from"
    location: str | None = None  # The line of the user's code, where one is known.

    @property
    def reason(self) -> Reason:
        """The same as a value, to keep and show after the error is handled."""
        return Reason(self.code, self.summary, self.remedy, self.location)

    def __str__(self) -> str:
        where = f" at {self.location}" if self.location else ""
        return f"{self.summary}{where}; {self.outcome}. {_ended(self.remedy)}"


class ConfigError(PrecastError, ValueError):
    """A setting is not usable. Raised before any work is done."""

    code = "config-invalid"
    outcome = "nothing was compiled"

    def __init__(
        self, field: str, value: object, wanted: str, remedy: str, origin: str = "argument"
    ) -> None:
        super().__init__(field, value, wanted, remedy, origin)
        self.field = field
        self.value = value
        self.wanted = wanted
        self.remedy = remedy
        self.origin = origin
        where = "" if origin == "argument" else f" from {origin}"
        self.summary = f"setting {field!r} must be {wanted}, got {value!r}{where}"


class ModelError(PrecastError):
    """A model named on the command line cannot be loaded or called.

    `is_usage`: what was asked for is not there; else the model's own code failed.
    """

    code = "config-invalid"
    outcome = "nothing was compiled"

    def __init__(self, problem: str, remedy: str, *, is_usage: bool = False) -> None:
        super().__init__(problem, remedy)
        self.problem = problem
        self.remedy = remedy
        self.is_usage = is_usage
        self.summary = problem

    @property
    def sentences(self) -> str:
        """What is wrong and what to do, without what it means for compiling: nothing ran yet."""
        return f"{_ended(self.problem)} {_ended(self.remedy)}"


class CaptureError(PrecastError):
    """No graph could be captured: `problem` is what the tracer said, `location` the user's line."""

    code = "capture-failed"
    remedy = "Rewrite that line without data-dependent Python, or compile a submodule instead"

    def __init__(self, model: str, problem: str, location: str | None = None) -> None:
        super().__init__(model, problem, location)
        self.model = model
        self.problem = problem
        self.location = location
        self.summary = f"{model} could not be captured as a graph: {problem}"


class TracedCodeRaisedError(CaptureError):
    """The model's own code raised while it was traced: what it reads may be missing there."""


class CaptureCrashedError(CaptureError):
    """The process that captures died: for all that is known, a matter of this machine."""

    remedy = "Check the memory of this machine, or compile a submodule instead"


class CaptureAbortedError(CaptureError):
    """A capture was ended by what says nothing of the model, so the next start tries again.

    The machine lacked a process, a file or memory just then, or the mistake is ours.
    """

    remedy = (
        "Check the temporary folder, open files, processes and memory of this machine; report it "
        "if it is none of these"
    )


class SplitError(PrecastError):
    """No cut plan satisfies the rule; `node` is where it breaks."""

    code = "split-failed"
    remedy = "Loosen the rule given as `split`, or leave `split` out"

    def __init__(self, rule: str, node: str, problem: str) -> None:
        super().__init__(rule, node, problem)
        self.rule = rule
        self.node = node
        self.problem = problem
        self.summary = f"{rule} finds no cut plan at node {node!r}: {problem}"


class PassError(PrecastError):
    """A graph pass failed or broke an invariant of the graph at `node`."""

    code = "pass-failed"
    outcome = "the pass is left out for this piece"
    remedy = "Mend the pass, or take it out of the configuration"

    def __init__(self, pass_name: str, node: str, problem: str) -> None:
        super().__init__(pass_name, node, problem)
        self.pass_name = pass_name
        self.node = node
        self.problem = problem
        where = f" at node {node!r}" if node else ""
        self.summary = f"pass {pass_name!r} failed{where}: {problem}"


class CompileError(PrecastError):
    """One compiler could not compile one piece."""

    outcome = "the piece stays eager"
    remedy = "Try another `compiler`, or split around the operator that fails"

    def __init__(self, piece: str, compiler: str, problem: str) -> None:
        super().__init__(piece, compiler, problem)
        self.piece = piece
        self.compiler = compiler
        self.problem = problem
        self.summary = f"{compiler} could not compile piece {piece!r}: {problem}"


class CompileTimeoutError(CompileError):
    """A piece was still compiling when its time ran out; its worker was ended."""

    code = "compile-timeout"

    def __init__(self, piece: str, compiler: str, limit_s: float) -> None:
        super().__init__(piece, compiler, f"not finished after {limit_s:g} s")
        self.args = (piece, compiler, limit_s)
        self.limit_s = limit_s
        self.remedy = f"Raise `max_compile_time` (now {limit_s:g}) to wait longer"


class CompileMemoryError(CompileError):
    """A compile worker needed more memory than it may have; `peak_bytes` where it was measured."""

    code = "compile-memory"
    remedy = "Raise `max_compile_memory`, or split the model into smaller pieces"

    def __init__(
        self, piece: str, compiler: str, limit_bytes: int, peak_bytes: int | None = None
    ) -> None:
        used = "more" if peak_bytes is None else f"{peak_bytes:,} bytes"
        super().__init__(piece, compiler, f"used {used} where {limit_bytes:,} bytes are allowed")
        self.args = (piece, compiler, limit_bytes, peak_bytes)
        self.limit_bytes = limit_bytes
        self.peak_bytes = peak_bytes


class CompileCrashedError(CompileError):
    """A compile worker died: of `signal`, or with `exit_code` and no answer.

    `stderr` is what it wrote; the message shows its end.
    """

    code = "compile-crashed"
    remedy = "Check the C++ compiler and the memory of this machine, or try another `compiler`"

    def __init__(
        self,
        piece: str,
        compiler: str,
        signal: int | None = None,
        exit_code: int | None = None,
        stderr: str = "",
    ) -> None:
        end = f"signal {signal}" if signal is not None else f"exit code {exit_code}"
        said = f", saying {stderr.strip()[-400:]!r}" if stderr.strip() else ""
        super().__init__(piece, compiler, f"its worker ended with {end}{said}")
        self.args = (piece, compiler, signal, exit_code, stderr)
        self.signal = signal
        self.exit_code = exit_code
        self.stderr = stderr


class CompileUnavailableError(CompileError):
    """What compiling needs cannot be had just now: a process, a thread, a temporary file, memory.

    It says nothing of the piece or the model, so the next start tries again.
    """

    code = "compile-crashed"
    remedy = (
        "Check the temporary folder, open files, processes and memory of this machine; "
        "the next start tries again"
    )


class ArtifactError(PrecastError):
    """Stored bytes that must not run; `path` names them."""

    code = "artifact-corrupt"
    outcome = "it is set aside and the piece is compiled again"
    remedy = "Nothing needs to be done; if it comes back, check the disk that holds the cache"

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(path, problem)
        self.path = path
        self.problem = problem
        self.summary = f"artifact {path} cannot be used: {problem}"


class ArtifactCorruptError(ArtifactError):
    """The bytes are not the ones that were stored: a digest or a format does not match."""

    def __init__(self, path: str, expected: str, found: str) -> None:
        super().__init__(path, f"expected {expected}, found {found}")
        self.args = (path, expected, found)
        self.expected = expected
        self.found = found


class ArtifactIncompatibleError(ArtifactError):
    """The code is sound, but for another machine, torch or format than this one."""

    code = "artifact-incompatible"
    remedy = "Nothing needs to be done; each kind of machine keeps its own artifacts"

    def __init__(self, path: str, needs: str, has: str) -> None:
        super().__init__(path, f"it needs {needs}, this machine has {has}")
        self.args = (path, needs, has)
        self.needs = needs
        self.has = has


class ArtifactUnopenedError(ArtifactError):
    """The bytes are sound, and yet `compiler` cannot open them in this process."""

    code = "artifact-incompatible"
    outcome = "the piece is compiled again, or runs eager"
    remedy = "Read the message: a worker process could open it, and this one differs"

    def __init__(self, compiler: str, problem: str) -> None:
        super().__init__(f"of {compiler}", problem)
        self.args = (compiler, problem)
        self.compiler = compiler
        self.summary = f"code of {compiler} cannot be opened in this process: {problem}"


class BundleError(PrecastError):
    """A bundle cannot be read or written; `path` names it."""

    code = "artifact-corrupt"
    outcome = "nothing of it is used"
    remedy = "Make the bundle again, or copy it again from where it was made"

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(path, problem)
        self.path = path
        self.problem = problem
        self.summary = f"bundle {path} cannot be used: {problem}"


class BundleIncompatibleError(BundleError):
    """The bundle is sound, but all that it holds is for other machines or versions."""

    code = "artifact-incompatible"
    remedy = "Make a bundle on a machine of this kind, with the same torch"


class BundleUntrustedError(BundleError):
    """The bundle holds what no trusted key has signed."""

    code = "untrusted"
    remedy = (
        "Make it with `signing_key` and name the public key in `trusted_keys`, "
        "or set `allow_unsigned` to run code that nobody vouches for"
    )


class BundleIncompleteError(BundleError):
    """What a bundle should hold is not in the cache."""

    code = "not-recorded"
    outcome = "no bundle was written"
    remedy = "Compile the model first; `precast.status(model)` names what it uses"

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(path, problem)
        self.summary = f"bundle {path} cannot be made: {problem}"


class RecordingError(PrecastError):
    """A recording or a report cannot be read or written; `path` names it."""

    code = "artifact-corrupt"
    outcome = "no report was made"
    remedy = "Record with the setting `record`, or write one with precast.save_report(model, path)"

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(path, problem)
        self.path = path
        self.problem = problem
        self.summary = f"recording {path} cannot be used: {problem}"


class RecordingUnwritableError(RecordingError):
    """A recording or a report cannot be written to `path`."""

    outcome = "nothing was written"
    remedy = "Name a folder that is there and may be written"

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(path, problem)
        self.summary = f"{path} cannot be written: {problem}"


class StoreError(PrecastError):
    """A cache tier could not do its work. A cache must never stop a model."""

    code = "tier-failed"
    outcome = "the tier is skipped and tried again later"
    remedy = "Check that the tier is reachable and may be written, or set `cache_dir` elsewhere"

    def __init__(self, tier: str, operation: str, problem: str) -> None:
        super().__init__(tier, operation, problem)
        self.tier = tier
        self.operation = operation
        self.problem = problem
        self.summary = f"tier {tier!r} failed to {operation}: {problem}"


class UnsafeStoreError(StoreError):
    """A tier's files lie where other users of this machine could put code: it is not read."""

    code = "untrusted"
    outcome = "the tier is neither read nor written"

    def __init__(self, tier: str, operation: str, problem: str, remedy: str) -> None:
        super().__init__(tier, operation, problem)
        self.args = (tier, operation, problem, remedy)
        self.remedy = remedy


class TierSkippedError(StoreError):
    """A tier failed a short while ago and is not asked now. Nobody needs to hear of it again."""

    def __init__(self, tier: str, operation: str) -> None:
        super().__init__(tier, operation, "it failed a moment ago and is not asked for a while")
        self.args = (tier, operation)


def _ended(sentence: str) -> str:
    return sentence if sentence.endswith((".", "?", "!")) else f"{sentence}."


def as_capture_error(model: str, error: BaseException) -> PrecastError:
    """Return an error as one of ours: what is not meant for the user ended a capture."""
    if isinstance(error, PrecastError):
        return error
    return CaptureAbortedError(model, in_words(error))


def in_words(error: BaseException) -> str:
    """Return what an error says; that of an error from elsewhere after its class."""
    return str(error) if isinstance(error, PrecastError) else f"{type(error).__name__}: {error}"
