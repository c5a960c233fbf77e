"""Faults at system calls: signals and errors at every one that changes the disk, and what must hold after each."""
