"""This client asks a `pte-vllm serve` for rollouts and scores, and sends it adapter versions.

What a server that restarts, is busy or goes away can do to a request is handled here, so that a
training loop sees records only, or one error that says what is wrong. The process needs neither
vLLM nor torch.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, cast

from pte_vllm.method.kept_record import KeptRecord, record_to_json
from pte_vllm.method.names import Evict, KeepScore, Pin
from pte_vllm.method.spans import Spans
from pte_vllm.wire.expected import Expected, Group, RolloutMismatch, choices_of
from pte_vllm.wire.pins import pins_of, pins_of_each
from pte_vllm.wire.pushing import Pushes
from pte_vllm.wire.records import Request
from pte_vllm.wire.rollout import InFlight, Rollout
from pte_vllm.wire.transport import UNKNOWN, ServerError, Transport, bearer

if TYPE_CHECKING:
    from pte_vllm.adapter.format import Adapter

__all__ = ["RolloutClient", "RolloutMismatch", "ServerError"]


class RolloutClient:
    """Talks to one server.

    Failed connections and answers 429, 502, 503 and 504 are tried again with exponential back-off,
    after `Retry-After` where the server sends it, until nothing has come for `retry_s`. Any other
    refusal raises ServerError at once.

    Args:
        base_url: where the server is, such as `http://localhost:8000`.
        api_key: the server's `--api-key`, if it has one.
        admin_key: the server's PTE_ADMIN_KEY, if it has one; `push` needs it.
        timeout_s: the longest silence on an open connection; the server breaks it every 10 s.
        retry_s: how long one call goes on trying without any progress.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        admin_key: str | None = None,
        timeout_s: float = 120.0,
        retry_s: float = 300.0,
    ) -> None:
        self._http = Transport(
            base_url, key=api_key or admin_key, timeout_s=timeout_s, retry_s=retry_s
        )
        self._admin_headers = bearer(admin_key or api_key)
        self._info: dict[str, Any] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def wait_ready(self, timeout_s: float = 600.0) -> dict[str, Any]:
        """Wait until the server serves, and return its `info`.

        Raises:
            ServerError: if it does not within `timeout_s`, or runs without PTE.
        """
        self._http.wait_healthy(timeout_s)
        return self.info()

    def info(self) -> dict[str, Any]:
        """Return the default plan, limits and newest adapter versions: `GET /pte/v1/info`."""
        self._info = self._http.json("GET", "/pte/v1/info")
        return self._info

    def adapters(self) -> dict[str, dict[str, Any]]:
        """Return the pushed adapters by name, as `GET /pte/v1/adapters` describes them."""
        listed = self._http.json("GET", "/pte/v1/adapters")["adapters"]
        return {adapter["name"]: adapter for adapter in listed}

    def rollouts(
        self,
        prompts: Sequence[Sequence[int]] | Sequence[str],
        *,
        n: int = 1,
        adapter: str | None = None,
        sampling: Mapping[str, Any] | None = None,
        window_tokens: int | None = None,
        pin_tokens: int | Sequence[int] | None = None,
        pin_spans: Sequence[Spans] | None = None,
        pin: Pin | None = None,
        rule: str | None = None,
        evict: Evict | None = None,
        evict_seed: int | None = None,
        keep_tokens: int | None = None,
        keep_score: KeepScore | None = None,
        group_ids: Sequence[str] | None = None,
        min_weight_version: int | None = None,
        in_flight: InFlight = "pin",
        max_staleness: int | None = None,
    ) -> Iterator[Rollout]:
        """Yield `n` samples of each prompt, each as it finishes, each once.

        After a restart of the server, samples that had not arrived are asked for again; those of
        one group may then come from different weight versions, which their records tell.

        Args:
            prompts: the questions, as token ids or as texts for the server's tokenizer.
            n: how many samples of each prompt are wanted.
            adapter: `name`, which is its newest version, or `name@version`; None is the base model.
            sampling: `max_tokens`, `temperature`, `seed` and others that docs/api.md lists.
            window_tokens: the window of these sequences; None takes the server's.
            pin_tokens: how many tokens at the start are never folded; None pins each prompt.
            pin_spans: of each prompt, later questions, each pinned until the next one begins.
            pin: the same in words, of each prompt: `prompt`, or `first_and_last_user`.
            rule: the rule by which folds add up; None takes the adapter's.
            evict: which blocks of a full window leave, `oldest` or `random`; None is `oldest`.
            evict_seed: what random blocks are drawn by; None is 0.
            keep_tokens: how many evicted tokens each KV head keeps; None takes the server's.
            keep_score: by which score they are chosen; None takes the server's.
            group_ids: a name for each prompt, all different; "0", "1", ... by default.
            min_weight_version: the server refuses weights older than this.
            in_flight: what a sample does when `name` gets a new version meanwhile: finish on its
                own, or read its tokens again and go on with the new one, as its record tells.
            max_staleness: a sample ends as it is (`abort`) once it is more versions behind.

        Raises:
            RolloutMismatch: if a record is malformed or not what was asked for.
            ServerError: if the server refuses or stays away.
        """
        names = [str(i) for i in range(len(prompts))] if group_ids is None else list(group_ids)
        if len(names) != len(prompts) or len(set(names)) != len(names):
            raise ValueError(f"group_ids must be {len(prompts)} different names, got {names}")
        if n < 1:
            raise ValueError(f"n must be positive, got {n}")
        pins = pins_of_each(pin, pin_tokens, pin_spans, len(prompts))
        groups = {
            name: Group(
                prompt=prompt if isinstance(prompt, str) else list(cast(Sequence[int], prompt)),
                missing=set(range(n)),
                **pin,
            )
            for name, prompt, pin in zip(names, prompts, pins, strict=True)
        }
        texts = {isinstance(group.prompt, str) for group in groups.values()}
        if len(texts) > 1:
            raise ValueError("prompts must be all texts or all token ids")
        policy: dict[str, Any] = {"adapter": adapter, "window_tokens": window_tokens}
        policy |= choices_of(evict, evict_seed, keep_tokens, keep_score)
        options = {
            "n": n,
            **policy,
            "sampling": dict(sampling or {}),
            "update": rule,
            "min_weight_version": min_weight_version,
            "in_flight": in_flight,
            "max_staleness": max_staleness,
        }

        def body(missing: dict[str, Group]) -> dict[str, Any]:
            return {
                **options,
                **pins_of(missing.values()),
                "prompts" if texts == {True} else "token_ids": [g.prompt for g in missing.values()],
                "group_id": list(missing),
                "samples": [sorted(group.missing) for group in missing.values()],
            }

        expected = Expected(groups=groups, rule=rule, **policy)
        return self._records(Request(path="/pte/v1/rollouts", expected=expected, body=body))

    def score(
        self,
        token_ids: Sequence[Sequence[int]],
        prompt_tokens: Sequence[int],
        *,
        adapter: str | None = None,
        window_tokens: int | None = None,
        pin_tokens: int | Sequence[int] | None = None,
        pin_spans: Sequence[Spans] | None = None,
        pin: Pin | None = None,
        rule: str | None = None,
        evict: Evict | None = None,
        evict_seed: int | None = None,
        keep_tokens: int | None = None,
        keep_score: KeepScore | None = None,
        min_weight_version: int | None = None,
        top_logprobs: int = 0,
        kept: Sequence[KeptRecord | None] | None = None,
    ) -> list[Rollout]:
        """Return the log-probs, at temperature 1, of what follows `prompt_tokens` of each sequence.

        The tokens go through the same evictions and folds as a rollout's. Records come in the
        order of `token_ids`; options and errors are those of `rollouts`. With `top_logprobs` k they
        also name the k most probable tokens in each place, up to the server's `--max-logprobs`.
        """
        groups: dict[str, Group] = {}
        pins = pins_of_each(pin, pin_tokens, pin_spans, len(token_ids))
        for i, (tokens, num_prompt) in enumerate(zip(token_ids, prompt_tokens, strict=True)):
            if not 0 < num_prompt < len(tokens):
                raise ValueError(f"prompt_tokens {num_prompt}: sequence {i} has {len(tokens)}")
            question, answer = list(tokens[:num_prompt]), list(tokens[num_prompt:])
            groups[str(i)] = Group(prompt=question, answer=answer, missing={0}, **pins[i])
        policy: dict[str, Any] = {"adapter": adapter, "window_tokens": window_tokens}
        policy |= choices_of(evict, evict_seed, keep_tokens, keep_score)
        options = {
            **policy,
            "update": rule,
            "min_weight_version": min_weight_version,
            **({"top_logprobs": top_logprobs} if top_logprobs else {}),  # older servers refuse it
        }
        records = dict(zip(groups, map(record_to_json, kept or ()), strict=kept is not None))

        def body(missing: dict[str, Group]) -> dict[str, Any]:
            return {
                **options,
                **pins_of(missing.values()),
                **({"kept": [records[g] for g in missing]} if kept else {}),
                "token_ids": [[*g.prompt, *(g.answer or ())] for g in missing.values()],
                "prompt_tokens": [len(group.prompt) for group in missing.values()],
                "group_id": list(missing),
            }

        request = Request(
            path="/pte/v1/score",
            expected=Expected(groups=groups, rule=rule, top_logprobs=top_logprobs, **policy),
            body=body,
        )
        by_group = {record.group_id: record for record in self._records(request)}
        return [by_group[group_id] for group_id in groups]

    def records(self, name: str, *, drop: bool = True) -> list[Rollout]:
        """Return the records of requests that were sent with `pte_record` and this name.

        Any route of the API takes the option, also as the header `X-PTE-Record`. The records come
        in the order in which the answers ended; `wire.episode.join_turns` joins an episode's.

        Args:
            name: what the requests gave.
            drop: whether the server is to forget them.

        Raises:
            ServerError: if there are none (404), or the server refuses or stays away.
            ValueError: if a record is malformed.
        """
        path, headers = f"/pte/v1/records/{name}", self._admin_headers
        told = self._http.json("GET", path, headers=headers)
        found = [Rollout.from_json(record) for record in told["records"]]
        if drop:  # in a request of its own, so that an answer lost on its way can be had again
            try:
                self._http.json("DELETE", f"{path}?last={told['last']}", headers=headers)
            except ServerError as error:
                if error.status != UNKNOWN:  # an attempt whose answer was lost has dropped them
                    raise
        return found

    def push(self, adapter: Adapter | str | Path, name: str, version: int | None = None) -> int:
        """Make an adapter version `version` of `name`, by default the next; return its number.

        Safe to repeat: the same files under the same version are no error. Where others push the
        same name at once, each gets a number of its own.

        Args:
            adapter: the adapter, or its directory.
            name: a name of 1 to 64 of `A-Z a-z 0-9 . _ -`.
            version: a number above the newest, unless it is there with the same files.

        Raises:
            ServerError: if the server refuses (the adapter does not fit, the version is taken) or
                stays away.
        """
        with tempfile.TemporaryDirectory() as scratch:
            if not isinstance(adapter, str | Path):
                adapter.save(scratch)
                adapter = scratch
            pushes = Pushes(self._http, self._admin_headers)
            if version is not None:
                return pushes.push(Path(adapter), name, version)
            return pushes.push_next(Path(adapter), name, self.adapters)

    def _records(self, request: Request) -> Iterator[Rollout]:
        if not request.expected.missing():
            return
        info = self._info or self.info()
        yield from request.records(self._http, info["plan"])
