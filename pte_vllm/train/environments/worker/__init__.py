"""What runs in the process that plays episodes: its path has this folder, and `verifiers`."""
