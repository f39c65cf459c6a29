"""Why calls of a model run eager: what no compiled code may serve, reasons, what is given up."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd import forward_ad

from precast.capture.fingerprint import tensors_in
from precast.errors import CaptureAbortedError, Reason
from precast.events import FellBack
from precast.runtime.dispatch import any_requires_grad

if TYPE_CHECKING:
    from precast.session import Session

#: Calls that failed in vain, after which what they were for is not tried again.
MOST_FAILED_CALLS = 3


class WhyEager:
    """What is known of one model's calls that run eager.

    Notes may come from any thread; giving up and taking back are for one thread at a time.
    """

    def __init__(self, session: Session) -> None:
        self.reasons: list[Reason] = []
        self._session = session
        self._given_up: dict[str, Reason] = {}
        self._num_failed: dict[str, int] = {}

    def note(self, reason: Reason) -> None:
        """Keep a reason, and tell of it, where it is a new one."""
        if all(
            known.code != reason.code or known.message != reason.message for known in self.reasons
        ):
            self.reasons.append(reason)
            self._session.emit(FellBack(self._session.name, None, reason))

    def must_run_eager(
        self, owner: torch.nn.Module | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> bool:
        """Tell whether a call is one that no compiled code may serve, and note why.

        Args:
            owner: The module that is called; None: a function is.
            args: The call's.
            kwargs: The call's.
        """
        if torch._C._len_torch_dispatch_stack() or torch._C._is_tracing():
            return True  # Somebody traces through the model: let them see its own code.
        if forward_ad._current_level >= 0:
            self.note_gradients()  # Perhaps: which tensors have tangents costs more to ask.
            return True
        tensors = list(tensors_in((args, kwargs)))
        if any(tensor.is_conj() or tensor.is_neg() for tensor in tensors):
            self.note(
                Reason(
                    "outside-contract",
                    "an argument is a conjugate or negative view, which compiled code would read "
                    "without its sign; such calls run eager",
                    "Pass tensor.resolve_conj() or tensor.resolve_neg()",
                )
            )
            return True
        weights = owner.parameters() if owner is not None else ()
        return self.records_gradients(itertools.chain(weights, tensors))

    def records_gradients(self, tensors: Iterable[Any]) -> bool:
        """Tell whether a call with these tensors records gradients, and note it.

        They are only walked where gradients are recorded at all: a model has many.
        """
        if not torch.is_grad_enabled() or not any_requires_grad(tensors):
            return False
        self.note_gradients()
        return True

    def note_gradients(self) -> None:
        """Note that a call ran eager since it records gradients."""
        self.note(
            Reason(
                "grad-enabled",
                "the call records gradients, which compiled code does not; it ran eager",
                "Call the model under torch.inference_mode() or torch.no_grad()",
            )
        )

    def note_failed_call(self, error: BaseException) -> None:
        """Note that compiled code raised, and eager answered the call."""
        raised = f"compiled code raised {type(error).__name__}:"
        # Once a kind: what is said of memory has other figures each time.
        if any(known.message.startswith(raised) for known in self.reasons):
            return
        self.note(
            Reason(
                "compile-crashed",
                f"{raised} {error}; the call ran eager",
                "If eager does not raise for this call, please report it",
            )
        )

    def note_broken_start(self, error: BaseException) -> None:
        """Note that what should serve a call could not be looked up, and the call ran eager."""
        ended = f"a start was ended by {type(error).__name__}:"
        if any(known.message.startswith(ended) for known in self.reasons):
            return  # Once a kind: the rest names other files each time.
        remedy = CaptureAbortedError.remedy
        self.note(Reason("capture-failed", f"{ended} {error}; the call ran eager", remedy))

    def give_up(self, signature: str, reason: Reason) -> None:
        """Let calls of a signature run eager from now on."""
        self._given_up[signature] = reason
        self.note(reason)

    def has_given_up(self, signature: str) -> bool:
        """Whether calls of a signature run eager."""
        return signature in self._given_up

    def take_back(self, signature: str) -> bool:
        """Forget that a signature was given up; return whether so.

        Not for ever: a model that is called wrongly again and again is not captured each time.
        """
        if self.fails_too_often(signature):
            return False
        reason = self._given_up.pop(signature, None)
        self.reasons = [known for known in self.reasons if known is not reason]
        return True

    def fails_too_often(self, what: str) -> bool:
        """Count a failed call of a signature or an assembly; return whether that is enough."""
        self._num_failed[what] = self._num_failed.get(what, 0) + 1
        return self._num_failed[what] >= MOST_FAILED_CALLS

    def try_all_again(self) -> None:
        """Give no signature up any more."""
        self._given_up.clear()
