"""What a process needs, whatever it computes: files, locks, processes, progress, provenance, jobs that resume.

It knows no model.
"""
