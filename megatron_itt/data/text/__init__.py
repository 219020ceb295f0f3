"""Raw text to indexed datasets: sources, tokenizers, preprocessing, verification, download."""
