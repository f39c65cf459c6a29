"""What answers for a piece that cannot be compiled: the failure told and remembered, and eager."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from precast.errors import CompileError, Reason
from precast.events import Emit, FailureRemembered, PieceFailed
from precast.piece_result import PieceResult, eager_result

if TYPE_CHECKING:
    from precast.cache.failures import FailureMemory
    from precast.compilers.chosen import ChosenCompilers
    from precast.graph.piece import Piece


class Fallback:
    """Has pieces that cannot be compiled run eager; raises instead where the user wants that."""

    def __init__(
        self, compilers: ChosenCompilers, failures: FailureMemory, emit: Emit, *, raises: bool
    ) -> None:
        self._compilers = compilers
        self._failures = failures
        self._emit = emit
        self._raises = raises

    def fail(
        self,
        piece: Piece,
        name: str,
        reason: Reason,
        work: str | None = None,
        codes: Sequence[str] = (),
    ) -> PieceResult:
        """Report a failure, and have the piece run eager.

        Args:
            piece: The piece.
            name: Its name, for reports.
            reason: Why it is not compiled.
            work: Under which it is remembered; None: the next start shall try again.
            codes: Of all that was tried, where that is more than the reason says.

        Raises:
            CompileError: The user wants failures to be raised.
        """
        failure = None
        if work is not None:
            failure = self._failures.remember(work, reason, codes or (reason.code,))
        self._emit(PieceFailed(name, "", str(self._compilers), reason))
        self._raise_if_wanted(name, reason)
        return eager_result(piece, reason, failure)

    def recall(self, piece: Piece, name: str, work: str) -> PieceResult | None:
        """Return the piece as eager where an earlier failure still holds; None: it may be tried.

        Raises:
            CompileError: It holds, and the user wants failures to be raised.
        """
        failure = self._failures.recall(work)
        if failure is None:
            return None
        reason = self._failures.explain(failure)
        self._emit(FailureRemembered(name, work, reason))
        self._raise_if_wanted(name, reason)
        return eager_result(piece, reason, failure)

    def _raise_if_wanted(self, name: str, reason: Reason) -> None:
        if self._raises:
            raise CompileError(name, str(self._compilers), reason.message)
