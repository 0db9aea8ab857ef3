"""pte_vllm/bench/gpu"""
