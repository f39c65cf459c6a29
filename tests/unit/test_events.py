"""Events are plain values; listeners are joined so that none can stop a model."""

from __future__ import annotations

import pickle

from precast import events
from precast.errors import Reason
from precast.events import Emit, Event, Listeners


def test_events_are_values_that_pickle() -> None:
    event = events.FellBack("Decoder", None, Reason("compile-failed", "m", "r"))
    assert pickle.loads(pickle.dumps(event)) == event
    assert event != event.replace(piece="layer_0")


def test_every_listener_hears_every_event_in_order() -> None:
    first: list[Event] = []
    second: list[Event] = []
    emit: Emit = Listeners([first.append, second.append])
    heard = [events.ModelReleased("a"), events.ModelReleased("b")]
    for event in heard:
        emit(event)
    assert first == second == heard


def test_a_failing_listener_stops_nothing_and_is_reported_once() -> None:
    heard: list[Event] = []
    failures: list[str] = []

    def broken(event: Event) -> None:
        raise RuntimeError("no metrics server")

    emit = Listeners(
        [broken, heard.append], on_failure=lambda listener, error: failures.append(str(error))
    )
    emit(events.ModelReleased("a"))
    emit(events.ModelReleased("b"))
    assert len(heard) == 2
    assert failures == ["no metrics server"]
