"""pte_vllm/adapter"""
