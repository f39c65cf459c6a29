from __future__ import annotations

from collections.abc import Callable

from precast.contract import digest_code, find_code


def test_code_is_digested_by_what_it_does() -> None:
    """Where it stands is no matter; its constants are."""
    one, moved, changed = (
        compile(text, "f.py", "exec").co_consts[0]
        for text in (
            "def f(x): return x * 2",
            "\n\n\ndef f(x): return x * 2",
            "def f(x): return x * 2.0",
        )
    )

    assert digest_code(one) == digest_code(moved) != digest_code(changed)


def test_code_is_found_behind_wrappers() -> None:
    def make(inner: Callable[[], int]) -> Callable[[], int]:
        return lambda: inner() + 0

    wrapped = make(lambda: 1)

    assert find_code("@", wrapped) is wrapped.__code__
    assert find_code("@/cell:inner", wrapped).co_consts == (None, 1)  # type: ignore[union-attr]
    assert find_code("no.such.module:f") is None
    assert find_code("json:JSONEncoder.no_such") is None
