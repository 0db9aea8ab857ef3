"""What a server refuses before its engine starts: the engine takes a minute, these checks none."""

from __future__ import annotations

import errno
import importlib
import os
import socket
import sys
from argparse import Namespace
from contextlib import ExitStack, nullcontext
from pathlib import Path

from vllm import envs
from vllm.entrypoints.launchers.launcher import create_server_socket

from pte_vllm.adapter.files import AdapterError, is_pte_adapter, read_config
from pte_vllm.adapter.format import Adapter, ModelShape
from pte_vllm.adapter.hashes import CONFIG_FILE, LORA_FILE
from pte_vllm.adapter.probes import Probes, ProbesError
from pte_vllm.adapter.serve_line import allowed_lora_rank
from pte_vllm.method.options import EngineConfig
from pte_vllm.models.location import check_model, model_hash
from pte_vllm.server.adapters.spool import Spool, SpoolError, default_spool
from pte_vllm.server.options import ServiceConfig
from pte_vllm.server.sharing.directory import num_api_servers


def check_early(args: Namespace, options: ServiceConfig, until: ExitStack) -> Spool | None:
    """Refuse what the arguments and this machine show; return the spool, locked if it is there.

    A machine without an HTTP server (`--headless`) needs neither an address nor a spool.

    Args:
        args: the server's arguments.
        options: of our routes.
        until: gives the address back when it ends.

    Raises:
        ValueError, OSError: naming the flag.
    """
    _check_files(args)
    _check_adapters(args)
    _check_probes(args)
    if args.headless:
        return None
    _check_api_servers(args)
    until.enter_context(claim_address(args) or nullcontext())
    return open_spool(args, options)


def _check_api_servers(args: Namespace) -> None:
    """Refuse several API servers with loads by path, which vLLM keeps in one of them."""
    if num_api_servers(args) > 1 and envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING:
        raise ValueError(
            f"--api-server-count {args.api_server_count} cannot be combined with "
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1: push adapters with PUT /pte/v1/adapters/{name}, "
            "or choose --api-server-count 1"
        )


def _check_files(args: Namespace) -> None:
    """Refuse files and modules that vLLM would miss only once its engine is there."""
    for name in ("ssl_keyfile", "ssl_certfile", "ssl_ca_certs"):
        path = getattr(args, name, None)
        if path and not os.path.isfile(path):
            raise FileNotFoundError(f"--{name.replace('_', '-')} {path} does not exist")
    for name in args.middleware or ():
        module, _, attribute = name.rpartition(".")
        try:
            getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"--middleware {name} cannot be imported: {error}") from error


def _check_adapters(args: Namespace) -> None:
    """Refuse adapters of --lora-modules that are not there, or not for this server."""
    modules = args.lora_modules or ()
    if modules and not args.enable_lora:
        raise ValueError("--lora-modules needs --enable-lora")
    taken = set(args.served_model_name or [args.model])
    for module in modules:
        flag = f"--lora-modules {module.name}={module.path}"
        if module.name in taken:
            raise ValueError(f"{flag}: {module.name} is the name of another model of this server")
        taken.add(module.name)
        path = Path(module.path).expanduser().absolute()  # as vLLM, which also asks the hub
        if not path.is_dir():
            check_model(module.path, flag=flag)  # a name of the hub passes
            continue
        try:
            rank = _rank(path, args.model)
        except AdapterError as error:
            raise ValueError(f"{flag}: {str(error).replace(f'{path}/', '')}") from error
        if rank > args.max_lora_rank:
            raise ValueError(
                f"{flag}: rank {rank} exceeds --max-lora-rank {args.max_lora_rank}; serve with "
                f"--max-lora-rank {allowed_lora_rank(rank)}"
            )


def _check_probes(args: Namespace) -> None:
    """Refuse probes that are not there or for a model of other sizes; say if it is another one."""
    engine = EngineConfig.from_vllm(args)
    if engine is None or engine.probes is None:
        return
    file, shape = engine.probes, _shape(args.model)
    try:
        probes = Probes.load(file)
        if shape is not None:
            shape.check_probes(probes)
    except ProbesError as error:
        raise ValueError(f"--pte-probes {file}: {str(error).replace(f'{file}: ', '')}") from error
    if os.path.isdir(args.model) and probes.model_hash != model_hash(args.model):
        print(
            f"pte-vllm: --pte-probes {file}: these are probes of another model; `pte-vllm adapter "
            "calibrate` samples this one's",
            file=sys.stderr,
        )


def _rank(path: Path, model: str) -> int:
    """Return the rank that an adapter needs; a PTE adapter is checked whole.

    Raises:
        AdapterError: if it is broken, or made for another model.
    """
    if not is_pte_adapter(path):
        if not any(path.glob("adapter_model.*")):
            raise AdapterError(f"{path / LORA_FILE} is missing")
        return int(read_config(path / CONFIG_FILE)["r"])
    adapter = Adapter.load(path, _shape(model))
    assert adapter.pte is not None
    return max(adapter.pte.rank, adapter.pte.global_tokens)


def _shape(model: str) -> ModelShape | None:
    """Return the sizes of a model in a local directory; None where vLLM has to find out."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model, local_files_only=True)
        return ModelShape.from_hf(config.get_text_config())
    except Exception:  # code of its own, or a form that only vLLM knows
        return None


def claim_address(args: Namespace) -> socket.socket | None:
    """Refuse an address that is in use; claim it until this process ends.

    vLLM binds the port at once, but listens when its engine is there: of two servers that start
    together, the second would fail after a minute.

    Returns:
        What holds the claim; None where there is no port to claim.

    Raises:
        ValueError: naming the flag.
    """
    if args.uds:
        if os.path.lexists(args.uds):
            raise ValueError(
                f"--uds {args.uds} exists: stop the server that uses it, or delete the file"
            )
        return None
    host, port = args.host or "", args.port
    in_use = f"--port {port} is in use: stop the server that uses it, or choose another --port"
    try:
        create_server_socket((host, port), reuse_port=False).close()
    except socket.gaierror as error:
        raise ValueError(f"--host {host} is not an address: {error.strerror}") from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ValueError(in_use) from error
        flags = f"--host {host} --port {port}" if host else f"--port {port}"
        raise ValueError(f"{flags} cannot be used: {error.strerror}") from error
    except OverflowError as error:
        raise ValueError(f"--port {port} is not a port: it must be 0 to 65535") from error
    if not port:
        return None
    claim = socket.socket(socket.AF_UNIX)
    try:
        claim.bind(f"\0pte-vllm/{host}:{port}")  # abstract: it leaves no file behind
    except OSError as error:
        claim.close()
        raise ValueError(f"{in_use} (it is still starting)") from error
    return claim


def open_spool(args: Namespace, options: ServiceConfig) -> Spool:
    """Return the spool of a server; it is locked if it was named, or is there already.

    It is also locked for several API servers, which rely on it.

    Raises:
        ValueError: if another server uses it, or it cannot be written.
    """
    named = options.spool is not None
    spool = Spool(Path(options.spool) if options.spool else default_spool(args.model, args.port))
    if args.enable_lora and (named or spool.root.is_dir() or num_api_servers(args) > 1):
        try:
            spool.open()
        except SpoolError as error:
            raise ValueError(
                f"--pte-spool {spool.root} cannot be written: {error.strerror}"
            ) from error
    return spool
