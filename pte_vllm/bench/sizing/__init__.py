"""`pte-vllm plan`: what a window buys on hardware that one does not have. Standard library only."""
