"""One part of `pte-vllm bench gpu` in a process of its own.

`python -m pte_vllm.bench.gpu.part SPEC` prints one line of JSON on standard output.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from pte_vllm.bench.gpu.spec import Spec


def main() -> None:
    """Do what the SPEC on the command line says."""
    answers, sys.stdout = sys.stdout, sys.stderr
    spec = Spec(**json.loads(sys.argv[1]))
    # The kernels' part needs no engine; of the others only throughput leaves it its own process.
    own_process = spec.part == "throughput" and not spec.dry_run
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(own_process))
    if spec.dry_run:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    if spec.part == "parity":  # Triton's attention would multiply fp32 as TF32
        os.environ["TRITON_F32_DEFAULT"] = "ieee"
    for name, value in (
        ("VLLM_LOGGING_LEVEL", "WARNING"),
        ("VLLM_USE_FLASHINFER_SAMPLER", "0"),  # it is compiled at first use, from the network
        ("VLLM_NO_USAGE_STATS", "1"),
        ("HF_HUB_OFFLINE", "1"),
    ):
        os.environ.setdefault(name, value)
    result: Any
    if spec.part == "kernels":
        from pte_vllm.bench.gpu.kernels import run

        result = run(dry_run=spec.dry_run)
    elif spec.part == "parity":
        from pte_vllm.bench.gpu.parity import parity

        result = parity(spec)
    elif spec.part == "throughput":
        from pte_vllm.bench.gpu.throughput import throughput

        result = throughput(spec)
    else:
        from pte_vllm.bench.gpu.profile import profile

        result = profile(spec)
    from pte_vllm.bench.report import machine

    print(json.dumps({"machine": machine(), "result": result}), file=answers, flush=True)


if __name__ == "__main__":
    main()
