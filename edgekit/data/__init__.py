"""Pictures: read from files, made from nothing, gathered into disjoint sets, and made noisy.

Everything here loads with NumPy, Pillow and scikit-image alone, so that training also runs on a bare GPU machine.
"""
