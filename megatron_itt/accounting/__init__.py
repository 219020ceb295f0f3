"""Cost of a recipe without torch or a GPU: parameters, FLOPs, roofline, memory per rank and pipeline balance."""
