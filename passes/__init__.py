"""Rewrites of the typed program: one module a pass, and the pipeline that runs them."""

from .base import Numerics, Pass, PassReport, Skipped, name_of
from .pipeline import NumericCheck, Pipeline, StepRecord, check
from .registry import available, default_pipeline, find_pass, make_pass, make_passes

__all__ = [
    "NumericCheck",
    "Numerics",
    "Pass",
    "PassReport",
    "Pipeline",
    "Skipped",
    "StepRecord",
    "available",
    "check",
    "default_pipeline",
    "find_pass",
    "make_pass",
    "make_passes",
    "name_of",
]
