"""Measurements: picture quality, latency, the machine they were made on, and how sure they are."""
