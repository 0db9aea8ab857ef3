"""What went wrong with the hub, in the words of the command's own flags, and what to do.

The hub's client raises many classes of errors; connections fail with its HTTP library's. None of
their texts holds a token, but a server may send one back, so tokens are taken out of all of them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from pte_vllm.adapter.shipping import HUB_ID

_LOGIN = "log in with `hf auth login`, set HF_TOKEN, or give --token-env NAME"
_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")


class HubError(ValueError):
    """The hub did not do what was asked; the message names the flag and what to do."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A repository on a hub, and what opens it."""

    repo_id: str
    """`owner/name`."""
    endpoint: str
    """The hub's URL."""
    revision: str | None = None
    """A branch, a tag or a commit; None: the branch main."""
    token: str | None = field(default=None, repr=False)
    """What the hub is shown; None: nothing."""

    @classmethod
    def of(
        cls, repo_id: str, *, endpoint: str | None, revision: str | None, token_env: str | None
    ) -> Target:
        """Read a command's flags, before anything is sent.

        Raises:
            HubError: naming the flag that cannot be.
        """
        from huggingface_hub import constants, get_token

        if not HUB_ID.fullmatch(repo_id):
            raise HubError(f"REPO_ID must be OWNER/NAME, as in the hub's address, got {repo_id!r}")
        if revision is not None and not revision.strip():
            raise HubError("--revision is empty; leave it out for the branch main")
        url = (endpoint or constants.ENDPOINT).rstrip("/")
        flag = "--endpoint" if endpoint else "HF_ENDPOINT"
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise HubError(f"{flag} must be a URL such as https://huggingface.co")
        if parts.username or parts.password:
            raise HubError(f"{flag}: no user or password in the URL; a token opens a hub")
        if constants.HF_HUB_OFFLINE:
            raise HubError(
                "HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is set, so the hub is not asked: unset "
                "it for this command, or copy the adapter's directory by hand"
            )
        token = get_token() if token_env is None else _token_in(token_env)
        return cls(repo_id=repo_id, endpoint=url, revision=revision, token=token)

    def need_token(self) -> None:
        """Raise HubError without a token: no hub lets anybody write without one."""
        if self.token is None:
            raise HubError(f"a push to {self.endpoint} needs a token that may write: {_LOGIN}")

    def scrub(self, text: str) -> str:
        """Take the token out of a text."""
        return text.replace(self.token, "(token)") if self.token else text


def _token_in(variable: str) -> str:
    if not _VARIABLE.fullmatch(variable):  # it may be the token itself, and is not repeated
        raise HubError(
            "--token-env takes the name of an environment variable, such as HF_TOKEN, and not the "
            "token: others of this machine could read it in the list of processes"
        )
    token = os.environ.get(variable, "").strip()
    if not token:
        raise HubError(f"--token-env: the environment variable {variable} is not set, or empty")
    return token


@contextmanager
def told(target: Target, doing: str) -> Iterator[None]:
    """Turn what the hub's client raises into a HubError.

    Args:
        target: what is asked.
        doing: what it is for, as in "REPO cannot be pulled".
    """
    import httpx2
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    try:
        yield
    except HFValidationError as error:
        raise HubError(f"REPO_ID: {error}") from error
    except (httpx2.HTTPError, EntryNotFoundError, ConnectionError, RuntimeError) as error:
        reason = _reason(target, error)
    except (json.JSONDecodeError, KeyError) as error:  # HTML, or another API
        reason = f"{target.endpoint} does not answer as a hub ({type(error).__name__}): {_ENDPOINT}"
        raise HubError(f"{doing}: {reason}") from error
    else:
        return
    raise HubError(target.scrub(f"{doing}: {reason}"))


_ENDPOINT = "check --endpoint, or HF_ENDPOINT, and the proxy"


def _reason(target: Target, error: BaseException) -> str:
    """Say what an error means; one that only wraps another is unwrapped."""
    import httpx2
    from huggingface_hub import errors

    if isinstance(error, errors.RevisionNotFoundError):
        return f"--revision: {target.repo_id} has no branch, tag or commit {target.revision}"
    if isinstance(error, errors.GatedRepoError):
        return f"{target.repo_id} is gated: ask for access on its page, then {_LOGIN}"
    if isinstance(error, errors.RepositoryNotFoundError):
        opens = f"it is private, and then {_LOGIN}"
        if target.token is not None:
            opens = "it is private and this token does not open it"
        return f"REPO_ID: {target.endpoint} has no {target.repo_id}; check the name, or {opens}"
    if isinstance(error, errors.HfHubHTTPError):
        return _status(target, error.response.status_code, error)
    # The Hugging Face hub's own protocol for large files, which few other hubs speak.
    if "xet" in str(error).replace(target.repo_id, "").lower():
        return (
            f"{target.endpoint} does not take or give large files by xet ({error}); with "
            "HF_HUB_DISABLE_XET=1 in the environment they travel by plain HTTP"
        )
    if isinstance(error, httpx2.HTTPError | ConnectionError):
        return f"{target.endpoint} cannot be reached ({error}): {_ENDPOINT}"
    if error.__cause__ is not None:  # "an error happened while ..."
        return _reason(target, error.__cause__)
    return str(error)


def _status(target: Target, status: int, error: BaseException) -> str:
    if status == 401:
        return f"{target.endpoint} does not know this token (401): {_LOGIN}"
    if status == 403:
        return (
            f"this token may not do that with {target.repo_id} (403): make one that may write, on "
            f"{target.endpoint}/settings/tokens, and check the owner in REPO_ID"
        )
    if status == 404:
        return f"{target.endpoint} does not answer as a hub (404): {_ENDPOINT}"
    if status == 429:
        return f"{target.endpoint} has had too many requests (429): try again later"
    if status >= 500:
        return f"{target.endpoint} fails ({status}): try again later"
    return f"{target.endpoint} refuses it ({status}): {error}"
