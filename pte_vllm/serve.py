"""vLLM's own OpenAI-compatible server with our classes plugged in.

`engine_args` does the same for the offline `LLM`:

    llm = LLM(model, block_size=32, **engine_args(EngineConfig(window_tokens=256)))
"""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pte_vllm.engine.cpu_defaults import (
    choose_dtype,
    choose_reserved_cores,
    fitting_utilization,
    share_cores,
)
from pte_vllm.engine.orphans import ENABLED, watch_coordinator
from pte_vllm.engine.starting import end_at_once_when_stopped
from pte_vllm.method.options import EngineConfig
from pte_vllm.models.location import check_model
from pte_vllm.server.options import ServiceConfig

SCHEDULER_CLS = "pte_vllm.engine.scheduler.make_scheduler"


def engine_args(engine: EngineConfig) -> dict[str, Any]:
    """Keyword arguments for vLLM's `LLM` or `EngineArgs` that turn PTE on.

    Also sets variables of vLLM's for this process and those it starts, unless they are set:
    VLLM_USE_V2_MODEL_RUNNER selects Model Runner V1, and on a CPU VLLM_USE_AOT_COMPILE lets a
    second start find what the first one compiled. A variable of ours has the processes that vLLM
    starts end with the one that started them.
    """
    os.environ.setdefault(ENABLED, "1")
    # Until Model Runner V2, vLLM's default on a GPU, has been seen to work there with PTE.
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
    from vllm.platforms import current_platform

    args: dict[str, Any] = {
        "scheduler_cls": SCHEDULER_CLS,
        "additional_config": {EngineConfig.KEY: engine.to_dict()},
    }
    if current_platform.is_cpu():
        args["worker_cls"] = "pte_vllm.engine.worker_cpu.PTECPUWorker"
        # vLLM 0.32 cannot load what this saves on a CPU, and would compile at every start; what
        # torch.compile itself keeps is found again.
        os.environ.setdefault("VLLM_USE_AOT_COMPILE", "0")
    else:
        args["worker_cls"] = "pte_vllm.engine.worker_gpu.PTEGPUWorker"
        args["attention_backend"] = "CUSTOM"
    return args


def serve(
    model: str,
    engine: EngineConfig,
    vllm_args: list[str],
    service: ServiceConfig | None = None,
) -> int:
    """Run the server until it is stopped.

    Args:
        model: name or directory, vLLM's positional argument.
        engine: PTE's options.
        vllm_args: any of `vllm serve`'s flags.
        service: options of our routes.

    Returns:
        The exit status: 0 after a stop, 1 if the engine died. A stop while the server starts ends
        the process with 128 + the signal.

    Raises:
        ValueError, OSError: naming the flag, if a combination is not supported, or something that
            it names is not there or in use.
    """
    end_at_once_when_stopped()
    _allow_plugins(os.environ)
    args, chosen = parse_vllm_args(model, engine, vllm_args)
    for line in chosen:
        print(f"pte-vllm: CPU: {line}", file=sys.stderr)  # vLLM sets up its log later
    args.model = args.model_tag  # as vLLM's command does
    _choose_api_servers(args)

    from vllm.entrypoints.cli.serve import ServeSubcommand

    from pte_vllm.server.early import check_early
    from pte_vllm.server.ending import Ending, wait_for_api_servers
    from pte_vllm.server.sharing.directory import share_among

    command = ServeSubcommand()
    try:
        command.validate(args)
    except TypeError as error:  # flags that do not go together
        raise ValueError(str(error)) from error
    # vLLM hands `args` to the endpoint plugin.
    args.pte_service = service or ServiceConfig()
    args.pte_ending = ending = Ending()
    with ExitStack() as until:
        args.pte_spool = check_early(args, args.pte_service, until)
        args.additional_config[EngineConfig.KEY]["probes"] = _probes(model, engine)
        share_among(args, until)
        watch_coordinator()
        wait_for_api_servers()
        if _runs_here(args):
            import uvloop

            uvloop.run(_run_server(args))
            return ending.exit_status
        command.cmd(args)
        return 0


def _choose_api_servers(args: Namespace) -> None:
    """Set how many API servers there are as vLLM does: one per engine, unless they cannot share."""
    from vllm import envs

    if args.api_server_count is None and not args.headless:
        alone = envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING
        args.api_server_count = 1 if alone else args.data_parallel_size


def _probes(model: str, engine: EngineConfig) -> str | None:
    """Return the file of probes that the engine needs, which is sampled first if there is none.

    Raises:
        ValueError, OSError: if it cannot be sampled.
    """
    if engine.probes is not None:  # checked with the other files
        return str(Path(engine.probes).absolute())
    if not engine.keep_tokens or engine.keep_score != "expected":
        return None
    from pte_vllm.adapter.probe_cache import calibrated

    return str(calibrated(model))


def _runs_here(args: Namespace) -> bool:
    """Whether vLLM's command would run its HTTP server in this process."""
    from vllm import envs

    elsewhere = args.headless or args.api_server_count > 1 or args.grpc
    return not (elsewhere or envs.VLLM_USE_RUST_FRONTEND)


async def _run_server(args: Namespace) -> None:
    """Do as vLLM's `run_server` does, but leave the handler of SIGTERM alone."""
    from vllm.entrypoints.launchers.api_server.entry import run_server_worker, setup_server
    from vllm.utils.system_utils import decorate_logs

    decorate_logs("APIServer", skip_if_decorated=True)
    args.api_server_count = None
    try:
        address, sock = setup_server(args, reuse_port=False)
    except KeyError as error:  # no such parser of tools or reasoning
        raise ValueError(str(error.args[0])) from error
    await run_server_worker(address, sock, args)


