"""`pte-vllm doctor`: what is installed, whether it fits together, how to mend what does not.

Only the command line imports this folder. It asks the engine's modules and `pte_vllm.serve`, each
within the check that needs it, and never vLLM itself.
"""
