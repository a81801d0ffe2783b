"""Section 3: spatial-wise dynamic networks."""
