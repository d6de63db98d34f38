"""From a running torch program to a function."""

from .tracer import Tracer, trace

__all__ = ["Tracer", "trace"]
