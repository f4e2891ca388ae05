"""dsq: convert, quantize, measure and run code models. DeepSeek Coder first."""

__version__ = "0.1.0"
