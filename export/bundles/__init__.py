"""Bundles as files: packing, verification, comparison, inspection, and the layout for Triton."""
