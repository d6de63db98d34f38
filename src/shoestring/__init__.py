"""shoestring: a compiler that makes training cheap."""

from shoestring.api import compile
from shoestring.frontend.capture import capture_forward, capture_step
from shoestring.ir.errors import ShoestringError
from shoestring.runtime.step import Inference, Step

__version__ = "0.1.0"

__all__ = ["Inference", "ShoestringError", "Step", "capture_forward", "capture_step", "compile"]
