"""`pte-vllm bench` and `plan`: speed, memory and exactness, every baseline in the same run.

The command line imports this folder. It starts engines and servers, and imports what it measures:
`engine`, `kernels`, `adapter`, `wire`, and the trainer's replay as the measure of exactness. It is
the one tool that imports vLLM.
"""
