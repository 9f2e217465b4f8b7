"""Turn a run directory into one bundle: noise in, uint8 pixels out, nothing beside it.

`normalise` fits the latent normalisation, `chain` joins the trained networks into one Keras model,
`convert` makes that one ONNX graph, `verify` proves that the graph computes what Keras does.
"""
