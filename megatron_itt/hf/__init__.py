"""Conversion between checkpoints and Hugging Face folders, and the Hugging Face model."""
