"""The mathematics: `reference.py` defines it, the other modules make it fast."""
