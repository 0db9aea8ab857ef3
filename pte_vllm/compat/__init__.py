"""pte_vllm/compat"""
