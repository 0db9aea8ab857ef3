"""pte_vllm/engine"""
