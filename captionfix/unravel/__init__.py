"""The engine: a recorded forward pass, and evidence unraveled back through it.

It knows tensors and operations, nothing of captions, images or models.
"""

from . import rules  # noqa: F401  (registers them)
from .evidence import Evidence, heaviest, join
from .feature_map import find_feature_map
from .policy import POLICIES, Policy
from .registry import RULES, Link, register, register_expansion
from .trace import Operation, Slot, Trace, Value
from .walk import Account, start, walk

__all__ = [
    "POLICIES",
    "RULES",
    "Account",
    "Evidence",
    "Link",
    "Operation",
    "Policy",
    "Slot",
    "Trace",
    "Value",
    "find_feature_map",
    "heaviest",
    "join",
    "register",
    "register_expansion",
    "start",
    "walk",
]
