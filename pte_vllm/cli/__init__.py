"""pte_vllm/cli"""
