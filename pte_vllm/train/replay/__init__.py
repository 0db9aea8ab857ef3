"""pte_vllm/train/replay"""
