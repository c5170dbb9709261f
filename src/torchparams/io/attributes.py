"""What a file that replaces another takes over from it.

**The rule**, for every file that is written: a target that exists is replaced by a new file, which gets the old one's
group, owner, permissions, access control list and `user.` attributes, as far as the system lets this user set them.
Where the group cannot be kept, the group's permissions are cut to those of everybody. Setuid, setgid and sticky bits
and capabilities are never kept: they were given to other contents. Of a symbolic link as target, the link alone is
replaced, by a file with the attributes of the one that it led to; that one stays as it is.
"""

from __future__ import annotations

import os
import stat

from torchparams.io import system

_KEPT = ("system.posix_acl_access", "security.selinux")


def guard(fd: int, old: str) -> None:
    """Let nobody read a new file who may not read the old one, while it is written."""
    about = _about(old)
    if about is not None and hasattr(os, "fchmod"):
        system.change_mode(fd, 0o600 | stat.S_IMODE(about.st_mode) & os.fstat(fd).st_mode & 0o777)


def keep(fd: int, old: str) -> list[str]:
    """Give a new file the attributes of the one that it will replace.

    Args:
        fd: The new file.
        old: Path of the old one; nothing is kept where there is none.

    Returns:
        What could not be kept, in words.
    """
    about = _about(old)
    if about is None or not hasattr(os, "fchmod"):
        return []
    lost = []
    here = os.fstat(fd)
    mode = stat.S_IMODE(about.st_mode) & 0o777
    # A user may give a file to a group of theirs, but seldom to another user: one after the other.
    if about.st_gid != here.st_gid and not _done(system.change_owner, fd, -1, about.st_gid):
        lost.append(f"the group {about.st_gid}")
        mode &= 0o707 | (mode & 0o007) << 3
    if about.st_uid != here.st_uid and not _done(system.change_owner, fd, about.st_uid, -1):
        lost.append(f"the owner {about.st_uid}")
    for name, value in _attributes(old).items():
        if not _done(system.set_attribute, fd, name, value):
            lost.append(f"the attribute {name}")
    if not _done(system.change_mode, fd, mode):
        lost.append(f"the permissions {mode:o}")
    return lost


def _about(path: str) -> os.stat_result | None:
    try:
        about = os.stat(path)
    except OSError:
        return None
    return about if stat.S_ISREG(about.st_mode) else None


def _attributes(path: str) -> dict[str, bytes]:
    """Extended attributes that say something of a file's users and not of its contents."""
    if not hasattr(os, "listxattr"):
        return {}
    try:
        names = [name for name in os.listxattr(path) if name.startswith("user.") or name in _KEPT]
        return {name: os.getxattr(path, name) for name in names}
    except OSError:  # the file system has none
        return {}


def _done(call: object, *arguments: object) -> bool:
    assert callable(call)
    try:
        call(*arguments)
    except OSError:
        return False
    return True
