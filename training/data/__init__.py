"""From whatever --data names to minibatches of uint8 pictures: found, decoded, split, and mapped into memory."""
