"""Section 2.2: networks with dynamic parameters and features."""
