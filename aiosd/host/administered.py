"""Files of the administrator: what this process may not read is an error, and does not count as missing.

Path.glob() finds nothing in a folder that it may not read. Rules and limits there would be silently void.
Any thread may call.
"""

from __future__ import annotations

import errno
import os
import pwd
import shlex
from fnmatch import fnmatchcase
from pathlib import Path

from aiosd.errors import ConfigError


def listed(folder: Path, pattern: str) -> list[Path]:
    """The files of a folder whose names fit, in the order of their names. A missing folder has none.

    Raises ConfigError.
    """
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise unreadable(folder, error) from None
    return [folder / name for name in sorted(names) if fnmatchcase(name, pattern)]


def is_there(file: Path) -> bool:
    """Raises ConfigError where this process may not look."""
    try:
        file.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise unreadable(file, error) from None
    return True


def unreadable(path: Path, error: OSError) -> ConfigError:
    """To be raised."""
    if error.errno == errno.EACCES:
        closed = next((folder for folder in reversed(path.parents) if not os.access(folder, os.X_OK)), path)
        bits = "rx" if closed.is_dir() else "r"
        hint = f"{reader()} has to read it: chmod a+{bits} {shlex.quote(str(closed))}"
    elif error.errno == errno.EISDIR:
        hint = f"files of the configuration have such names: mv {shlex.quote(str(path))} elsewhere"
    elif os.path.islink(path):
        hint = "remove the link"
    else:
        hint = "name a readable file with --config"
    return ConfigError(f"{path}: {error.strerror}", hint)


def reader() -> str:
    try:
        return f"user {pwd.getpwuid(os.geteuid()).pw_name}"
    except KeyError:
        return f"uid {os.geteuid()}"
