"""aiosctl cancel and user remove: what belongs to a user, by the files of /aios alone."""

from __future__ import annotations

import argparse
import errno
import os
import pwd
import time
from collections.abc import Iterator

from aiosd.client import Failed, Files

SHOWN_S = 1.1  # the kernel may show an owner that is a second old
OBJECTS = ("keys", "agents", "contexts", "tools", "models", "access/groups")


def cancel(files: Files, options: argparse.Namespace) -> None:
    if options.user is not None:
        for line in cancel_all(files, uid_of(options.user)):
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


def remove(files: Files, options: argparse.Namespace) -> None:
    """Cancel the requests of a user, and remove his objects or give them to another user."""
    uid, to = uid_of(options.user), account(options.to) if options.to else None
    if os.geteuid() != 0:
        raise Failed(f"only root removes what is another's: sudo aiosctl user remove {options.user}")
    if uid == 0:
        raise Failed("root is not removed; name another user")
    if to and to.pw_uid == uid:
        raise Failed(f"{options.to} has the objects already; name another user with --to")
    time.sleep(SHOWN_S)
    lines = [*cancel_all(files, uid), *(leave(files, path, to) for path in objects(files, uid))]
    print("\n".join(lines) if lines else f"user {options.user} has nothing here")


def objects(files: Files, uid: int) -> list[str]:
    paths = [f"{folder}/{name}" for folder in OBJECTS for name in files.names(folder)]
    return [path for path in paths if owner(files, path) == uid]


def owner(files: Files, path: str) -> int | None:
    try:
        return (files.root / path).stat().st_uid
    except FileNotFoundError:  # it has ended meanwhile
        return None


def leave(files: Files, path: str, to: pwd.struct_passwd | None) -> str:
    """What root made and only gave to the user goes back to root, because rmdir refuses it. A key is nobody
    else's: it ends.
    """
    try:
        if to and not path.startswith("keys/"):
            files.give(path, to.pw_uid, to.pw_gid)
            return f"{path}: given to {to.pw_name}"
        files.remove(path)
    except FileNotFoundError:
        return f"{path}: has ended"
    except OSError as error:
        if error.errno not in (errno.EBUSY, errno.EPERM):
            raise
        files.give(path, 0, 0)
        return f"{path}: given back to root"
    return f"{path}: removed"


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


def uid_of(user: str) -> int:
    return int(user) if user.isdecimal() else account(user).pw_uid


def account(user: str) -> pwd.struct_passwd:
    try:
        return pwd.getpwnam(user)
    except KeyError:
        raise Failed(
            f"no user {user}; getent passwd lists the users. Name a user who was removed by the uid, which"
            " ls -ln /aios/agents shows"
        ) from None
