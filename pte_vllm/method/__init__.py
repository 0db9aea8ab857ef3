"""What Progressive Thought Encoding is: its equations, its plan of folds, its options.

`reference.py` has each equation once and `plan.py` says which blocks leave when; the engine, the
trainer and the server all ask these. Every other folder may import this one. It imports nothing of
the project, and torch only in `reference.py` and `rope.py`; the rest is the standard library.
"""
