"""`Closing`: what is used in a `with` block and closes itself at the block's end."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from types import TracebackType
from typing import TypeVar

from activation_cache.runtime.errors import Interrupted, UserError

logger = logging.getLogger(__name__)

Own = TypeVar("Own", bound="Closing")


class Closing(ABC):
    """A context manager that calls its `close` on leaving.

    If the block failed, its error is the one to show, and what `close` can't finish is logged. A
    block that was asked to stop hasn't failed: the promise that everything is saved would be wrong.
    """

    def __enter__(self: Own) -> Own:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except UserError as failure:
            if error is None or isinstance(error, Interrupted):
                raise
            if str(failure) != str(error):
                logger.error("%s", failure)

    @abstractmethod
    def close(self) -> None:
        """Finish what is under way and give back what is held; raises `UserError`."""
