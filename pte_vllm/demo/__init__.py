"""`pte-vllm demo`: a server of its own, chats with it, and what is shown of them.

Only the command line imports this folder. It drives `pte_vllm.launch` and a server over HTTP, and
imports neither torch nor vLLM.
"""
