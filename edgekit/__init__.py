"""edgekit: compress an image denoiser, compile it for a phone, and prove that it still works."""

__version__ = "0.1.0"
