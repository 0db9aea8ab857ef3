"""Which share of a step folds and modulation take on a GPU."""

from __future__ import annotations

from typing import Any

from pte_vllm.bench.gpu.spec import Spec, build
from pte_vllm.bench.gpu.throughput import SteadyBatch


def profile(spec: Spec) -> dict[str, Any]:
    """Which share of a step folds and modulation take, by the device's own clock."""
    import torch
    from torch.profiler import ProfilerActivity, record_function

    engine, lora = build(spec)
    runner = engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    for owner, name in ((runner.pte_evicted, "fold_into"), (runner, "_publish")):
        original = getattr(owner, name)

        def labelled(*args: Any, _call: Any = original, _name: str = name, **kwargs: Any) -> Any:
            with record_function(f"pte {_name}"):
                return _call(*args, **kwargs)

        setattr(owner, name, labelled)
    batch = SteadyBatch(engine, lora, spec, spec.rollouts[-1])
    batch.start()
    plain = batch.run(spec.seconds / 2)  # the profiler slows the host down
    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with torch.profiler.profile(activities=activities) as recorded:
        profiled = batch.run(min(spec.seconds / 2, 4.0))
        if on_gpu:
            torch.cuda.synchronize()
    events = {event.key: event for event in recorded.key_averages()}
    steps = profiled["steps"]

    def device_ms(name: str, *, own: bool) -> float:
        event = events.get(name)
        if event is None:
            return 0.0
        us = event.self_device_time_total if own else event.device_time_total
        return float(us) / 1e3 / steps

    def host_ms(name: str) -> float:
        return float(events[name].cpu_time_total) / 1e3 / steps if name in events else 0.0

    fold, modulate = device_ms("pte fold_into", own=False), device_ms("_modulate_kernel", own=True)
    top = sorted(events.values(), key=lambda event: -event.self_device_time_total)[:25]
    return {
        "sequences": batch.num_seqs,
        "step_ms": plain["step_ms"],
        "profiled_step_ms": profiled["step_ms"],
        "fold_device_ms": fold,
        "fold_kernel_ms": device_ms("_moments_kernel", own=True),
        "modulate_device_ms": modulate,
        "fold_host_ms": host_ms("pte fold_into"),
        "publish_host_ms": host_ms("pte _publish"),
        "share": (fold + modulate) / plain["step_ms"],
        "longest": {event.key: event.self_device_time_total / 1e3 / steps for event in top},
    }
