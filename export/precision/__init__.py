"""Other arithmetic than float32: pictures in float16, layers in 8 bits, chosen by measured error."""
