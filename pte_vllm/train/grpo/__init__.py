"""pte_vllm/train/grpo"""
