"""A piece of a graph: its value (`piece`), its text (`canonical`) and its name (`key`)."""
