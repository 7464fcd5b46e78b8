"""One small module per command: parse, build, call, print."""

import sys
from types import TracebackType

from vit_train.system import streams

_told_before = sys.excepthook


def _told(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Says nothing of Ctrl-C, which Python then passes on: the process ends by the signal, 130 in a shell."""
    if not issubclass(kind, KeyboardInterrupt):
        _told_before(kind, error, trace)


streams.stand()  # before anything else is opened
sys.excepthook = _told  # before the imports of a command, which take a moment
