"""For the API pages: the fields of our frozen values as the parameters of their constructors."""

from __future__ import annotations

from typing import Any

import griffe

#: What a `Value` is called with is found when it is made; to a reader its fields are what counts.
_BASES = {"Value", "Event"}


class Values(griffe.Extension):
    """Gives each subclass of `precast.values.Value` the signature that type checkers see."""

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        """Write the constructor of one class."""
        if not any(str(base).rpartition(".")[2] in _BASES for base in cls.bases):
            return
        keywords = {k: str(v) for k, v in getattr(cls, "keywords", {}).items()}
        kind = (
            griffe.ParameterKind.keyword_only
            if keywords.get("kw_only") == "True"
            else griffe.ParameterKind.positional_or_keyword
        )
        parameters = [griffe.Parameter("self")] + [
            griffe.Parameter(name, annotation=field.annotation, kind=kind, default=field.value)
            for name, field in cls.members.items()
            if field.is_attribute
            and field.annotation is not None
            and not str(field.annotation).startswith("ClassVar")
        ]
        cls.set_member(
            "__init__", griffe.Function("__init__", parameters=griffe.Parameters(*parameters))
        )
