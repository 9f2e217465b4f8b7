"""Arithmetic below float32: feature maps in float16 (fp16), or layers in 8 bits, chosen by measured error (int8)."""
