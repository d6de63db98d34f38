"""Local rewrites: sets of rules that add with `+`."""

from .algebra import ALGEBRA
from .canonical import CANONICAL

__all__ = ["ALGEBRA", "CANONICAL"]
