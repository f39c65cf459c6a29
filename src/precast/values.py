"""Frozen plain values: what a frozen dataclass gives, at a hundredth of its cost to import.

A warm start has a budget of milliseconds. `@dataclass` writes and compiles methods for each class
(0.3 to 0.5 ms each) and imports `inspect`; there are some forty value classes here. This base has
one `__init__` for all of them, and type checkers still see a frozen dataclass.

Deliberately without default factories, inheritance of fields and conversion: values are flat.
"""

from __future__ import annotations

# Not imported from `typing`, which costs 10 ms where nothing else has imported it.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, ClassVar

    from typing_extensions import Self, dataclass_transform
else:

    def dataclass_transform(**_):  # noqa: D103 - stands in for the type checker's own
        return lambda cls: cls


@dataclass_transform(frozen_default=True)
class Value:
    """Base of an immutable value whose fields are its annotated names.

    Equality, hash, repr and pattern matching go by the fields in order; pickling works. Only what
    the caller gave is stored in the instance, defaults stay on the class: `vars(value)` tells them
    apart. A subclass that defines `__post_init__` checks itself there.
    """

    _fields: ClassVar[tuple[str, ...]] = ()
    _is_keyword_only: ClassVar[bool] = False

    def __init_subclass__(cls, *, kw_only: bool = False) -> None:
        """Read the class's annotations once."""
        cls._fields = tuple(
            name
            for name, annotation in cls.__annotations__.items()
            if not str(annotation).startswith("ClassVar")
        )
        # By `setattr`, since type checkers take it for written by their own frozen dataclass.
        setattr(cls, "__match_args__", cls._fields)  # noqa: B010
        cls._is_keyword_only = kw_only

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        names = self._fields
        kind = type(self).__name__
        if args:
            if self._is_keyword_only or len(args) > len(names):
                most = 0 if self._is_keyword_only else len(names)
                raise TypeError(f"{kind}() takes at most {most} positional arguments")
            positional = dict(zip(names, args, strict=False))
            if twice := positional.keys() & kwargs.keys():
                raise TypeError(f"{kind}() got {min(twice)!r} twice")
            kwargs = positional | kwargs
        if unknown := [name for name in kwargs if name not in names]:
            raise self._unknown_field(unknown[0], kwargs[unknown[0]])
        if missing := [n for n in names if n not in kwargs and not hasattr(type(self), n)]:
            raise TypeError(f"{kind}() needs {', '.join(missing)}")
        self.__dict__.update(kwargs)
        self.__post_init__()

    def __post_init__(self) -> None:
        """Check the fields; a subclass that has rules overrides this."""

    def _unknown_field(self, name: str, value: object) -> Exception:
        """Return the error for a name that is no field; `value` is what it was given."""
        fields = ", ".join(self._fields)
        return TypeError(f"{type(self).__name__}() has no field {name!r}; it has {fields}")

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(
            f"{type(self).__name__} is frozen; make another with `replace({name}=...)`"
        )

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{type(self).__name__} is frozen; {name!r} cannot be deleted")

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return self.as_dict() == other.as_dict()

    def __hash__(self) -> int:
        return hash((type(self), *self.as_dict().values()))

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={value!r}" for name, value in self.as_dict().items())
        return f"{type(self).__name__}({fields})"

    def as_dict(self) -> dict[str, Any]:
        """Return all fields in their order, defaults filled in; nested values stay values."""
        return {name: getattr(self, name) for name in self._fields}

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some fields changed, checked like a new one."""
        return type(self)(**{**vars(self), **changes})

    __replace__ = replace  # What `copy.replace` calls, from Python 3.13 on.
