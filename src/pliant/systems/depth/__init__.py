"""Section 2.1.1: dynamic depth."""
