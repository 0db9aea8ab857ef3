"""Training of adapters: a process of its own, which needs the extra `train` and no vLLM.

Its folders import each other in this order only: options, data, rewards, replay, run, then grpo and
distill, then experiments. They import `method`, `models`, `adapter` and `wire`; the command line,
benchmarks and examples import them.
"""
