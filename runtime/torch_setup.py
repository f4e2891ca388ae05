"""Before torch is used: that it is there, and with how many threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from dsq.errors import InputError


def need_torch(what: str) -> None:
    """Raise InputError, naming `what` needs it and the extra, when torch is missing."""
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"{what} needs PyTorch, which is not installed ({error}); pip install 'dsq[torch]'"
        ) from error


@contextmanager
def torch_threads(n: int) -> Iterator[None]:
    """Within, torch computes with `n` threads; afterwards with as many as before."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)
