"""Section 2.1.2: dynamic width."""
