"""Before torch is used: that it is there."""

from __future__ import annotations

from dsq.errors import InputError


def need_torch(what: str) -> None:
    """Raise InputError, naming `what` needs it and the extra, when torch is missing."""
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"{what} needs PyTorch, which is not installed ({error}); pip install 'dsq[torch]'"
        ) from error
