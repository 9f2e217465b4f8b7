"""Pictures to minibatches: they are found, decoded, split, and mapped into memory as uint8."""
