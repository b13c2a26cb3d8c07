"""GORP, the frame that full-rank changes move in, and the bases that gradients keep off."""
