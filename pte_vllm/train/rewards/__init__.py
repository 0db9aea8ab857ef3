"""pte_vllm/train/rewards"""
