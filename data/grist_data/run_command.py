"""How the small command lines end: an error of input is one line on stderr, Ctrl-C and SIGTERM leave nothing behind."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable
from types import FrameType


def run_command(action: Callable[[], int]) -> int:
    """The exit status: what `action` returns; 2 for an error of input, 130 when interrupted."""
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        return action()
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing half-written was left behind", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)


def parser_for(name: str, doc: str | None) -> argparse.ArgumentParser:
    """A parser whose help opens with the module's own docstring, examples included."""
    return argparse.ArgumentParser(
        f"python -m grist_data.{name}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def _stop(number: int, frame: FrameType | None) -> None:
    """SIGTERM ends like Ctrl-C: temporary files are removed on the way out."""
    raise KeyboardInterrupt
