"""What `pte-vllm train experiment` runs: does an adapter learn to remember?"""
