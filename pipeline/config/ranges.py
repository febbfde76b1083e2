"""Ranges of numeric options, written beside their types, and the record that checks them when it is made."""

from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, ClassVar, get_type_hints

from cache import UserError

MOST = 10**9
"""Of anything, unless a range says otherwise: beyond it is a slip of the finger."""


@dataclass(frozen=True)
class Range:
    low: float
    high: float = MOST
    above: bool = False
    """Whether `low` itself is out of range."""

    def __contains__(self, value: float) -> bool:
        """False for NaN."""
        return self.low <= value <= self.high and not (self.above and value == self.low)

    def __str__(self) -> str:
        return f"above {self.low:,}, at most {self.high:,}" if self.above else f"{self.low:,} to {self.high:,}"


Count = Annotated[int, Range(1)]
Natural = Annotated[int, Range(0)]
"""0 has a meaning of its own."""
Seed = Annotated[int, Range(0, 2**64 - 1)]
Share = Annotated[float, Range(0, 1)]
Part = Annotated[float, Range(0, 1, above=True)]
"""A share that is not nothing."""
Positive = Annotated[float, Range(0, above=True)]
NotNegative = Annotated[float, Range(0)]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a command takes. Making one raises UserError for a field out of its range; None is in every one."""

    flag: ClassVar[str] = "--"
    """What stands before an option's name on the command line."""

    def __post_init__(self) -> None:
        for name, hint in _hints(type(self)).items():
            _check(self.flag + name.replace("_", "-"), getattr(self, name), hint)


@cache
def _hints(schema: type) -> dict[str, Any]:
    return get_type_hints(schema, include_extras=True)


def _check(flag: str, value: Any, hint: Any) -> None:
    values = value if isinstance(value, tuple) else () if value is None else (value,)
    for allowed in getattr(hint, "__metadata__", ()):
        if isinstance(allowed, Range) and (wrong := [each for each in values if each not in allowed]):
            # A number may have thousands of digits.
            raise UserError(f"{flag} out of range", found=f"{wrong[0]!s:.20}", expected=str(allowed))
