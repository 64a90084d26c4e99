"""GGUF, the file format of llama.cpp: read, and written once more as a Hugging Face directory."""
