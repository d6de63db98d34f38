"""From a running torch program to a function."""

from .replay import Recording
from .tracer import Tracer, trace

__all__ = ["Recording", "Tracer", "trace"]
