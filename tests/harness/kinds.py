"""Kinds of servers that modules of tests share: a start by command costs half a minute of a CPU.

Every test process imports this before it knows what it will run, so it imports nothing large.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

NO_KERNEL_CACHE = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0"}
"""For tests of growth: oneDNN keeps up to 1,024 kernels that it compiled, one for each size of a
matrix, whatever the server does."""
CHAT_TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
"""Of the kind `chat`: headers begin with a special token of the tiny models."""
API_KEY, ADMIN_KEY = "key-of-users-5cd1", "key-of-admins-8e07"
KEEP_THOUGHTS = 12
"""`--pte-keep-thoughts` of the kinds `open` and `admin`."""
SMALL_BODY_BYTES, LARGE_BODY_BYTES = 100_000, 1 << 20
"""`--pte-max-body-bytes` of the kinds `keys` and `loaded`."""
MAX_ROLLOUTS = 22
"""`--pte-max-rollouts` of the kind `loaded`."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """How a shared server is started.

    Args:
        modules: of the tests that use it, below tests/; one process of pytest-xdist runs them all.
        flags: of `pte-vllm serve`, after those of every test server.
        env: added to the environment. In flags and env {directory} is one of this server's own.
        key: opens every route, where there are keys.
        by_command: the command line starts it, not a zygote.
    """

    modules: tuple[str, ...]
    flags: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    key: str | None = None
    by_command: bool = False


_FLAGS = (
    *("--enable-prompt-tokens-details", "--pte-keep-thoughts", str(KEEP_THOUGHTS)),
    *("--pte-probes", "{directory}/probes.safetensors"),
)
_NO_LOADS_BY_PATH = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "0"}
KINDS = {
    "open": Kind(
        modules=(
            *("server/test_continue", "server/test_failures", "server/test_loads"),
            *("server/test_server", "server/test_thoughts", "server/test_token_clients"),
            *("server/test_trainer_contracts", "server/test_trl_client", "server/test_stop"),
            *("server/test_errors", "server/test_kept", "server/test_streams"),
            *("server/test_records", "eval/test_run", "eval/test_experiment"),
        ),
        flags=_FLAGS,
        env={"VLLM_LORA_RESOLVER_CACHE_DIR": "{directory}/adapters"},
    ),
    "chat": Kind(
        modules=("server/test_turns", "server/test_chat_pins", "server/test_environments"),
        flags=(
            *("--chat-template", "{directory}/template.jinja", "--pte-keep", "32"),
            *("--pte-probes", "{directory}/probes.safetensors"),
        ),
    ),
    "admin": Kind(
        modules=(
            *("server/test_control", "server/test_rollouts", "server/test_death"),
            *("server/test_own_probes", "server/test_scores"),
            "eval/test_fidelity_server",
            "eval/test_thoughts",
        ),
        flags=_FLAGS,
        env={"PTE_ADMIN_KEY": ADMIN_KEY},
        key=ADMIN_KEY,
    ),
    "engines": Kind(  # with two API servers, which is vLLM's default
        modules=("server/test_engines", "server/test_api_servers"),
        flags=(*_FLAGS, *("--data-parallel-size", "2", "--tensor-parallel-size", "1")),
        env=_NO_LOADS_BY_PATH,
    ),
    "engines_of_ranks": Kind(
        modules=(),  # of those above, one uses it too
        flags=(*_FLAGS, *("--data-parallel-size", "2", "--tensor-parallel-size", "2")),
        env=_NO_LOADS_BY_PATH,
    ),
    "keys": Kind(
        modules=("server/test_auth", "server/test_observe", "server/test_death_of_worker"),
        flags=(
            *("--api-key", API_KEY, "--pte-admin-key-file", "{directory}/admin-key"),
            *("--pte-max-body-bytes", str(SMALL_BODY_BYTES)),
        ),
        env={"VLLM_SERVER_DEV_MODE": "1", "VLLM_LOGGING_LEVEL": "INFO"},  # /server_info, log
        key=ADMIN_KEY,
        by_command=True,
    ),
    "loaded": Kind(
        modules=("server/test_in_flight", "server/test_interrupt", "faults/test_clients"),
        flags=(
            *("--pte-max-rollouts", str(MAX_ROLLOUTS)),
            *("--pte-max-body-bytes", str(LARGE_BODY_BYTES)),
        ),
        env=NO_KERNEL_CACHE,
    ),
}
KIND_OF_MODULE = {f"tests/{m}.py": name for name, kind in KINDS.items() for m in kind.modules}
