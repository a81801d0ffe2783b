"""Section 2.1.3: dynamic routing."""
