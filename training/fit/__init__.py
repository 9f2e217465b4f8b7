"""Training that survives: two stages, in pieces that can be stopped and resumed, on one device or several."""
