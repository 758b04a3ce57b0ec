"""Files written whole or not at all."""

import os
from pathlib import Path


def write_whole(path: Path, write) -> None:
    """Let `write` write a file under a temporary name, which then takes its own: whole or not at all.

    Raises RuntimeError, in one sentence, where the disk is full or the folder cannot be written to; what was there
    before is then still there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        os.replace(temporary, path)
    except Exception as error:  # of the disk, but writers have exceptions of their own for it
        why = getattr(error, "strerror", None) or " ".join(str(error).split())[:300]
        kept = " (the file of before is unharmed)" if path.exists() else ""
        raise RuntimeError(f"{path} could not be written: {why}{kept}") from error
    finally:
        temporary.unlink(missing_ok=True)
