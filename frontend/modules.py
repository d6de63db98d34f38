"""The module path of what runs, while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from shoestring.ir import Tracer


@contextmanager
def module_paths(model: torch.nn.Module, tracer: Tracer) -> Iterator[None]:
    """Tells the tracer which module each operation belongs to, by forward hooks."""
    stack = tracer.locator.modules
    handles: list[Any] = []
    for path, module in model.named_modules():

        def enter(module: torch.nn.Module, args: Any, path: str = path) -> None:
            stack.append(path)

        def leave(module: torch.nn.Module, args: Any, output: Any) -> None:
            if stack:
                stack.pop()

        handles.append(module.register_forward_pre_hook(enter, prepend=True))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        stack.clear()
        for handle in handles:
            handle.remove()
