"""Adapters on a hub: `push` and `pull`, through huggingface_hub.

Only an adapter's own files travel, whatever else lies beside them: optimizer state and checkpoints
stay where they are. A pull is checked before it appears, and it appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pte_vllm.adapter.card import default_card
from pte_vllm.adapter.files import AdapterError
from pte_vllm.adapter.hashes import CONFIG_FILE, LORA_FILE
from pte_vllm.adapter.hub_errors import HubError, Target, told
from pte_vllm.adapter.inspect import describe
from pte_vllm.adapter.placing import check_free, made_aside, put_in_place
from pte_vllm.adapter.shipping import CARD_FILE, TRAVELLING, read_about

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_COMMIT = re.compile(r"[0-9a-f]{40}")
_MAIN = "main"


@dataclass(frozen=True, kw_only=True)
class Moved:
    """What a push or a pull did."""

    summary: dict[str, Any]
    """What `inspect.describe` says of the adapter."""
    commit: str
    """The commit on the hub."""
    changed: bool
    """Whether anything was written; False: the same was there."""
    deleted: tuple[str, ...] = ()
    """Files of an earlier adapter that a push took away."""
    card_made: bool = False
    """Whether a push wrote a card, as there was none."""


def push(
    directory: str | Path,
    target: Target,
    *,
    private: bool = False,
    message: str | None = None,
) -> Moved:
    """Upload an adapter in one commit; makes the repository and the branch if they are not there.

    Files of an adapter that the repository has and the directory has not are deleted there, or a
    pull would mix two adapters. All other files there stay.

    Args:
        directory: the adapter's directory.
        target: where it goes; its revision is a branch.
        private: whether a new repository is closed to others.
        message: of the commit; None: one that says what was pushed.

    Raises:
        AdapterError: if the adapter is broken; nothing was sent.
        HubError: if the hub refuses it.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    directory = Path(directory)
    summary = _checked(directory)
    if target.revision is not None and _COMMIT.fullmatch(target.revision):
        raise HubError(f"--revision: a push goes to a branch, and {target.revision} is a commit")
    target.need_token()
    there = [name for name in TRAVELLING if (directory / name).is_file()]
    api = HfApi(endpoint=target.endpoint, token=target.token)
    with told(target, f"{directory} cannot be pushed to {target.repo_id}"):
        before, files = _prepare(api, target, private)
        gone = tuple(name for name in TRAVELLING if name in files and name not in there)
        gone = tuple(name for name in gone if name != CARD_FILE)  # it may have been written there
        additions = [CommitOperationAdd(name, directory / name) for name in there]
        card_made = CARD_FILE not in there and CARD_FILE not in files
        if card_made:
            card = default_card(directory, target.repo_id, summary)
            additions.append(CommitOperationAdd(CARD_FILE, card.encode()))
        commit = api.create_commit(
            target.repo_id,
            [*additions, *(CommitOperationDelete(name) for name in gone)],
            commit_message=message or f"Adapter {summary['content_sha256'][:12]}",
            revision=target.revision,
        ).oid
        _check_arrived(api, target, commit, directory, there)
    return Moved(
        summary=summary,
        commit=commit,
        changed=commit != before,
        deleted=gone,
        card_made=card_made,
    )


def _checked(directory: Path) -> dict[str, Any]:
    """Return what the adapter is, once it is known to be good."""
    if not directory.is_dir():
        raise AdapterError(f"DIR: there is no directory {directory}")
    summary = describe(directory)
    read_about(directory)
    return summary


def _prepare(api: HfApi, target: Target, private: bool) -> tuple[str | None, set[str]]:
    """Make repository and branch if they are not there; returns the branch's commit and its files.

    Raises:
        HubError: if the repository is open to all, and a private one was asked for.
    """
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        info = api.model_info(target.repo_id)
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        api.create_repo(target.repo_id, private=private or None, exist_ok=True)
        info = api.model_info(target.repo_id)
    if private and not info.private:
        raise HubError(
            f"--private: {target.repo_id} is there and open to all: change that in its settings on "
            "the hub, name another repository, or leave the flag out"
        )
    if target.revision not in (None, _MAIN):
        try:
            info = api.model_info(target.repo_id, revision=target.revision)
        except RevisionNotFoundError:
            api.create_branch(target.repo_id, branch=str(target.revision), exist_ok=True)
            info = api.model_info(target.repo_id, revision=target.revision)
    return info.sha, {file.rfilename for file in info.siblings or ()}


