"""pte_vllm/train/distill"""
