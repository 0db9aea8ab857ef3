"""Fast code for folds and for LoRA with states, each beside the slower code that defines it.

C++ for CPUs, Triton for GPUs, and PyTorch where neither runs; `choice.py` says which runs where.
Only the engine and the benchmarks import this folder; the doctor asks whether the C++ compiles.
The folder imports `pte_vllm.method` and no vLLM: layers of vLLM come in as arguments.
"""
