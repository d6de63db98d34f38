"""Backends: a function in, something that runs out."""

from .base import Backend, Executable
from .registry import backend_names, get_backend

__all__ = ["Backend", "Executable", "backend_names", "get_backend"]
