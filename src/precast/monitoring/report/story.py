"""What a recording tells: the verdict, the pieces, where their code came from, what it cost.

Plain values for `page.py`. Recordings are read as they come, also those of other versions: what is
missing or of another kind is left out.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from precast.errors import REASON_CODES
from precast.monitoring.report.reading import mapping, number, optional, rows, texts, word
from precast.monitoring.units import as_bytes, as_count, as_duration

#: Reasons that call for nothing: work is under way.
_UNDER_WAY = "compile-pending"

_DEEPEST = 8  # Of blocks in blocks.


class PieceStory:
    """One different piece: `letter` names it, `slots` are all places that run it."""

    def __init__(self, identity: str, letter: str, hue: int, data: Mapping[str, Any]) -> None:
        self.identity = identity
        self.letter = letter
        self.hue = hue
        self.data = data
        self.slots: list[Mapping[str, Any]] = []

    @property
    def anchor(self) -> str:
        """The name of its place on the page."""
        return f"piece-{self.letter}"

    @property
    def compiler(self) -> str:
        """What runs it, `eager` where nothing was compiled."""
        return word(self.slots[0].get("compiler"), "unknown") if self.slots else "unknown"

    @property
    def is_compiled(self) -> bool:
        """Whether compiled code runs it."""
        return self.compiler not in ("eager", "unknown")

    @property
    def reason(self) -> Mapping[str, Any]:
        """Why it is not compiled, or compiled in parts; empty: nothing to say."""
        return mapping(self.slots[0].get("reason")) if self.slots else {}

    @property
    def origin(self) -> str:
        """Where its code came from."""
        if not self.is_compiled:
            return ""
        return word(self.slots[0].get("from")).replace("cache", "the cache")

    def names(self) -> str:
        """The names of its places, in short."""
        found = list(dict.fromkeys(word(slot.get("name"), "?") for slot in self.slots))
        return found[0] if len(found) == 1 else f"{found[0]} … {found[-1]}"

    def timing(self) -> list[Timing]:
        """What one call of it takes, for each set of sizes that was tried."""
        found = [Timing(row) for row in rows(self.data.get("timing"))]
        return [timing for timing in found if timing.is_known]


class Timing:
    """The seconds of one call, compiled and eager, and where they lie with 95 % confidence."""

    def __init__(self, row: Mapping[str, Any]) -> None:
        self.compiled_s = number(row.get("compiled_s"))
        self.eager_s = number(row.get("eager_s"))
        self.compiled_range_s = _range(row.get("compiled_range_s"))
        self.eager_range_s = _range(row.get("eager_range_s"))
        self.num_turns = int(number(row.get("num_turns")))
        self.sizes = ", ".join(
            f"{name} = {size}" for name, size in mapping(row.get("sizes")).items()
        )

    @property
    def is_known(self) -> bool:
        """Whether it says anything."""
        return self.compiled_s > 0 and self.eager_s > 0

    @property
    def speedup(self) -> float:
        """Eager's time over compiled code's."""
        return self.eager_s / self.compiled_s

    @property
    def speedup_range(self) -> tuple[float, float] | None:
        """Between what the speed-up lies; careful, since both ends are taken at their worst."""
        if self.compiled_range_s is None or self.eager_range_s is None:
            return None
        return (
            self.eager_range_s[0] / self.compiled_range_s[1],
            self.eager_range_s[1] / self.compiled_range_s[0],
        )


class AssemblyStory:
    """A compiled kind of call: its slots in order, and the operators that run between them."""

    def __init__(self, name: str, data: Mapping[str, Any]) -> None:
        self.name = name
        self.data = data
        self.slots = rows(data.get("slots"))
        self.code = word(data.get("execution_code"))
        self.natives = _natives(self.code, texts(data.get("native")))
        self.conditions = texts(data.get("conditions"))
        self.key = word(data.get("key"))

    def shapes(self) -> str:
        """The shapes of the call that was captured."""
        return ", ".join(f"[{', '.join(texts(shape))}]" for shape in _lists(self.data))


class Story:
    """Everything that the page says, from one recording."""

    def __init__(self, recording: Mapping[str, Any]) -> None:
        self.recording = recording
        self.model = mapping(recording.get("model"))
        self.process = mapping(recording.get("process"))
        self.events = rows(recording.get("events"))
        self.name = word(self.model.get("model")) or self._name_of_events()
        self.pieces: dict[str, PieceStory] = {}
        self.assemblies = [
            AssemblyStory(word(model.get("model"), "?"), data)
            for model in self._models(self.model)
            for data in rows(model.get("assemblies"))
        ]
        self._name_pieces()
        self._job_keys = self._keys_of_jobs()
        self.reasons = self._reasons()
        self.settings = mapping(self.model.get("settings"))

    # -- reading ---------------------------------------------------------------

    def of_kind(self, *names: str) -> list[Mapping[str, Any]]:
        """Return the events of these names, in order."""
        return [event for event in self.events if event.get("event") in names]

    def _name_of_events(self) -> str:
        return next(
            (word(event.get("model")) for event in self.events if event.get("model")), "A model"
        )

    def _models(self, model: Mapping[str, Any], depth: int = 0) -> Iterator[Mapping[str, Any]]:
        """Iterate over a model and the blocks that were compiled apart."""
        yield model
        if depth < _DEEPEST:
            for block in rows(model.get("blocks")):
                yield from self._models(block, depth + 1)

    def _name_pieces(self) -> None:
        known = mapping(self.model.get("pieces"))
        for assembly in self.assemblies:
            for slot in assembly.slots:
                identity = word(slot.get("piece"), "?")
                if identity not in self.pieces:
                    count = len(self.pieces)
                    self.pieces[identity] = PieceStory(
                        identity, _letter(count), count % 8, mapping(known.get(identity))
                    )
                self.pieces[identity].slots.append(slot)

    def _keys_of_jobs(self) -> dict[int, str]:
        """Return the key that a job's piece got: a name may stand for several pieces."""
        found: dict[int, str] = {}
        waiting: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
        for event in self.events:
            if event.get("event") not in ("JobFinished", "PieceCompiled"):
                continue
            jobs = waiting.setdefault((word(event.get("piece")), str(event.get("worker_pid"))), [])
            if event.get("event") == "JobFinished" and not event.get("code"):
                jobs.append(event)
            elif event.get("event") == "PieceCompiled" and jobs:
                found[id(jobs.pop(0))] = word(event.get("key"))
        return found

    def piece_of(self, event: Mapping[str, Any]) -> PieceStory | None:
        """Return the piece that an event is about, None where that is not certain."""
        key = word(event.get("key")) or self._job_keys.get(id(event), "")
        if key in self.pieces:
            return self.pieces[key]
        name = word(event.get("piece")).partition(", part ")[0]
        found = [
            piece
            for piece in self.pieces.values()
            if any(slot.get("name") == name for slot in piece.slots)
        ]
        return found[0] if len(found) == 1 else None

    # -- figures ---------------------------------------------------------------

    @property
    def num_slots(self) -> int:
        """How many places run a piece, in all kinds of calls."""
        if not self.assemblies:
            return self._sum_of_ready("pieces")
        return sum(len(assembly.slots) for assembly in self.assemblies)

    @property
    def num_compiled(self) -> int:
        """How many of them run compiled code."""
        if not self.assemblies:
            return min(self._sum_of_ready("compiled"), self.num_slots)
        return sum(
            slot.get("compiler") not in (None, "eager")
            for assembly in self.assemblies
            for slot in assembly.slots
        )

    @property
    def num_unique(self) -> int:
        """How many pieces differ."""
        return len(self.pieces) or self._sum_of_ready("unique_pieces")

    def _sum_of_ready(self, field: str) -> int:
        """Add up what events say of a model that the recording itself does not know."""
        if self.model:
            return 0
        return sum(int(number(event.get(field))) for event in self.of_kind("ModelReady"))

    @property
    def is_warm(self) -> bool | None:
        """Whether the first start traced nothing; None: there was none."""
        warm = self.model.get("is_warm")
        if isinstance(warm, bool):
            return warm
        ready = self.of_kind("ModelReady")
        return bool(ready[0].get("warm")) if ready else None

    @property
    def start_seconds(self) -> float | None:
        """How long the first start took."""
        seconds = optional(self.model.get("start_seconds"))
        ready = self.of_kind("ModelReady")
        return optional(ready[0].get("seconds")) if seconds is None and ready else seconds

    @property
    def seconds_saved(self) -> float:
        """What compiling took where it was not needed again, in seconds of the workers."""
        return sum(number(event.get("seconds_saved")) for event in self.of_kind("ModelReady"))

    @property
    def compile_seconds(self) -> float:
        """What compiling took here, in seconds of the workers."""
        return sum(number(event.get("seconds")) for event in self.of_kind("PieceCompiled"))

    def is_meant_eager(self) -> bool:
        """Whether the settings ask for nothing compiled."""
        value = {name: mapping(row).get("value") for name, row in self.settings.items()}
        return (
            value.get("compiler") == "eager"
            or value.get("use_inductor") is False
            or value.get("compilation_level") == "none"
        )

    def whole_timing(self) -> tuple[Timing, int] | None:
        """Return what the pieces of the first assembly take together, and how many were timed."""
        if not self.assemblies:
            return None
        timed = []
        for slot in self.assemblies[0].slots:
            piece = self.pieces[word(slot.get("piece"), "?")]
            if piece.is_compiled and piece.timing():
                timed.append(piece.timing()[0])
        if not timed:
            return None
        total = Timing({})
        total.compiled_s = sum(timing.compiled_s for timing in timed)
        total.eager_s = sum(timing.eager_s for timing in timed)
        ours = [timing.compiled_range_s for timing in timed if timing.compiled_range_s]
        theirs = [timing.eager_range_s for timing in timed if timing.eager_range_s]
        if len(ours) == len(theirs) == len(timed):
            total.compiled_range_s = sum(low for low, _ in ours), sum(high for _, high in ours)
            total.eager_range_s = sum(low for low, _ in theirs), sum(high for _, high in theirs)
        return total, len(timed)

    # -- the verdict -------------------------------------------------------------

    @property
    def tone(self) -> str:
        """How it went, in a word: `good`, `mixed`, `eager`, `working` or `unknown`."""
        if any(piece.reason.get("code") == _UNDER_WAY for piece in self.pieces.values()):
            return "working"
        behind = mapping(self.model.get("behind"))
        is_busy = bool(behind.get("doing") or number(behind.get("waiting")))
        if is_busy and (self.num_compiled < self.num_slots or not self.num_slots):
            return "working"
        if self._is_guarded_elsewhere():
            return "unknown"
        if not self.num_slots:
            return "eager" if self._model_reasons() else "unknown"
        if self.num_compiled == self.num_slots:
            return "good" if not self._model_reasons() else "mixed"
        return "mixed" if self.num_compiled else "eager"

    def verdict(self) -> str:
        """Say in one sentence what runs compiled, what does not and why, what it cost and saved."""
        return f"{self._what_runs()}{self._what_it_took()}."

    def _what_runs(self) -> str:
        total, done = self.num_slots, self.num_compiled
        if self.tone != "working" and self._is_guarded_elsewhere():
            return self._what_is_guarded_elsewhere()
        if not total:
            reasons = self._model_reasons()
            if self.tone == "working":
                return f"{self.name} is being captured while it serves: calls run eager"
            if reasons:
                code = word(reasons[0].get("code"), "?")
                return f"{self.name} runs eager: {_meaning(code)} ({code})"
            if self.is_meant_eager():
                return f"{self.name} runs eager, as the settings ask"
            return f"{self.name} has served no call that was compiled"
        if self.tone == "working":
            return (
                f"{self.name} is being compiled while it serves: {done} of "
                f"{as_count(total, 'piece')} are in place"
            )
        if done == total:
            what = f"All {as_count(total, 'piece')}" if total > 1 else "The one piece"
            verb = "run" if total > 1 else "runs"
            note = ", a part of the model runs eager" if self._model_reasons() else ""
            return f"{what} of {self.name} {verb} compiled{note}"
        if not done and self.is_meant_eager():
            return (
                f"{self.name} runs as {as_count(total, 'piece')} of eager code, as the settings ask"
            )
        codes = Counter(
            word(mapping(slot.get("reason")).get("code"), "no reason given")
            for assembly in self.assemblies
            for slot in assembly.slots
            if slot.get("compiler") == "eager"
        )
        why = ", ".join(code for code, _ in codes.most_common(3))
        eager = total - done
        return (
            f"{done} of {as_count(total, 'piece')} of {self.name} run compiled and {eager} "
            f"{'stays' if eager == 1 else 'stay'} eager ({why})"
        )

    def _is_guarded_elsewhere(self) -> bool:
        """Whether Dynamo serves the calls, with pieces of Precast's, and traces at each start."""
        if not self.of_kind("PlanMade") or self.of_kind("AssemblyLoaded"):
            return False
        codes = [reason.get("code") for reason in self._model_reasons()]
        if "trace-on-start" in codes:
            return not self.assemblies
        # `torch.compile` hands graphs over: nothing is captured here.
        return not self.of_kind("CaptureFinished")

    def _what_is_guarded_elsewhere(self) -> str:
        plans = self.of_kind("PlanMade")
        pieces = sum(int(number(plan.get("pieces"))) for plan in plans)
        counts = {
            "compiled here": len(self.of_kind("PieceCompiled")),
            "from the cache": len(self.of_kind("PieceLoaded")) - len(self.of_kind("PieceCompiled")),
            "that failed": len({word(e.get("piece")) for e in self.of_kind("PieceFailed")}),
        }
        found = ", ".join(f"{count} {what}" for what, count in counts.items() if count > 0)
        return f"{self.name} is traced at every start and runs as {as_count(pieces, 'piece')}" + (
            f": {found}" if found else ""
        )

    def _what_it_took(self) -> str:
        seconds = self.start_seconds
        if seconds is None:
            return ""
        took, saved = as_duration(seconds), as_duration(self.seconds_saved)
        if self.is_warm:
            spared = f" and spared {saved} of compiling" if self.seconds_saved else ""
            return f"; it started from the cache in {took}{spared}"
        cost = as_duration(self.compile_seconds)
        compiling = f" with {cost} of compiling in workers" if self.compile_seconds else ""
        spared = f", and {saved} of compiling were spared" if self.seconds_saved else ""
        return f"; its first start took {took}{compiling}{spared}"

    # -- what does not run compiled --------------------------------------------

    def _model_reasons(self) -> list[Mapping[str, Any]]:
        return [
            reason for model in self._models(self.model) for reason in rows(model.get("reasons"))
        ]

    def _reasons(self) -> list[dict[str, Any]]:
        """Return reasons by code and remedy, with what they are about; those of now first."""
        found: dict[tuple[str, str], dict[str, Any]] = {}

        def note(reason: Any, what: str, *, is_now: bool) -> None:
            reason = mapping(reason)
            code, remedy = word(reason.get("code")), word(reason.get("remedy"))
            if not code:
                return
            entry = found.setdefault(
                (code, remedy),
                {"code": code, "meaning": _meaning(code), "remedy": remedy, "is_now": is_now}
                | {"messages": [], "locations": [], "what": []},
            )
            for name, value in (
                ("messages", word(reason.get("message"))),
                ("locations", word(reason.get("location"))),
                ("what", what),
            ):
                if value and value not in entry[name]:
                    entry[name].append(value)

        for reason in self._model_reasons():
            note(reason, "the model", is_now=True)
        for piece in self.pieces.values():
            for slot in piece.slots:
                note(slot.get("reason"), f"piece {piece.letter}", is_now=True)
        for event in self.events:
            named = self.piece_of(event)
            about = _about(event) if named is None else f"piece {named.letter}"
            note(event.get("reason"), about, is_now=False)
        return list(found.values())

    # -- the cache ---------------------------------------------------------------

    def tiers(self) -> list[dict[str, Any]]:
        """Return for each tier what was found there, published there, and failed there."""
        found: dict[str, dict[str, Any]] = {}
        for event in self.events:
            name = word(event.get("tier"))
            kind = event.get("event")
            if not name or kind == "PieceLoaded":
                continue
            row = found.setdefault(
                name,
                {"tier": name, "hits": 0, "hit_bytes": 0.0, "hit_s": 0.0, "published": 0}
                | {"published_bytes": 0.0, "failures": 0, "refused": 0},
            )
            match kind:
                case "CacheHit" | "BlobFetched":
                    row["hits"] += kind == "CacheHit"
                    row["hit_bytes"] += number(event.get("num_bytes"))
                    row["hit_s"] += number(event.get("seconds"))
                case "ArtifactPublished":
                    row["published"] += 1
                    row["published_bytes"] += number(event.get("num_bytes"))
                case "TierFailed" | "TierSkipped":
                    row["failures"] += 1
                case "ArtifactQuarantined" | "ArtifactRefused":
                    row["refused"] += 1
                case _:
                    pass
        return [row for row in found.values() if any(row[name] for name in row if name != "tier")]

    def misses(self) -> list[Mapping[str, Any]]:
        """Return what was looked for in vain, with its cause."""
        known = rows(self.model.get("misses"))
        if known:
            return known
        return [
            {
                "kind": "piece" if event.get("event") == "PieceMissed" else "assembly",
                "name": event.get("piece") or event.get("model"),
                "key": event.get("key"),
                "cause": "not explained",
            }
            for event in self.of_kind("PieceMissed", "AssemblyMissed")
        ]

    # -- memory --------------------------------------------------------------------

    def memory(self) -> list[tuple[str, str, str]]:
        """Return what was measured of memory: what, how much, a remark."""
        found: list[tuple[str, str, str]] = []
        samples = [
            optional(row.get("resident_bytes")) for row in rows(self.recording.get("memory"))
        ]
        last = len(samples) - 1
        for place, size in enumerate(samples):
            if size is None or 1 < place < last:
                continue
            label = (
                "This process, before" if not place else
                "This process, now" if place == last else "This process, when ready"
            )  # fmt: skip
            grown = size - (samples[0] or size)
            remark = f"{as_bytes(grown)} more than before" if grown > 0 else ""
            found.append(
                (label, as_bytes(size), remark if place else "resident, libraries included")
            )
        weights = mapping(self.model.get("weights"))
        if weights:
            count = as_count(int(number(weights.get("num_tensors"))), "tensor")
            millions = number(weights.get("num_elements")) / 1e6
            found.append(
                (
                    "Weights",
                    as_bytes(number(weights.get("bytes"))),
                    f"{count}, {millions:,.1f} million values",
                )
            )
        sizes = [number(piece.data.get("artifact_bytes")) for piece in self.pieces.values()]
        if sum(sizes):
            count = as_count(sum(size > 0 for size in sizes), "library", "libraries")
            found.append(
                ("Compiled code", as_bytes(sum(sizes)), f"{count}, shared by equal pieces")
            )
        peaks = [
            (number(event.get("peak_bytes")), word(event.get("piece")))
            for event in self.of_kind("JobFinished")
            if event.get("peak_bytes")
        ]
        if peaks:
            most, name = max(peaks)
            found.append(
                ("Largest compile worker", as_bytes(most), f"with its children, at {name}")
            )
        device = mapping(self.model.get("device"))
        if device:
            found.append(
                (
                    word(device.get("name"), "GPU"),
                    as_bytes(number(device.get("allocated_bytes"))),
                    f"{as_bytes(number(device.get('most_reserved_bytes')))} reserved at most",
                )
            )
        return found

    # -- for programs ----------------------------------------------------------------

    def summary(self) -> dict[str, Any]:
        """Return what the top of the page says, for programs."""
        timed = self.whole_timing()
        return {
            "model": self.name,
            "verdict": self.verdict(),
            "tone": self.tone,
            "pieces": self.num_slots,
            "unique_pieces": self.num_unique,
            "compiled": self.num_compiled,
            "is_warm": self.is_warm,
            "start_seconds": self.start_seconds,
            "compile_seconds": self.compile_seconds,
            "seconds_saved": self.seconds_saved,
            "speedup": None if timed is None else timed[0].speedup,
            "speedup_range": None if timed is None else timed[0].speedup_range,
            "reasons": [
                {name: value for name, value in reason.items() if name != "meaning"}
                for reason in self.reasons
            ],
            "misses": [dict(miss) for miss in self.misses()],
            "tiers": self.tiers(),
        }


