"""Files of the Hugging Face Hub: `hf://owner/repo@revision/path`.

A file that the hub's local cache has is read from there. Any other is read by ranges, from the commit that the revision
names when the first file of a checkpoint is opened: so all its shards are of one commit.
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
"""The commit of each kind, repository and revision, until they are asked for anew."""


class Place(NamedTuple):
    """A file or a directory of a repository.

    Attributes:
        kind: `model`, `dataset` or `space`.
        repo: `owner/repo`.
        revision: A branch, a tag or a commit.
        path: The path in the repository; empty for its root.
    """

    kind: str
    repo: str
    revision: str
    path: str

    @property
    def commit(self) -> str | None:
        """The commit of the revision, where it is known."""
        if _COMMIT.fullmatch(self.revision):
            return self.revision
        return _commits.get((self.kind, self.repo, self.revision))


def place_of(name: str) -> Place:
    """What a URL names.

    Raises:
        RemoteError: It names no repository.

    >>> place_of("hf://owner/repo@refs/pr/1/a/b.pt")
    Place(kind='model', repo='owner/repo', revision='refs/pr/1', path='a/b.pt')
    """
    found = _URL.fullmatch(name)
    if found is None:
        raise RemoteError("names no repository of the hub", where=name, hint="write hf://owner/repo[@revision]/path")
    kind = (found["kind"] or "models").removesuffix("s")
    return Place(kind, found["repo"], found["revision"] or "main", (found["path"] or "").strip("/"))


def forget(name: str) -> None:
    """Ask for the commit of a revision anew."""
    place = place_of(name)
    _commits.pop((place.kind, place.repo, place.revision), None)


def cached(name: str) -> str | None:
    """The path of a file in the local cache of the hub; None where it does not have the file of that commit.

    A branch or a tag may have moved on since the file was cached: one request tells, unless HF_HUB_OFFLINE is set.

    Raises:
        RemoteError: HF_HUB_OFFLINE is set, and the cache does not have the file; or the hub cannot be asked.
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
            raise RemoteError("HF_HUB_OFFLINE is set, and the local cache of the hub does not have it", where=name)
        return found
    if found is None or place.commit is not None:
        return None
    transferred.count()
    try:
        about = hub.get_hf_file_metadata(_address(hub, place), token=hub.get_token())
    except Exception as error:  # the hub's own, or those of the libraries below it
        raise _told(error, name) from None
    if about.commit_hash is not None:
        _commits[place.kind, place.repo, place.revision] = about.commit_hash
        return look(about.commit_hash) or (found if _holds(found, about.etag) else None)
    return None


def _holds(path: str, etag: str | None) -> bool:
    """Whether a file of an earlier commit is the same: the cache names contents by their ETag."""
    return etag is not None and os.path.basename(os.path.realpath(path)) == etag


def cached_directory(name: str) -> str | None:
    """The path of a directory in the local cache, where HF_HUB_OFFLINE is set; None where it is not.

    Raises:
        RemoteError: The cache does not have it.
    """
    hub = _hub(name)
    if not hub.constants.HF_HUB_OFFLINE:
        return None
    place = place_of(name)
    try:
        root = hub.snapshot_download(place.repo, revision=place.revision, repo_type=place.kind, local_files_only=True)
    except Exception as error:  # as above
        raise RemoteError(
            "HF_HUB_OFFLINE is set, and the local cache of the hub does not have it", where=name
        ) from error
    return os.path.join(root, *place.path.split("/")) if place.path else str(root)


def hub_connection(name: str) -> HttpConnection:
    """The connection to a file of the hub.

    Raises:
        MissingDependency: huggingface_hub is not installed.
    """
    hub = _hub(name)
    place = place_of(name)
    fs, _ = filesystem("https://huggingface.co")  # the file system of all HTTP URLs
    return _HubConnection(fs, name, place, hub)


class _HubConnection(HttpConnection):
    """A file of a repository: its first answer says of which commit it is, and further ones are of the same."""

    def __init__(self, fs: Any, name: str, place: Place, hub: Any) -> None:
        token = None if hub.constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else hub.get_token()
        super().__init__(fs, _address(hub, place), name, {} if token is None else {"Authorization": f"Bearer {token}"})
        self._place, self._hub = place, hub

    def look_at(self, answer: Any) -> None:
        """Go on with the commit that an answer is of."""
        if self._place.commit is not None:
            return
        for each in (*answer.history, answer):
            commit = each.headers.get("X-Repo-Commit", "")
            if _COMMIT.fullmatch(commit):
                _commits[self._place.kind, self._place.repo, self._place.revision] = commit
                self.url = _address(self._hub, self._place)
                return


def entries(name: str) -> dict[str, bool]:
    """The names in a directory of a repository, and whether each is a directory itself.

    Raises:
        RemoteError: There is no such directory, or the hub cannot be asked.
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
