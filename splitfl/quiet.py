"""Warnings of libraries that a person at the terminal can do nothing about."""

from __future__ import annotations

import logging
import warnings

# One library calling another's deprecated name. Each entry says who warns of what; nothing of ours belongs here.
_BETWEEN_LIBRARIES = ((r"`is_gradient_checkpointing` is deprecated", FutureWarning),)  # peft calling transformers


# Loggers that speak, at every start, of kernels for machines that this one is not.
_CHATTY = ("torchao", "torch.utils._pytree")


def silence_library_warnings() -> None:
    """Hide them; tests do not call this."""
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    for message, category in _BETWEEN_LIBRARIES:
        warnings.filterwarnings("ignore", message=message, category=category)
