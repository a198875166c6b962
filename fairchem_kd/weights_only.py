"""Have torch read files without unpickling, whoever calls it and however."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

_ASKED = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


@contextlib.contextmanager
def weights_only() -> Iterator[None]:
    """Within the block every ``torch.load`` of this process is one with ``weights_only``.

    Of a caller that does not ask for it, before torch 2.6 by default, and of one that would fall
    back on unpickling.
    """
    before = os.environ.get(_ASKED)
    os.environ[_ASKED] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_ASKED]
        else:
            os.environ[_ASKED] = before
