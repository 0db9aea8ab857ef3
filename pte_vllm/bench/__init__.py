"""What `pte-vllm bench` runs."""
