"""pte_vllm/method"""
