"""Training on the fused ops: from random weights or a checkpoint, exact to the bit where it is asked for."""
