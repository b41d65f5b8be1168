"""Stands in for pydantic where that isn't installed: the classes of a config, and no checks.

`benchmarks.accelerator` puts this folder at the end of the path, so that pydantic, if there is one,
is found first. A section is made of keywords and holds them, and the defaults of the rest;
validators and constraints do nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class _Default:
    default: Any = None
    default_factory: Callable[[], Any] | None = None

    def value(self) -> Any:
        return self.default if self.default_factory is None else self.default_factory()


def Field(
    default: Any = None, *, default_factory: Callable[[], Any] | None = None, **_: Any
) -> Any:
    """A default; what constrains the value is left out."""
    return _Default(default, default_factory)


class BaseModel:
    """A section of a config: compares and hashes by its values."""

    def __init__(self, **values: Any) -> None:
        fields = {
            name: kind
            for part in reversed(type(self).__mro__)
            for name, kind in vars(part).get("__annotations__", {}).items()
            if not str(kind).startswith("ClassVar")
        }
        unknown = values.keys() - fields.keys()
        assert not unknown, f"{type(self).__name__} has no {', '.join(sorted(unknown))}"
        for name in fields:
            if name in values:
                value = values[name]
            else:
                assert hasattr(type(self), name), f"{type(self).__name__} needs {name}"
                value = getattr(type(self), name)
                value = value.value() if isinstance(value, _Default) else value
            setattr(self, name, value)

    def model_copy(self, *, update: dict[str, Any]) -> Any:
        """The same with some values changed."""
        return type(self)(**(vars(self) | update))

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(repr(self))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({vars(self)})"


class TypeAdapter:
    """Takes every value as it is."""

    def __init__(self, kind: Any) -> None:
        self.kind = kind

    def validate_python(self, value: Any, **_: Any) -> Any:
        """The value."""
        return value


class ValidationError(ValueError):
    """Never raised."""


def ConfigDict(**options: Any) -> dict[str, Any]:
    """Options that nothing reads."""
    return options


def AfterValidator(function: Callable) -> Callable:
    """No check."""
    return function


BeforeValidator = AfterValidator


def field_validator(*_: Any, **__: Any) -> Callable[[Callable], Callable]:
    """No check: the function stays what it is."""
    return lambda function: function


model_validator = field_validator
