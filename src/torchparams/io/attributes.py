"""Keep attributes of a file when it is replaced.

**Rule for every written file**: a new file that replaces a target gets the target's group, owner, permissions, access
control list and `user.` attributes, as far as the system permits. If the group cannot be kept, the group's permissions
are reduced to those of everybody. Setuid, setgid and sticky bits and capabilities are never kept, because they were
given to other content. If the target is a symbolic link, the link is replaced by a file with the attributes of the
linked file, which itself does not change.
"""

from __future__ import annotations

import os
import stat

from torchparams.io import system

_KEPT = ("system.posix_acl_access", "security.selinux")


def guard(fd: int, old: str) -> None:
    """Restrict reading of a new file during the write to those who may read the old one."""
    about = _about(old)
    if about is not None and hasattr(os, "fchown"):
        system.change_mode(fd, 0o600 | stat.S_IMODE(about.st_mode) & os.fstat(fd).st_mode & 0o777)


def keep(fd: int, old: str) -> list[str]:
    """Copy attributes of a file to the new file that will replace it.

    Args:
        fd: Descriptor of the new file.
        old: Path of the old file, which may be missing.

    Returns:
        Attributes that could not be kept, in words.
    """
    about = _about(old)
    if about is None or not hasattr(os, "fchown"):
        return []
    lost = []
    here = os.fstat(fd)
    mode = stat.S_IMODE(about.st_mode) & 0o777
    # A user may often change the group of a file, but rarely its owner: try them separately.
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
    """Extended attributes about the users of a file, not about its content."""
    if not hasattr(os, "listxattr"):
        return {}
    try:
        names = [name for name in os.listxattr(path) if name.startswith("user.") or name in _KEPT]
        return {name: os.getxattr(path, name) for name in names}
    except OSError:  # not supported by the file system
        return {}


def _done(call: object, *arguments: object) -> bool:
    assert callable(call)
    try:
        call(*arguments)
    except OSError:
        return False
    return True
