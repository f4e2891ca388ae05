"""dsq against llama.cpp's own tools; see run.py."""
