"""pte_vllm/demo"""
