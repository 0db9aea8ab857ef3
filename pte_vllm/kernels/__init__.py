"""pte_vllm/kernels"""
