"""Sweeps: each job a process of its own, and the table at the end. It imports no torch."""
