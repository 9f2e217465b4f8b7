"""Turn a run directory, or an fp32 bundle, into bundles: noise in, uint8 pixels out, nothing beside them.

`source` gives the chain as ONNX (of a run: `chain` joins the trained networks into one Keras model, `convert`
makes that a graph); `passes` make it small and fast; `half`, `quantise` and `choose` give it other precisions;
`compare` and `verify` prove it; `pack` makes it bytes; `export` runs them in this order. `inspect` looks into
bundles, `triton` hands them to a fleet.
"""
