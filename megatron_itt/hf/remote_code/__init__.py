"""Hugging Face model of the Inner Thinking Transformer.

These files are copied into every export and run there without this package: they import torch, transformers and each
other only. Load an export with `AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)`.
"""
