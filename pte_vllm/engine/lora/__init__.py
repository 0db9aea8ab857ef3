"""pte_vllm/engine/lora"""
