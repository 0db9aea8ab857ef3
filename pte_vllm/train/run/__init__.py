"""pte_vllm/train/run"""
