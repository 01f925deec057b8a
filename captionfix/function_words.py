"""Words that name nothing to be seen: dimmed in figures, not grounded in training, not counted when measured."""

from __future__ import annotations

_LITTLE = (
    "a an the some any this that these those its his her their my your our it he she they them him i you we who which "
    "what of in on at by to from for with without into onto over under near up down out off through as and or but "
    "while is are was were be been being am has have had do does did there not no so than very "
    "<unk> <start> <end> unk . , ; : ! ? ' - \""
)
FUNCTION_WORDS = frozenset(_LITTLE.split())
"""English ones, lower case, with marks and a captioner's special words."""
