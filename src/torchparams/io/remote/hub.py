"""Files of the Hugging Face Hub: `hf://owner/repo@revision/path`.

A file in the hub's local cache is read from there. Other files are read by ranges, from the commit that the revision
has when the first file of a checkpoint is opened, so all shards have the same commit.
"""

from __future__ import annotations

import os
import re
from typing import Any, NamedTuple

from torchparams.errors import MissingDependency, RemoteError
from torchparams.io.remote.http import HttpConnection
from torchparams.io.remote.transfer import failed, filesystem, transferred

_URL = re.compile(
    r"hf://(?:(?P<kind>models|datasets|spaces)/)?(?P<repo>[^/@]+/[^/@]+)"
    r"(?:@(?P<revision>refs/(?:pr|convert)/[^/]+|[^/]+))?(?:/(?P<path>.*))?"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")

_commits: dict[tuple[str, str, str], str] = {}
"""Commit of each kind, repository and revision, until they are requested again."""


class Place(NamedTuple):
    """File or directory of a repository.

    Attributes:
        kind: `model`, `dataset` or `space`.
        repo: `owner/repo`.
        revision: Branch, tag or commit.
        path: Path in the repository; empty for the root.
    """

    kind: str
    repo: str
    revision: str
    path: str

    @property
    def commit(self) -> str | None:
        """Commit of the revision, if known."""
        if _COMMIT.fullmatch(self.revision):
            return self.revision
        return _commits.get((self.kind, self.repo, self.revision))


def place_of(name: str) -> Place:
    """Parse a hub URL.

    Raises:
        RemoteError: The URL does not name a repository.

    >>> place_of("hf://owner/repo@refs/pr/1/a/b.pt")
    Place(kind='model', repo='owner/repo', revision='refs/pr/1', path='a/b.pt')
    """
    found = _URL.fullmatch(name)
    if found is None:
        raise RemoteError(
            "the URL does not name a repository of the hub", where=name, hint="write hf://owner/repo[@revision]/path"
        )
    kind = (found["kind"] or "models").removesuffix("s")
    return Place(kind, found["repo"], found["revision"] or "main", (found["path"] or "").strip("/"))


def forget(name: str) -> None:
    """Request the commit of a revision again."""
    place = place_of(name)
    _commits.pop((place.kind, place.repo, place.revision), None)


def cached(name: str) -> str | None:
    """Path of a file in the local cache of the hub; None if the cache lacks it for that commit.

    A branch or tag may have moved since the file was cached: one request checks, unless HF_HUB_OFFLINE is set.

    Raises:
        RemoteError: HF_HUB_OFFLINE is set and the cache lacks the file; or the hub cannot be reached.
    """
    hub = _hub(name)
    place = place_of(name)

    def look(revision: str) -> str | None:
        found = hub.try_to_load_from_cache(place.repo, place.path, revision=revision, repo_type=place.kind)
        return found if isinstance(found, str) else None

    if place.commit is not None:
        path = look(place.commit)
        if path is not None:
            return path
    found = look(place.revision)
    if hub.constants.HF_HUB_OFFLINE:
        if found is None:
            raise RemoteError("HF_HUB_OFFLINE is set, but the file is not in the local cache of the hub", where=name)
        return found
    if found is None or place.commit is not None:
        return None
    transferred.count()
    try:
        about = hub.get_hf_file_metadata(_address(hub, place), token=hub.get_token())
    except Exception as error:  # of huggingface_hub, or of the libraries below it
        raise _told(error, name) from None
    if about.commit_hash is not None:
        _commits[place.kind, place.repo, place.revision] = about.commit_hash
        return look(about.commit_hash) or (found if _holds(found, about.etag) else None)
    return None


def _holds(path: str, etag: str | None) -> bool:
    """Whether a cached file of an earlier commit is the same: the cache names contents by ETag."""
    return etag is not None and os.path.basename(os.path.realpath(path)) == etag


def cached_directory(name: str) -> str | None:
    """Path of a directory in the local cache if HF_HUB_OFFLINE is set; otherwise None.

    Raises:
        RemoteError: The cache lacks the directory.
    """
    hub = _hub(name)
    if not hub.constants.HF_HUB_OFFLINE:
        return None
    place = place_of(name)
    try:
        root = hub.snapshot_download(place.repo, revision=place.revision, repo_type=place.kind, local_files_only=True)
    except Exception as error:  # as above
        raise RemoteError(
            "HF_HUB_OFFLINE is set, but the directory is not in the local cache of the hub", where=name
        ) from error
    return os.path.join(root, *place.path.split("/")) if place.path else str(root)


def hub_connection(name: str) -> HttpConnection:
    """Open the connection to a file of the hub.

    Raises:
        MissingDependency: huggingface_hub is not installed.
    """
    hub = _hub(name)
    place = place_of(name)
    fs, _ = filesystem("https://huggingface.co")  # file system of all HTTP URLs
    return _HubConnection(fs, name, place, hub)


class _HubConnection(HttpConnection):
    """File of a repository: the first response fixes the commit for later requests."""

    def __init__(self, fs: Any, name: str, place: Place, hub: Any) -> None:
        token = None if hub.constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else hub.get_token()
        super().__init__(fs, _address(hub, place), name, {} if token is None else {"Authorization": f"Bearer {token}"})
        self._place, self._hub = place, hub

    def look_at(self, answer: Any) -> None:
        """Continue with the commit of a response."""
        if self._place.commit is not None:
            return
        for each in (*answer.history, answer):
            commit = each.headers.get("X-Repo-Commit", "")
            if _COMMIT.fullmatch(commit):
                _commits[self._place.kind, self._place.repo, self._place.revision] = commit
                self.url = _address(self._hub, self._place)
                return


def entries(name: str) -> dict[str, bool]:
    """Names in a directory of a repository, and whether each is a directory.

    Raises:
        RemoteError: The directory does not exist, or the hub cannot be reached.
    """
    hub = _hub(name)
    place = place_of(name)
    transferred.count()
    try:
        tree = hub.HfApi(token=hub.get_token()).list_repo_tree(
            place.repo, place.path or None, revision=place.commit or place.revision, repo_type=place.kind
        )
        return {each.path.rpartition("/")[2]: not hasattr(each, "size") for each in tree}
    except Exception as error:  # as above
        raise _told(error, name) from None


def _address(hub: Any, place: Place) -> str:
    found: str = hub.hf_hub_url(place.repo, place.path, repo_type=place.kind, revision=place.commit or place.revision)
    return found


def _told(error: Exception, name: str) -> RemoteError:
    made = failed(error, name)
    return made if isinstance(made, RemoteError) else RemoteError(str(made), where=name)


def _hub(name: str) -> Any:
    try:
        import huggingface_hub
        from huggingface_hub import constants  # noqa: F401  # an attribute of the package from here on
    except ModuleNotFoundError:
        raise MissingDependency(
            "huggingface_hub is needed to read from the hub", where=name, hint="pip install 'torchparams[remote]'"
        ) from None
    return huggingface_hub
