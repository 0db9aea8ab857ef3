"""What tests of Triton kernels share: cases in the interpreter, and machine code without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def check_in_interpreter(module: str) -> None:
    """Run a module of cases in a process of its own.

    The interpreter is chosen when Triton is imported.
    """
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", module]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "ok", done.stderr[-2000:]


def compile_for(
    kernel: Any,
    capability: int,
    fixed: Mapping[str, Any],
    types: Mapping[str, str],
    **options: int,
) -> None:
    """Compile a kernel down to machine code of a GPU, within the shared memory that any has.

    Args:
        kernel: The kernel.
        capability: Of the GPU, such as 90.
        fixed: The values of its constants.
        types: Of its arguments; others are `*fp32` if they end in `_ptr`, else `i32`.
        options: Warps and stages.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    names = kernel.arg_names
    signature = {
        name: "constexpr"
        if name in fixed
        else types.get(name, "*fp32" if name.endswith("_ptr") else "i32")
        for name in names
    }
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in fixed.items()},
    )
    made = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert made.asm["cubin"]
    assert made.metadata.shared <= 48 * 1024  # what every GPU has