def _range(value: Any) -> tuple[float, float] | None:
    """Return two positive numbers in order, None where it is nothing such."""
    if not isinstance(value, list) or len(value) != 2:
        return None
    low, high = number(value[0]), number(value[1])
    return (low, high) if 0 < low <= high else None


def _lists(data: Mapping[str, Any]) -> list[Any]:
    example = data.get("example")
    return (
        [shape for shape in example if isinstance(shape, list)] if isinstance(example, list) else []
    )


def _letter(count: int) -> str:
    """Return A … Z, AA, AB, …"""
    letters = ""
    count += 1
    while count:
        count, rest = divmod(count - 1, 26)
        letters = chr(65 + rest) + letters
    return letters


def _meaning(code: str) -> str:
    return REASON_CODES.get(code, "a reason that this version does not know")


def _about(event: Mapping[str, Any]) -> str:
    if event.get("pass_name"):
        return f"pass {event['pass_name']} at {event.get('piece')}"
    if word(event.get("piece")):
        return f"{event['piece']}"
    return f"tier {event['tier']}" if word(event.get("tier")) else ""


def _natives(code: str, targets: list[str]) -> dict[int, list[str]]:
    """Return which operators run natively before each slot's place, by the execution code.

    The key past the last place has those that follow it.
    """
    found: dict[int, list[str]] = {}
    waiting: list[str] = []
    last = -1
    for line in code.splitlines():
        call = re.search(r"\bpieces\[(\d{1,6})\]\(", line)
        if call is not None:
            last = int(call[1])
            if waiting:
                found[last] = waiting
                waiting = []
        elif line.startswith("    "):
            waiting += [target for target in targets if f"{target}(" in line]
    if waiting:
        found[last + 1] = waiting
    return found
