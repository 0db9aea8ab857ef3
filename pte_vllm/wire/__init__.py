"""pte_vllm/wire"""
