"""Bundles as files: packed, verified, compared, looked into, and laid out for Triton."""
