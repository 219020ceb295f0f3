"""How long things take here, side by side in one run, and what they ought to take by the accounting.

`itt benchmark` runs the parts that `parts.py` lists; `itt benchmark gpu-check` a selection of them on a GPU, after
checks of the numbers. What some machines said: docs/results, with docs/performance.md to read them by.
"""
