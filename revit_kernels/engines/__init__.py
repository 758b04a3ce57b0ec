"""Models made ready to answer: snapshots of their weights, laid out for one device and one way of answering."""

from revit_kernels.engines.answers import Answers
from revit_kernels.engines.captured import CapturedEngine
from revit_kernels.engines.clips import ClipEngine
from revit_kernels.engines.engine import QUANTIZE, Engine, StaleEngine, engine_of

__all__ = ["QUANTIZE", "Answers", "CapturedEngine", "ClipEngine", "Engine", "StaleEngine", "engine_of"]
