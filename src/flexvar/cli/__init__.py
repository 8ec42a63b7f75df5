"""The command `flexvar`. Each verb is a function that is handed its words; torch is imported by the verbs that need it."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence

from flexvar.cli.commands import run_train
from flexvar.cli.options import Words
from flexvar.cli.parsing import parsed, parser
from flexvar.cli.streams import CannotPrint, guarded_streams

__all__ = ["main", "parser"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; gives its exit status.

    0; 2 for a mistake that one line on stderr explains; 130 when interrupted; 141 when nobody reads any more what it prints.
    """
    with guarded_streams():
        return _run(parsed(arguments))


def _run(words: Words) -> int:
    finished = False
    if words.run is not run_train:  # large pages on Linux, for which torch asks when it first allocates: faster decoding, slower training
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: print(f"flexvar: {message}", file=sys.stderr)
        try:
            words.run(words)
            finished = True
            sys.stdout.flush()
        except CannotPrint as error:
            if isinstance(error.__cause__, BrokenPipeError):
                return 141
            how_far = "all else is done" if finished else "it ended there"
            print(f"flexvar: what this command prints could not be written ({error}); {how_far}", file=sys.stderr)
            return 2
        except (ValueError, OSError, ModuleNotFoundError, FloatingPointError) as error:
            if os.environ.get("FLEXVAR_TRACEBACK"):
                raise
            print(f"flexvar: {_one_line(error)}", file=sys.stderr)
            return 2
        except Exception as error:
            from flexvar.memory import is_out_of_memory

            if os.environ.get("FLEXVAR_TRACEBACK") or not is_out_of_memory(error):
                raise
            line = _one_line(error) if isinstance(error, MemoryError) else ""  # torch's own lines name no mend
            print(f"flexvar: {line or 'not enough memory; take smaller pictures or a smaller batch (see `flexvar plan`)'}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("flexvar: interrupted; nothing is half-written", file=sys.stderr)
            return 130
    return 0


def _one_line(error: Exception) -> str:
    """What an error says, without the traceback that a data loader's process puts before it."""
    text = str(error)
    if text.startswith("Caught ") and "Original Traceback" in text:
        text = text.rstrip().rsplit("\n", 1)[-1].partition(": ")[2]
    return " ".join(text.split())
