"""Evaluation of exported Hugging Face folders: lm-eval tasks, perplexity, causality, results files. No megatron."""
