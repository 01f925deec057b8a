"""What captionfix raises for bad input. Every message says what was wrong and what to do about it."""

from __future__ import annotations


class CaptionfixError(Exception):
    """Base of all errors that a user of captionfix can cause or mend."""


class ImageError(CaptionfixError):
    """An image can't be read or is not acceptable."""


class CaptionError(CaptionfixError):
    """A caption is empty, too long, or has words that the captioner does not know."""


class CaptionerError(CaptionfixError):
    """A captioner's folder or weights are missing, incomplete or damaged."""


class OutputError(CaptionfixError):
    """A result can't be written where it was asked for, or what is there can't be read."""


class DataError(CaptionfixError):
    """Data for training or evaluation is missing or malformed."""


class UnsupportedOperation(CaptionfixError):
    """The engine met an operation without a rule."""


class PolicyError(CaptionfixError):
    """A policy, a method or one of their settings does not exist or does not fit the captioner."""
