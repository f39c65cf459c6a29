"""Compiling in other processes: the worker program, the service that runs workers, limits."""
