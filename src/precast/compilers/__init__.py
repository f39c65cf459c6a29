"""What turns a piece into code: one file for each compiler, behind `interface`."""
