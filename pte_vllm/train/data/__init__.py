"""pte_vllm/train/data"""
