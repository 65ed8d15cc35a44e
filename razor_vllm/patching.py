"""Replacing functions of vLLM by wrappers, and undoing it."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

_originals: list[tuple[Any, str, Any]] = []
"""Owner, name and original, in the order of the replacements."""


def wrap(owner: Any, name: str, make: Callable[[Callable[..., Any]], F]) -> None:
    """Replace owner.name by make(owner.name), once.

    Static and class methods stay what they are, and so do properties that are only read.

    Raises:
        AttributeError: the owner itself does not define the name.
    """
    if name not in vars(owner):
        raise AttributeError(f"{owner.__name__} has no {name}")
    raw = vars(owner)[name]
    kind = type(raw) if isinstance(raw, staticmethod | classmethod | property) else None
    original = raw.fget if kind is property else raw.__func__ if kind else raw
    if getattr(original, "_razor", False):
        return
    wrapper: Any = functools.wraps(original)(make(original))
    wrapper._razor = True
    _originals.append((owner, name, raw))
    setattr(owner, name, kind(wrapper) if kind else wrapper)


def undo() -> None:
    """Restore everything that `wrap` replaced."""
    while _originals:
        setattr(*_originals.pop())
