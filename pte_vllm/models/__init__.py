"""pte_vllm/models"""