def _check_arrived(
    api: HfApi, target: Target, commit: str, directory: Path, names: list[str]
) -> None:
    """Raise HubError unless the commit holds all files: the hub heeds a .gitignore, silently."""
    found = {file.path: file for file in api.get_paths_info(target.repo_id, names, revision=commit)}
    for name in names:
        file = found.get(name)
        if file is None or getattr(file, "size", None) != (directory / name).stat().st_size:
            raise HubError(
                f"{name} did not arrive in {target.repo_id}: does a .gitignore there name it?"
            )


def pull(target: Target, out: str | Path) -> Moved:
    """Download an adapter into `out`, which appears whole or not at all.

    Nothing but the adapter's files is downloaded, however much else the repository holds. A plain
    PEFT LoRA is an adapter too.

    Args:
        target: where it is.
        out: the directory to write. One that holds the same adapter stays as it is.

    Raises:
        AdapterError: if what came is broken.
        HubError: if it cannot be had, or is no adapter.
        ValueError: if `out` holds anything else.
    """
    from huggingface_hub import HfApi

    out = Path(out).resolve()
    check_free(out)
    api = HfApi(endpoint=target.endpoint, token=target.token)
    failure = f"{target.repo_id} cannot be pulled"
    with made_aside(out) as made:
        with told(target, failure):
            info = api.model_info(target.repo_id, revision=target.revision)
            names = {file.rfilename for file in info.siblings or ()}
            _check_holds_adapter(target, names)
            commit = str(info.sha)
            wanted = [name for name in TRAVELLING if name in names]
            files = api.get_paths_info(target.repo_id, wanted, revision=commit)
            size = sum(getattr(file, "size", 0) for file in files)
            if shutil.disk_usage(made).free < size:
                raise HubError(f"OUT: the adapter has {size / 1e6:.0f} MB, and the disk is full")
            for file in files:
                api.hf_hub_download(target.repo_id, file.path, revision=commit, local_dir=made)
                _check_content(made / file.path, file)
        shutil.rmtree(made / ".cache", ignore_errors=True)  # the client's notes
        try:
            summary = _checked(made)
        except ValueError as error:  # the path that it names will not be there
            reason = str(error).replace(f"{made}/", "")
            raise AdapterError(f"{target.repo_id} holds no adapter that works: {reason}") from error
        changed = put_in_place(made, out)
    return Moved(summary=summary, commit=commit, changed=changed)


def _check_holds_adapter(target: Target, names: set[str]) -> None:
    where = f"{target.repo_id} at {target.revision or _MAIN}"
    if CONFIG_FILE not in names:
        below = sorted(name for name in names if name.endswith(f"/{CONFIG_FILE}"))
        hint = f"; {below[0]} is there, but only the top of a repository is read" if below else ""
        raise HubError(f"REPO_ID: {where} holds no adapter: it has no {CONFIG_FILE}{hint}")
    if LORA_FILE not in names:
        pickle = "adapter_model.bin"
        hint = f"; {pickle} is a pickle, which is not read: save it as safetensors with PEFT"
        raise HubError(f"REPO_ID: {where} has no {LORA_FILE}{hint if pickle in names else ''}")


def _check_content(path: Path, file: Any) -> None:
    """Raise HubError unless a file is the one that the hub names by its hash."""
    content = path.read_bytes()
    if file.lfs is not None:
        found, wanted = hashlib.sha256(content).hexdigest(), file.lfs.sha256
    else:  # git names a file by this
        found = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        wanted = file.blob_id
    if found != wanted:
        raise HubError(f"{file.path} was damaged on its way: pull again")
