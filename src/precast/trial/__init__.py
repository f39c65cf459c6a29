"""What the command line does with a model of the user's: load it, call it, compile, compare, time.

It imports torch, so the command line runs it in a process of its own: `python -m precast.trial`.
`shapes.py` alone does not, since a command refuses a mistyped shape before it starts anything.
"""
