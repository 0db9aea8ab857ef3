"""vLLM's own OpenAI-compatible server with our classes plugged in.

`engine_args` does the same for the offline `LLM`:

    llm = LLM(model, block_size=32, **engine_args(EngineConfig(window_tokens=256)))
"""

from __future__ import annotations

import os
from typing import Any

from pte_vllm.method.options import EngineConfig, ServiceConfig

SCHEDULER_CLS = "pte_vllm.engine.scheduler.make_scheduler"


def engine_args(engine: EngineConfig) -> dict[str, Any]:
    """Keyword arguments for vLLM's `LLM` or `EngineArgs` that turn PTE on.

    Also sets variables of vLLM's for this process and those it starts, unless they are set:
    VLLM_USE_V2_MODEL_RUNNER selects Model Runner V1, and on a CPU VLLM_USE_AOT_COMPILE lets a
    second start find what the first one compiled.
    """
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
) -> None:
    """Run the server until it is stopped.

    Args:
        model: name or directory, vLLM's positional argument.
        engine: PTE's options.
        vllm_args: any of `vllm serve`'s flags.
        service: options of our routes.

    Raises:
        ValueError: naming the flag, if a combination is not supported.
    """
    _allow_plugins(os.environ)
    overrides = engine_args(engine)

    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from pte_vllm.engine.refusals import check_serve_args

    cli_env_setup()
    parser = FlexibleArgumentParser(prog="pte-vllm")
    command = ServeSubcommand()
    flags = command.subparser_init(parser.add_subparsers(required=True, dest="subparser"))
    # Rollouts report log-probs of the distribution that was sampled from, after the temperature.
    flags.set_defaults(logprobs_mode="processed_logprobs")
    args = parser.parse_args(["serve", model, *vllm_args])
    for name in ("scheduler_cls", "attention_backend"):
        given = getattr(args, name, None)
        if given is not None and name in overrides and given != overrides[name]:
            raise ValueError(f"--{name.replace('_', '-')} {given} cannot be combined with PTE")
    overrides["additional_config"] |= getattr(args, "additional_config", None) or {}
    for name, value in overrides.items():
        setattr(args, name, value)
    args.pte_service = service or ServiceConfig()  # vLLM hands `args` to the endpoint plugin
    check_serve_args(args, engine)
    if args.api_server_count is None and not args.headless:
        args.api_server_count = 1  # vLLM's own default is one per engine
    command.validate(args)
    command.cmd(args)


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
