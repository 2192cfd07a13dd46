"""aiosctl cancel and user remove: what belongs to a user, by the files of /aios alone."""

from __future__ import annotations

import argparse
import errno
import os
import pwd
from collections.abc import Iterator

from aiosd.client import Failed, Files


def cancel(files: Files, options: argparse.Namespace) -> None:
    if options.user is not None:
        for line in cancel_all(files, account(options.user).pw_uid):
            print(line)
        return
    agent = next((agent for id, _, agent in unfinished(files) if id == options.id), None)
    if agent is None or not end(files, options.id, agent):
        raise Failed(f"no unfinished request {options.id}; aiosctl queue shows them")


def cancel_all(files: Files, uid: int) -> Iterator[str]:
    """Cancel the unfinished requests of a user. A loop comes before its steps and ends them."""
    for id, owner, agent in unfinished(files):
        if owner == str(uid) and end(files, id, agent):
            yield f"request {id}: cancelled"


def unfinished(files: Files) -> list[tuple[str, str, str]]:
    """Number, uid and agent of each request in the queue, the oldest first."""
    rows = [line.split() for line in files.read("scheduler/queue").splitlines()[1:]]
    return [(row[0], row[2], row[3]) for row in rows]


def end(files: Files, id: str, agent: str) -> bool:
    """Cancel a request. False: it has ended meanwhile."""
    place = f"requests/{id}"
    if agent != "-" and not os.access(files.root / place, os.X_OK):  # a guest's, who asks an agent of ours
        place = f"agents/{agent}/{place}"
    try:
        files.write(f"{place}/ctl", "cancel")
    except FileNotFoundError:
        return False
    except PermissionError as error:
        if error.errno != errno.EPERM:
            raise
        return False
    return True


def account(user: str) -> pwd.struct_passwd:
    try:
        return pwd.getpwnam(user)
    except KeyError:
        raise Failed(f"no user {user}; getent passwd lists the users") from None
