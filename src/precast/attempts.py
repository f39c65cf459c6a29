"""Captures of one model that were tried: those that failed are remembered across starts."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from precast.events import FailureRemembered

if TYPE_CHECKING:
    import types

    from precast.errors import Reason
    from precast.session import Session

#: Of remembered failures: those after which there is nothing for a start to do.
_CODES_OF_CAPTURES = frozenset(
    {"capture-failed", "split-failed", "compile-timeout", "compile-memory"}
)
_CODES_IN_SERVICE = frozenset({"verify-mismatch"})


class Attempts:
    """The last capture that was tried for each signature."""

    def __init__(self, session: Session, owner: Any) -> None:
        """Know of none yet.

        Args:
            session: Of the model. Its manager remembers.
            owner: The module that is served; None: a function is.
        """
        self._session = session
        self._owner = owner
        self._of: dict[str, str] = {}

    def of(self, signature: str) -> str:
        """Return the name of a capture that `why_in_vain` was asked about.

        Raises:
            KeyError: It was not.
        """
        return self._of[signature]

    def why_in_vain(
        self,
        signature: str,
        key: str,
        function: types.FunctionType,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Reason | None:
        """Say why an earlier capture failed and would again; None: it is to be tried.

        Or how what was made of such a call was found to be wrong in service.

        Args:
            signature: Of the call.
            key: Of what serves it.
            function: What is called.
            args: The call's, without the owner.
            kwargs: The call's.
        """
        from precast.capture.circumstances import attempt_key

        reason = self._recall(key, _CODES_IN_SERVICE)
        if reason is not None:
            return reason
        attempt = self._of[signature] = attempt_key(key, function, self._owner, args, kwargs)
        if self._session.config.on_error == "raise":
            return None  # The error itself is wanted, and not that there was one.
        reason = self._recall(attempt, _CODES_OF_CAPTURES)
        if reason is not None:
            self._session.emit(FailureRemembered(self._session.name, attempt, reason))
        return reason

    def remember(self, signature: str, reason: Reason, code: str | None = None) -> None:
        """Remember that a capture leaves nothing to load: nobody need wait for it, or repeat it.

        Args:
            signature: Of the call.
            reason: Why.
            code: In whose place it happens, where that is not what the reason is about.
        """
        if signature in self._of:
            codes = (code or reason.code,)
            self._session.manager.failures.remember(self._of[signature], reason, codes)

    def forget(self, signature: str) -> None:
        """Forget that a capture failed."""
        if signature in self._of:
            self._session.manager.failures.forget(self._of[signature])

    def _recall(self, work: str, codes: Collection[str]) -> Reason | None:
        failures = self._session.manager.failures
        failure = failures.recall(work)
        if failure is None or failure["reason"]["code"] not in codes:
            return None
        return failures.explain(failure)
