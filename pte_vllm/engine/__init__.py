"""Thought encoding inside vLLM's processes: scheduler, cache, attention, runners and workers.

The scheduler's side bounds what a sequence holds; the worker's side folds what leaves into thought
states; a few modules (`earlier`, `request_ids`, `refusals`) serve the API server too. vLLM loads
the classes by name, through `pte_vllm.plugin` and `pte_vllm.serve`. This folder imports
`pte_vllm.adapter`, `pte_vllm.kernels` and `pte_vllm.method`, and never the server or the trainer.
"""