def parse_vllm_args(
    model: str, engine: EngineConfig, vllm_args: Sequence[str]
) -> tuple[Namespace, list[str]]:
    """Read vLLM's flags as `vllm serve` does, and plug PTE in.

    Returns:
        What vLLM's command runs with; and what was chosen for this CPU, a line each.

    Raises:
        ValueError, FileNotFoundError: naming the flag, if there is no model, or a combination is
            not supported.
        SystemExit: if vLLM's parser refuses the flags, after a message on stderr.
    """
    check_model(model)
    overrides = engine_args(engine)  # before vLLM: it sets variables that vLLM reads

    from vllm.entrypoints.cli.serve import ServeSubcommand

    try:
        from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    except ImportError:  # since 0.33
        from vllm.entrypoints.common.startup import cli_env_setup
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from pte_vllm.engine.refusals import check_serve_args

    cli_env_setup()
    parser = FlexibleArgumentParser(prog="pte-vllm")
    flags = ServeSubcommand().subparser_init(parser.add_subparsers(required=True, dest="subparser"))
    utilization = flags.get_default("gpu_memory_utilization")
    # Rollouts report log-probs of the distribution that was sampled from, after the temperature.
    # Trainers read and write tokens: vLLM would answer 403 on those routes without the flag.
    flags.set_defaults(
        logprobs_mode="processed_logprobs", gpu_memory_utilization=None, enable_scale_out=True
    )
    args: Namespace = parser.parse_args(["serve", model, *vllm_args])
    for name in ("scheduler_cls", "attention_backend"):
        given = getattr(args, name, None)
        if given is not None and name in overrides and given != overrides[name]:
            raise ValueError(f"--{name.replace('_', '-')} {given} cannot be combined with PTE")
    overrides["additional_config"] |= getattr(args, "additional_config", None) or {}
    for name, value in overrides.items():
        setattr(args, name, value)
    check_serve_args(args, engine)
    chosen = []
    if overrides["worker_cls"].endswith("CPUWorker"):
        chosen = _choose_for_cpu(args, model, utilization)
    if args.gpu_memory_utilization is None:
        args.gpu_memory_utilization = utilization
    return args, chosen


def resolve_config(args: Namespace) -> Any:
    """Resolve what `parse_vllm_args` returned into vLLM's configuration; no weights are loaded.

    Raises:
        ValueError, OSError: as vLLM finds a flag or the model impossible.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs

    from pte_vllm.plugin import register

    register()
    args.model = args.model_tag  # as vLLM's command does
    return AsyncEngineArgs.from_cli_args(args).create_engine_config()


def _choose_for_cpu(args: Namespace, model: str, default_utilization: float) -> list[str]:
    """Set dtype, cores and share of memory where the user left them open; say what, a line each."""
    from vllm.utils.cpu_resource_utils import (
        get_allowed_cpu_list,
        get_memory_node_info,
        get_visible_memory_node,
    )

    lines = []
    if args.dtype == "auto":
        args.dtype, why = choose_dtype(model)
        lines += [why] if why is not None else []
    cores = choose_reserved_cores(os.environ, len(os.sched_getaffinity(0)))
    lines += [cores] if cores is not None else []
    ranks, nodes = _local_ranks(args), len(get_visible_memory_node())
    bound = share_cores(os.environ, ranks=ranks, cores=sorted(os.sched_getaffinity(0)), nodes=nodes)
    lines += [bound] if bound is not None else []
    sized = args.kv_cache_memory_bytes is not None or os.environ.get("VLLM_CPU_KVCACHE_SPACE")
    if args.gpu_memory_utilization is None and not sized:
        # The same numbers as the worker's: of the memory beside its first core.
        memory = get_memory_node_info(get_allowed_cpu_list()[0].numa_node)
        total, free = memory.total_memory, memory.available_memory
        share = fitting_utilization(
            total_bytes=total,
            free_bytes=free,
            default=default_utilization,
            ranks=-(-ranks // nodes),
        )
        if share != default_utilization:
            args.gpu_memory_utilization = share
            lines.append(
                f"--gpu-memory-utilization {share}: weights and KV cache take "
                f"{share * total / 2**30:.1f} GiB, as {free / 2**30:.1f} of {total / 2**30:.1f} "
                "GiB are free"
            )
    return lines


def _local_ranks(args: Namespace) -> int:
    """Return how many workers this machine runs, of all engines."""
    ranks: int = args.tensor_parallel_size * args.pipeline_parallel_size
    engines: int = args.data_parallel_size_local or args.data_parallel_size
    return max(1, ranks // (args.nnodes or 1)) * max(1, engines)


def _allow_plugins(environ: Any) -> None:
    """Let vLLM load our routes, which it does only for plugins named in VLLM_PLUGINS.

    The variable filters general plugins too, so those that are loaded by default are named as well.
    """
    from importlib.metadata import entry_points

    names = environ.get("VLLM_PLUGINS")
    allowed = (
        [name for name in names.split(",") if name]
        if names is not None
        else [plugin.name for plugin in entry_points(group="vllm.general_plugins")]
    )
    environ["VLLM_PLUGINS"] = ",".join(dict.fromkeys([*allowed, "pte"]))
