"""List directories behind a URL."""

from __future__ import annotations

from torchparams.errors import RemoteError
from torchparams.io.paths import folder_of, is_http, name_of
from torchparams.io.remote.transfer import failed, filesystem, transferred


def entries(name: str) -> dict[str, bool]:
    """Names in a directory, and whether each is a directory.

    Args:
        name: Public name of the directory.

    Raises:
        RemoteError: The directory does not exist, or the server cannot list it.
    """
    if name.startswith("hf://"):
        from torchparams.io.remote.hub import entries as hub_entries

        return hub_entries(name)
    fs, path = filesystem(name.rstrip("/") + "/")
    path = path.partition("?")[0] if is_http(name) else path.rstrip("/")  # signatures are for single files
    transferred.count()
    try:
        found = fs.ls(path, detail=True)
    except Exception as error:  # file systems raise the errors of their libraries
        made = failed(error, name)
        raise made if isinstance(made, RemoteError) else RemoteError(str(made), where=name) from None
    own = path.rstrip("/")
    there = {}
    for each in found:
        inside = each["name"].partition("?")[0].rstrip("/")
        if inside != own and folder_of("x://" + inside).endswith(own.partition("://")[2] or own):
            there[name_of("x://" + inside)] = each["type"] == "directory"
    return there


def entries_if_listed(name: str) -> dict[str, bool] | None:
    """As `entries`, or None for web servers, whose listings are not reliable, and after an error."""
    try:
        return None if is_http(name) else entries(name)
    except RemoteError:
        return None
